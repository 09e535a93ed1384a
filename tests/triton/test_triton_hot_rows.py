"""Hot rows: the same answers, a store that never lies about what it holds, and hits where there is locality."""

from __future__ import annotations

import pytest
import torch

from kcache.backends.triton import HotRows, Tuning, Workspace, triton_decode
from tests.triton.problem import Problem, assert_near, expected, make_problem

SMALL = Tuning(score_block=64, select_tile=64, gather_rows=16, tail_tile=16, processors=4)


def steps(problem: Problem, hot: HotRows, count: int, drift: float) -> list[float]:
    """Decode ``count`` times with a query that drifts; returns the hit rate of every step."""
    batch, kv_heads, capacity, dim = problem.keys.shape
    workspace = Workspace(
        batch, kv_heads, problem.group, dim, dim, capacity, problem.topn, problem.query.device,
        select=problem.select, tail=problem.tail, spread="even" if problem.threshold is None else "need", tuning=SMALL,
    )  # fmt: skip
    rates = []
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        before = hot.hits.sum().item()
        out, picks, _ = triton_decode(
            problem.query, problem.keys, problem.values, problem.length, scaling=problem.scaling,
            workspace=workspace, lowrank=problem.lowrank, threshold=problem.threshold, hot=hot,
        )  # fmt: skip
        assert_near(out, expected(problem, picks)[0], torch.float32)
        check_store(problem, hot)
        rates.append((hot.hits.sum().item() - before) / (picks >= 0).sum().item())
        noise = torch.randn(problem.query.shape, generator=generator).to(problem.query.device)
        problem.query = problem.query + drift * noise
    return rates


def check_store(problem: Problem, hot: HotRows) -> None:
    """Every tag names the row that is stored, once, in its own set."""
    heads = hot.store.shape[1]
    tags = hot.tags.cpu().view(-1, heads, hot.rows)
    store, repeat = hot.store.cpu(), heads // problem.keys.shape[1]
    for sequence in range(tags.shape[0]):
        for head in range(heads):
            held = tags[sequence, head]
            full = (held >= 0).nonzero().flatten()
            assert held[full].unique().numel() == full.numel()
            assert (held[full] % hot.sets == full // hot.ways).all()
            values = problem.values[sequence, head // repeat, held[full].long()].cpu()
            torch.testing.assert_close(store[sequence, head, full], values, rtol=0, atol=0)
    assert (hot.claims == 0).all()


def test_triton_hot_rows_answer_like_none(device: torch.device) -> None:
    problem = make_problem(length=200, topn=16, dim=32).to(device)
    hot = HotRows(2, 2, 64, 32, torch.float32, device, ways=4)
    rates = steps(problem, hot, 6, drift=0.3)
    assert rates[0] == 0
    assert max(rates[1:]) > 0.2


def test_triton_hot_rows_keep_a_repeated_step_whole(device: torch.device) -> None:
    problem = make_problem(length=64, topn=16, dim=32).to(device)
    hot = HotRows(2, 2, 64, 32, torch.float32, device, ways=8)
    rates = steps(problem, hot, 3, drift=0.0)
    assert rates == [0.0, 1.0, 1.0]
    hot.forget()
    assert steps(problem, hot, 1, drift=0.0) == [0.0]


def test_triton_hot_rows_too_few_for_a_step(device: torch.device) -> None:
    problem = make_problem(length=150, topn=40, dim=32, select="head").to(device)
    hot = HotRows(2, 4, 8, 32, torch.float32, device, ways=2)
    steps(problem, hot, 5, drift=0.5)


@pytest.mark.parametrize(("rows", "least"), [(1024, 0.6), (256, 0.0)])
def test_triton_hot_rows_follow_a_threshold(rows: int, least: float, device: torch.device) -> None:
    """More picks than a tile of the lookup, a different number in each head, and in each step; too many, even."""
    problem = make_problem(length=800, topn=64, dim=32, sharpness=1.0, threshold=0.5).to(device)
    hot = HotRows(2, 2, rows, 32, torch.float32, device, ways=4)
    rates = steps(problem, hot, 3, drift=0.1)
    assert rates[0] == 0
    repeated = steps(problem, hot, 2, drift=0.0)
    assert least <= min(*rates[1:], *repeated) < 1
    assert repeated[1] > least

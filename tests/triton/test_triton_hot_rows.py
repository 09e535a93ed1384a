"""Hot rows: the same answers, a store that never lies about what it holds, and hits where there is locality."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kcache.backends.triton import Chip, HotRows, Tuning, Workspace, triton_decode
from tests.triton.problem import Problem, assert_near, check_picks, expected, make_problem

SMALL = Tuning(score_block=64, select_tile=64, gather_rows=16, tail_tile=16, chip=Chip(4))


def steps(problem: Problem, hot: HotRows, count: int, drift: float) -> list[float]:
    """Decode ``count`` times with a query that drifts, on poisoned scratch; returns the hit rate of every step."""
    batch, kv_heads, capacity, dim = problem.keys.shape
    workspace = Workspace(
        batch, kv_heads, problem.group, dim, problem.values.shape[3], capacity, problem.topn, problem.query.device,
        select=problem.select, tail=problem.tail, spread="even" if problem.threshold is None else "need",
        tail_rank=None if problem.lowrank is None else problem.lowrank.basis.shape[2], tuning=SMALL,
    )  # fmt: skip
    for name in ("scores", "block_top", "lse", "partial", "weights", "shares", "held", "hot_slots", "listed", "found"):
        scratch = getattr(workspace, name)
        scratch.fill_(float("nan") if scratch.is_floating_point() else -123456)
    rates = []
    generator = torch.Generator().manual_seed(7)
    for _ in range(count):
        before = hot.hits.sum().item()
        out, picks, _ = triton_decode(
            problem.query, problem.keys, problem.values, problem.length, scaling=problem.scaling,
            workspace=workspace, lowrank=problem.lowrank, mask=problem.mask, sinks=problem.sinks,
            threshold=problem.threshold, narrow=problem.narrow, value_scales=problem.value_scales, hot=hot,
        )  # fmt: skip
        assert_near(out, expected(problem, picks)[0], torch.float32)
        check_picks(problem, picks)
        check_store(problem, hot)
        rates.append((hot.hits.sum().item() - before) / max(1, (picks >= 0).sum().item()))
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
            torch.testing.assert_close(store[sequence, head, full], values, rtol=0, atol=0, equal_nan=True)
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
    problem = make_problem(1, length=700, topn=64, dim=32, sharpness=1.0, threshold=0.5).to(device)
    hot = HotRows(1, 2, rows, 32, torch.float32, device, ways=4)
    rates = steps(problem, hot, 3, drift=0.1)
    assert rates[0] == 0
    repeated = steps(problem, hot, 2, drift=0.0)
    assert least <= min(*rates[1:], *repeated) < 1
    assert repeated[1] > least


def test_triton_rows_of_work_that_pick_most_come_first(device: torch.device) -> None:
    problem = make_problem(3, kv_heads=4, length=400, topn=24, dim=32, sharpness=1.0, threshold=0.5).to(device)
    hot, length = HotRows(3, 4, 64, 32, torch.float32, device, ways=4), problem.length
    natural = hot.order[0].clone()
    for step in range(4):
        problem.length = length - step % 2
        before = hot.counts[problem.length % 2].clone()
        steps(problem, hot, 1, drift=0.5)
        following = 1 - problem.length % 2
        assert torch.equal(hot.order[following].long(), torch.argsort(before, descending=True, stable=True))
        assert (hot.counts[following] > 0).all()
    assert before.unique().numel() > 4
    assert not torch.equal(hot.order[0], natural)


EDGES: dict[str, tuple[dict[str, Any], int, int]] = {
    "one row": ({"length": 1, "topn": 1, "dim": 16}, 64, 4),
    "nothing picked": ({"length": 1, "topn": 4, "dim": 16, "threshold": 0.5}, 64, 4),
    "as many as rows": ({"length": 64, "topn": 64, "dim": 16, "group": 3}, 64, 4),
    "padded, too few": ({"length": 300, "topn": 40, "dim": 32, "padded": True}, 32, 2),
    "padded, all": ({"length": 120, "topn": 100, "dim": 32, "padded": True, "batch": 1}, 128, 8),
    "a group of 16": ({"length": 90, "topn": 8, "rank": 17, "group": 16, "batch": 1, "kv_heads": 1}, 64, 4),
    "all directions": ({"length": 90, "topn": 8, "dim": 128, "rank": 128, "threshold": 0.3, "batch": 1}, 64, 4),
    "8 bits": ({"length": 130, "topn": 8, "k_bits": 8, "v_bits": 8, "threshold": 0.4, "padded": True}, 64, 4),
    "two planes": ({"length": 130, "topn": 8, "k_bits": "8+8", "threshold": 0.4, "padded": True}, 64, 4),
    "renormalised": ({"length": 130, "topn": 8, "tail": "renormalise", "threshold": 0.4, "sinks": True}, 64, 4),
    "more claims than ways": ({"length": 400, "topn": 10, "dim": 32, "threshold": 0.9, "batch": 3}, 16, 2),
}


@pytest.mark.parametrize("edge", EDGES)
def test_triton_hot_rows_at_the_edges(edge: str, device: torch.device) -> None:
    sizes, rows, ways = EDGES[edge]
    problem = make_problem(**sizes)
    if problem.mask is not None:  # what is masked may be anything
        masked = ~problem.mask[:, None, :].expand(-1, problem.values.shape[1], -1)
        problem.values[:, :, : problem.length][masked] = 77 if problem.value_scales is not None else float("nan")
    problem = problem.to(device)
    batch, kv_heads, _, dim = problem.values.shape
    steps(problem, HotRows(batch, kv_heads, rows, dim, problem.values.dtype, device, ways=ways), 3, drift=0.3)

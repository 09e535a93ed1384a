"""The replay of recorded picks: each layer fetches what its stream says, step by step, and hot rows see the repeats."""

from __future__ import annotations

from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.pick_trace import FILE, Trace, replayed
from kcache.backends.triton import Chip, HotRows, Tuning, Workspace, triton_decode
from tests.triton.problem import Problem, assert_near, expected, make_problem

SMALL = Tuning(score_block=64, select_tile=64, gather_rows=16, tail_tile=16, chip=Chip(4))
STREAMS = [[[1, 5, 9], [2, 3]], [[1, 5, 40], [2, 3, 4, 60]], [[5, 9, 40], [7]]]
"""Picks of two streams in three steps, in 100 rows."""


@pytest.fixture
def trace_file(tmp_path: Path) -> Path:
    counts = np.array([[len(head) for head in step] for step in STREAMS], np.uint16)
    flat = np.array([row for step in STREAMS for head in step for row in head], np.uint16)
    np.savez(tmp_path / "trace.npz", counts=counts, positions=flat, length=np.int64(100), topn=np.int64(3))
    return tmp_path / "trace.npz"


def test_triton_replayed_picks_are_those_of_the_trace(trace_file: Path, device: torch.device) -> None:
    """Two layers of two sequences and one KV head, in twice as many rows: rows of work take the streams in turn."""
    problem = make_problem(batch=2, kv_heads=1, dim=32, length=200, topn=4, threshold=0.1).to(device)
    trace = Trace(trace_file, 200, device)
    assert trace.rows == pytest.approx(16 / 6)
    own_rows = _own_rows(problem, device)
    stores = [HotRows(2, 1, 64, 32, torch.float32, device, ways=8) for _ in range(2)]
    capacity = problem.keys.shape[2]
    workspace = Workspace(2, 1, 2, 32, 32, capacity, 4, device, spread="need", tuning=SMALL)
    tally = torch.zeros(2, dtype=torch.int64, device=device)
    seen: list[list[set[int]]] = [[set(), set()] for _ in stores]
    with replayed(trace):
        for step in range(4):
            for layer, hot in enumerate(stores):
                before = tally.clone()
                hits = hot.hits.clone()
                out, picks, _ = triton_decode(
                    problem.query, problem.keys, problem.values, problem.length, scaling=problem.scaling,
                    workspace=workspace, lowrank=problem.lowrank, threshold=problem.threshold, tally=tally, hot=hot,
                )  # fmt: skip
                want = [{2 * row for row in STREAMS[step % 3][sequence]} for sequence in range(2)]
                got = [set(picks[sequence, 0].tolist()) - {-1} for sequence in range(2)]
                assert got == want
                assert (tally - before).tolist() == own_rows, "a threshold is steered by what it picked itself"
                found = [len(rows & known) for rows, known in zip(want, seen[layer], strict=True)]
                assert (hot.hits - hits)[:, 0].tolist() == found
                assert_near(out, expected(problem, picks)[0], torch.float32)
                for known, rows in zip(seen[layer], want, strict=True):
                    known |= rows


def _own_rows(problem: Problem, device: torch.device) -> list[int]:
    """How many rows each sequence picks by its threshold."""
    workspace = Workspace(2, 1, 2, 32, 32, problem.keys.shape[2], 4, device, spread="need", tuning=SMALL)
    tally = torch.zeros(2, dtype=torch.int64, device=device)
    triton_decode(
        problem.query, problem.keys, problem.values, problem.length, scaling=problem.scaling, workspace=workspace,
        lowrank=problem.lowrank, threshold=problem.threshold, tally=tally,
    )  # fmt: skip
    return tally.tolist()


def test_triton_without_the_block_steps_pick_for_themselves(trace_file: Path, device: torch.device) -> None:
    problem = make_problem(batch=1, kv_heads=1, dim=32, length=120, topn=4, threshold=0.1).to(device)
    workspace = Workspace(1, 1, 2, 32, 32, problem.keys.shape[2], 4, device, spread="need", tuning=SMALL)
    found = []
    for block in (replayed(Trace(trace_file, 120, device)), None):
        hot = HotRows(1, 1, 64, 32, torch.float32, device)
        arguments = {"scaling": problem.scaling, "workspace": workspace, "lowrank": problem.lowrank,
                     "threshold": problem.threshold, "hot": hot}  # fmt: skip
        with block or nullcontext():
            _, picks, _ = triton_decode(problem.query, problem.keys, problem.values, problem.length, **arguments)
        found.append(set(picks[0, 0].tolist()))
    assert found[0] != found[1]


def test_the_recorded_trace_is_what_real_text_picks(device: torch.device) -> None:
    """128 rows a head on average, distinct and within the context, and most of them picked in the step before."""
    trace = Trace(FILE, 32768, device)
    assert trace.rows == pytest.approx(128, rel=0.1)
    picks = trace.picks.cpu()
    assert picks.shape[0] >= 32
    assert int(picks.max()) < 32768
    for stream in range(0, picks.shape[1], 17):
        rows = [set(step[stream].tolist()) - {-1} for step in picks]
        assert [len(found) for found in rows] == (picks[:, stream] >= 0).sum(1).tolist()
    shared = [
        len(set(one[stream].tolist()) & set(other[stream].tolist()) - {-1}) / max(1, int((other[stream] >= 0).sum()))
        for one, other in pairwise(picks)
        for stream in range(picks.shape[1])
    ]
    assert sum(shared) / len(shared) > 0.4
    with pytest.raises(ValueError, match="cannot be replayed in 4096"):
        Trace(FILE, 4096, device)

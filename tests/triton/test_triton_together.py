"""The kernels whose programs wait for each other, in random order, on memory that shows stores late and reads stale."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from kcache.backends.triton import Chip, DenseWorkspace, HotRows
from tests.triton import test_triton_decode_step as decode_step
from tests.triton import test_triton_dense as dense_step
from tests.triton.problem import assert_near, check_picks, dense, expected, make_problem
from tests.triton.test_triton_hot_rows import steps
from tests.triton.together import together

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="of Triton's interpreter; a device is its own test")

CPU = torch.device("cpu")
TUNING = replace(decode_step.SMALL, score_splits=3, tail_splits=2, ahead=2)
SMALL: dict[str, Any] = {"length": 150, "topn": 6, "dim": 16}
CASES: dict[str, dict[str, Any]] = {
    "above": {"threshold": 0.1, "padded": True},
    "above, per query head": {"threshold": 0.1, "select": "head", "batch": 1},
    "above, no tail": {"threshold": 0.1, "tail": "none"},
    "above, 17 directions": {"threshold": 0.1, "rank": 17, "dim": 32, "batch": 1},
    "exactly N": {"padded": True},
    "K and V in 8 bits": {"threshold": 0.1, "k_bits": 8, "v_bits": 8, "dim": 32},
    "K in two planes": {"threshold": 0.1, "k_bits": "8+8", "padded": True, "dim": 32},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("resident", [1, 3, 8])
def test_triton_step_with_its_programs_together(case: str, resident: int) -> None:
    """Three steps in one workspace, so that what a step leaves behind for the next is tried as well."""
    problem = make_problem(seed=resident, **{**SMALL, **CASES[case]})
    workspace = decode_step.make_workspace(problem, TUNING)
    for seed in range(3):
        with together(seed, resident) as those:
            out, picks, _ = decode_step.run(problem, workspace)
        assert (those.switches > 50) or resident == 1
        check_picks(problem, picks)
        assert_near(out, expected(problem, picks)[0], problem.query.dtype)
        assert not workspace.done.any()
        assert not workspace.tickets.any()


@pytest.mark.parametrize("seed", range(3))
def test_triton_hot_rows_with_programs_together(seed: int) -> None:
    problem = make_problem(seed=seed, threshold=0.2, **SMALL)
    with together(seed) as those:
        rates = steps(problem, HotRows(2, 2, 64, 16, torch.float32, CPU, ways=4), 3, drift=0.1)
    assert those.switches > 200
    assert rates[2] > 0.2


@pytest.mark.parametrize("seed", range(3))
def test_triton_dense_with_its_programs_together(seed: int) -> None:
    problem = make_problem(seed=seed, length=300, dim=16, sinks=True, padded=True)
    workspace = DenseWorkspace(2, 2, 2, 16, 16, 307, CPU, tuning=replace(dense_step.SMALL, chip=Chip(64)))
    assert workspace.splits > 1
    with together(seed) as those:
        for _ in range(2):
            assert_near(dense_step.run(problem, 300, workspace), dense(problem), torch.float32)
    assert those.switches > 50
    assert not workspace.counters.any()


# -- that it finds what it looks for ---------------------------------------------------------------------------------


@triton.jit
def handing_over(data, flag, seen, GIVES: tl.constexpr, TAKES: tl.constexpr):
    """Program 0 hands a number to program 1, which has looked before."""
    if tl.program_id(0) == 0:
        tl.store(data, 7)
        tl.atomic_add(flag, 1, sem=GIVES, scope="gpu")
    else:
        before = tl.load(data)
        while tl.atomic_add(flag, 0, sem=TAKES, scope="gpu") < 1:
            pass
        tl.store(seen, tl.load(data) + 0 * before)


@pytest.mark.parametrize(
    ("gives", "takes", "always"),
    [
        ("release", "acquire", True),
        ("acq_rel", "acq_rel", True),
        ("relaxed", "acquire", False),
        ("release", "relaxed", False),
    ],
)
def test_triton_a_hand_over_without_order_is_seen_to_fail(gives: str, takes: str, always: bool) -> None:
    found = set()
    for seed in range(20):
        data, flag, seen = (torch.zeros(8, dtype=torch.int32) for _ in range(3))
        with together(seed):
            handing_over[(2,)](data, flag, seen, GIVES=gives, TAKES=takes)
        found.add(int(seen[0]))
        assert data[0] == 7
    assert found == ({7} if always else {0, 7})


@triton.jit
def waiting(flag):
    while tl.atomic_add(flag, 0, sem="acquire", scope="gpu") < 1:
        pass


def test_triton_programs_that_wait_for_ever_are_named() -> None:
    with together(0), pytest.raises(Exception, match="wait for ever"):
        waiting[(2,)](torch.zeros(1, dtype=torch.int32))

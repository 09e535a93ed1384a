"""Split-K dense decode by Triton against fp64 torch."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kcache.backends.triton import Chip, DenseWorkspace, Tuning, dense_decode
from tests.triton.problem import Problem, assert_near, dense, make_problem

SMALL = Tuning(dense_block=32, dense_stages=2, chip=Chip(8))
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "multi-head, long": {"group": 1, "length": 700, "batch": 1},
    "group of 3, head size 80": {"group": 3, "dim": 80},
    "group of 16": {"group": 16, "kv_heads": 1},
    "unequal sizes": {"dim": 96, "dim_v": 128},
    "head size 256": {"dim": 256, "batch": 1},
    "all at once": {"padded": True, "softcap": 4.0, "sinks": True, "group": 4, "length": 333},
    "first step": {"length": 1},
    "bf16": {"dtype": torch.bfloat16, "dim": 128, "padded": True},
    "fp16": {"dtype": torch.float16},
    "large capacity": {"length": 40, "capacity": 500},
}


def run(problem: Problem, length: int | torch.Tensor, workspace: DenseWorkspace | None = None) -> torch.Tensor:
    batch, kv_heads, capacity, dim = problem.keys.shape
    device, dim_v = problem.query.device, problem.values.shape[-1]
    if workspace is None:
        workspace = DenseWorkspace(batch, kv_heads, problem.group, dim, dim_v, capacity, device, tuning=SMALL)
    out = problem.query.new_full((batch, problem.query.shape[1], dim_v), float("nan"))
    return dense_decode(
        problem.query, problem.keys, problem.values.to(device), length, scaling=problem.scaling, workspace=workspace,
        mask=problem.mask, softcap=problem.softcap, sinks=problem.sinks, out=out,
    )  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_triton_dense_equals_fp64(case: str, device: torch.device) -> None:
    problem = make_problem(seed=len(case), **CASES[case]).to(device)
    assert_near(run(problem, problem.length), dense(problem), problem.query.dtype)


def test_triton_dense_all_masked_gives_zeros(device: torch.device) -> None:
    problem = make_problem(padded=True)
    assert problem.mask is not None
    problem.mask[0] = False
    out = run(problem.to(device), problem.length)
    assert (out[0] == 0).all()
    assert out[1].isfinite().all()


def test_triton_dense_takes_its_length_from_the_device(device: torch.device) -> None:
    problem = make_problem(length=200, capacity=256).to(device)
    batch, kv_heads, capacity, dim = problem.keys.shape
    workspace = DenseWorkspace(batch, kv_heads, problem.group, dim, dim, capacity, device, tuning=SMALL)
    length = torch.zeros(1, dtype=torch.int32, device=device)
    for rows in (1, 31, 32, 33, 200):
        problem.length = rows
        length.fill_(rows)
        assert_near(run(problem, length, workspace), dense(problem), torch.float32)

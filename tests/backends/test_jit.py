"""The compiled decode steps compute the reference's, on random shapes, types, masks, sinks, ties and thresholds."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcache.backends.base import DecodeResult, DecodeStep
from kcache.backends.cpu import CpuBackend
from kcache.backends.jit.lanes import LANES
from kcache.backends.jit.steps import Kernels
from kcache.backends.jit.team import Team
from kcache.backends.reference import ReferenceBackend
from kcache.policy import Policy
from tests.backends.test_backends import problem

TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 8e-3}
KERNELS = Kernels()

policies = st.builds(
    Policy,
    topn=st.sampled_from([1, 5, 16, 5000]),
    tail=st.sampled_from(["lowrank", "renormalise", "none"]),
    tail_rank=st.sampled_from([None, 3]),
)
problems = st.builds(
    problem,
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 3, 4, 7]),
    length=st.sampled_from([1, 2, 17, 63, 1023, 1024, 1025, 2100]),
    dim=st.sampled_from([16, 40, 64, 96]),
    value_dim=st.sampled_from([16, 24, 48, 64]),
    spare=st.sampled_from([0, 1, 30]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    policy=policies,
    masked=st.booleans(),
    sinks=st.booleans(),
    threshold=st.sampled_from([None, None, 0.9, 0.02]),
)


def rows_of(result: DecodeResult) -> list[set[int]]:
    return [{row for row in rows if row >= 0} for rows in result.picks.flatten(0, -2).tolist()]


def by_position(result: DecodeResult, step: DecodeStep) -> torch.Tensor:
    """What each row weighs as a pick, ``[..., L]``; 0 for the others."""
    weights = result.weights.masked_fill(result.picks < 0, 0)
    return torch.zeros(*weights.shape[:-1], step.length).scatter_add_(-1, result.picks.clamp(min=0).long(), weights)


def check_decode(step: DecodeStep, kernels: Kernels = KERNELS) -> None:
    got, want = kernels.decode(step), ReferenceBackend().decode(step)
    if got is None:
        assert step.threshold is not None
        return
    tolerance = TOLERANCE[step.keys.dtype]
    assert got.out.dtype == step.query.dtype
    assert got.mass.shape == want.mass.shape
    assert rows_of(got) == rows_of(want)
    torch.testing.assert_close(got.mass, want.mass, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(by_position(got, step), by_position(want, step), atol=1e-5, rtol=1e-4)
    error = (got.out.float() - want.out.float()).square().mean().sqrt()
    assert error <= tolerance * want.out.float().square().mean().sqrt() + 1e-6


@settings(max_examples=120, derandomize=True, deadline=None, database=None)
@given(step=problems)
def test_decode_equals_the_reference(step: DecodeStep) -> None:
    assert KERNELS.serves_decode(step)
    check_decode(step)


@settings(max_examples=80, derandomize=True, deadline=None, database=None)
@given(step=problems)
def test_dense_equals_the_reference(step: DecodeStep) -> None:
    assert KERNELS.serves_dense(step)
    tolerance = TOLERANCE[step.keys.dtype]
    got, want = KERNELS.dense(step).float(), ReferenceBackend().dense(step).float()
    assert (got - want).square().mean().sqrt() <= tolerance * want.square().mean().sqrt() + 1e-6


def test_ties_pick_each_row_once() -> None:
    step = problem(length=1500, ties=True, policy=Policy(topn=9, tail="none"))
    got, want = KERNELS.decode(step), ReferenceBackend().decode(step)
    assert got is not None
    assert all(len(rows) == 9 for rows in rows_of(got))
    torch.testing.assert_close(got.mass, want.mass, atol=1e-6, rtol=1e-4)


def test_a_sequence_with_every_row_masked_gives_zeros() -> None:
    step = problem(length=300, policy=Policy(topn=9))
    step = replace(step, mask=torch.zeros(2, 300, dtype=torch.bool))
    result = KERNELS.decode(step)
    assert result is not None
    assert (result.mass == 0).all()
    assert (result.out == 0).all()
    assert (KERNELS.dense(step) == 0).all()


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("threshold", [None, 0.01])
def test_two_threads(threshold: float | None) -> None:
    step = problem(length=5000, masked=True, threshold=threshold)
    check_decode(step)
    torch.testing.assert_close(KERNELS.dense(step), ReferenceBackend().dense(step), atol=3e-5, rtol=3e-5)


def test_fewer_threads_than_asked_for() -> None:
    """OpenMP may give a region a smaller team; its pieces must all be done."""
    check = "from tests.backends.test_jit import *; check_decode(problem(length=5000))"
    code = f"import torch; torch.set_num_threads(2); {check}"
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "OMP_THREAD_LIMIT": "1"}, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr.decode()


_OTHER_MACHINE = """
import sys
from llvmlite import binding
features = binding.get_host_cpu_features()
for name in features:
    if name.startswith(tuple(sys.argv[1].split(","))):
        features[name] = False
binding.get_host_cpu_features = lambda: features
from kcache.backends.jit.lanes import LANES
assert LANES == int(sys.argv[2]), LANES
from tests.backends.test_jit import *
dtype = getattr(torch, sys.argv[3])
for group in 1, 2, 3, 4:
    step = problem(length=301, dim=96, value_dim=48, group=group, dtype=dtype, threshold=0.02)
    check_decode(step)
    error = KERNELS.dense(step).float() - ReferenceBackend().dense(step).float()
    assert error.abs().max() < 10 * TOLERANCE[dtype]
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.machine() != "x86_64", reason="registers of x86-64")
@pytest.mark.parametrize(("without", "lanes", "dtype"), [("avx512", 8, "bfloat16"), ("avx,fma,f16c", 4, "float32")])
def test_machines_with_shorter_registers(without: str, lanes: int, dtype: str) -> None:
    if lanes > LANES:
        pytest.skip(f"this machine has registers of {LANES} numbers")
    command = [sys.executable, "-c", _OTHER_MACHINE, without, str(lanes), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("what", ["query", "keys"])
def test_nan_comes_out_where_it_went_in(what: str) -> None:
    step = problem(length=300, policy=Policy(topn=9))
    tensor = getattr(step, what).clone()
    tensor[0, 0, 3] = float("nan")
    step = replace(step, **{what: tensor})
    for got, want in (
        (KERNELS.dense(step), ReferenceBackend().dense(step)),
        (KERNELS.decode(step), ReferenceBackend().decode(step)),
    ):
        got, want = (x.out if isinstance(x, DecodeResult) else x for x in (got, want))
        assert torch.equal(got.isnan(), want.isnan())
        assert want.isnan().any()


def test_torchs_default_dtype_is_not_theirs() -> None:
    step = problem(length=300)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        got = KERNELS.decode(step)
    finally:
        torch.set_default_dtype(before)
    assert got is not None
    torch.testing.assert_close(got.out, ReferenceBackend().decode(step).out, atol=3e-5, rtol=3e-5)


def test_a_short_mask_is_not_read_past_its_end() -> None:
    assert not KERNELS.serves_decode(replace(problem(length=300), mask=torch.ones(2, 100, dtype=torch.bool)))


def test_one_thread_without_openmp(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.backends.jit.steps.find_team", Team)
    alone = Kernels()
    step = problem(length=2100, threshold=0.01)
    check_decode(step, alone)
    torch.testing.assert_close(alone.dense(step), KERNELS.dense(step))


def test_more_rows_than_allowed_are_the_references_to_choose() -> None:
    step = problem(length=3000, threshold=1e-7, policy=Policy(topn=2))
    assert KERNELS.decode(step) is None
    got, want = CpuBackend().decode(step), ReferenceBackend().decode(step)
    assert rows_of(got) == rows_of(want)
    torch.testing.assert_close(got.out, want.out, atol=3e-5, rtol=3e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"softcap": 2.0},
        {"policy": Policy(topn=9, select="head")},
        {"dtype": torch.float16},
        {"strided": True},
    ],
    ids=["softcap", "per head", "fp16", "strided"],
)
def test_what_they_do_not_serve_goes_to_torch(change: dict[str, Any]) -> None:
    step = problem(length=200, **change)
    assert not KERNELS.serves_decode(step)
    got, want = CpuBackend().decode(step), ReferenceBackend().decode(step)
    torch.testing.assert_close(got.out.float(), want.out.float(), atol=2e-2, rtol=2e-2)


def test_the_cpu_backend_uses_them(monkeypatch: pytest.MonkeyPatch) -> None:
    step = problem(length=200)
    backend = CpuBackend()
    backend.decode(step)
    assert backend._kernels is not None
    monkeypatch.setattr("kcache.backends.cpu.has_numba", lambda: False)
    without = CpuBackend()
    torch.testing.assert_close(without.decode(step).out, backend.decode(step).out, atol=3e-5, rtol=3e-5)
    assert without._kernels is None

"""The Triton backend behind the backend interface, against the reference backend."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from kcache.backends.base import DecodeStep
from kcache.backends.reference import ReferenceBackend
from kcache.backends.triton.backend import TritonBackend
from kcache.backends.triton.common import interpreted
from kcache.errors import PolicyError
from kcache.lowrank import LowRankTail
from kcache.policy import Policy
from tests.triton.problem import make_problem


def make_step(policy: Policy, device: torch.device, **sizes: object) -> DecodeStep:
    problem = make_problem(topn=policy.topn, tail_block=policy.tail_block, **sizes).to(device)  # type: ignore[arg-type]
    assert problem.means is not None
    lowrank = None
    if policy.tail == "lowrank":
        tail = LowRankTail(policy.tail_rank, device)
        rows = torch.where(problem.mask[:, None, :, None], problem.values.to(device)[:, :, : problem.length], 0)
        tail.append(rows, None, 0)
        lowrank = tail.state()
    return DecodeStep(
        problem.query, problem.keys, problem.values, problem.length, problem.scaling, policy,
        means=problem.means[:, :, : -(-problem.length // policy.tail_block)], mask=problem.mask, lowrank=lowrank,
    )  # fmt: skip


@pytest.mark.parametrize(
    "policy",
    [
        Policy(topn=12),
        Policy(topn=12, select="head"),
        Policy(topn=12, tail="block"),
        Policy.paper(12),
        Policy(topn=12, tail="renormalise"),
        Policy(topn=5000),
        Policy(tail="block", tail_block=12),
    ],
    ids=["default", "per head", "blocks", "paper", "renormalised", "all rows", "a tail block the kernels do not take"],
)
def test_triton_backend_equals_reference(policy: Policy, device: torch.device) -> None:
    step = make_step(policy, device, length=90, capacity=128, padded=True)
    backend, reference = TritonBackend(device), ReferenceBackend()
    for _ in range(2):
        got, want = backend.decode(step), reference.decode(step)
        torch.testing.assert_close(got.out, want.out, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got.mass, want.mass, rtol=1e-5, atol=1e-6)
        assert got.picks.shape == want.picks.shape
    assert len(backend._workspaces) <= 1


@pytest.mark.parametrize("dim", [64, 8])
def test_triton_backend_dense_equals_reference(dim: int, device: torch.device) -> None:
    step = make_step(Policy(topn=12), device, length=90, capacity=128, padded=True, dim=dim)
    step = replace(step, values=step.values.to(device))
    backend, reference = TritonBackend(device), ReferenceBackend()
    torch.testing.assert_close(backend.dense(step), reference.dense(step), rtol=1e-4, atol=1e-5)


def test_triton_backend_needs_a_device_or_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    assert interpreted() or torch.cuda.is_available()
    monkeypatch.setattr("kcache.backends.triton.backend.interpreted", lambda: False)
    with pytest.raises(PolicyError, match="TRITON_INTERPRET=1"):
        TritonBackend(torch.device("cpu"))

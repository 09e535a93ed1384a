"""The Triton backend behind the backend interface, against the reference backend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from triton import OutOfResources

from kcache.backends import choose_backend
from kcache.backends.base import DecodeResult, DecodeStep
from kcache.backends.reference import ReferenceBackend
from kcache.backends.triton.backend import TritonBackend
from kcache.backends.triton.common import interpreted
from kcache.errors import PolicyError
from kcache.policy import Policy
from tests.triton.problem import make_problem


def make_step(policy: Policy, device: torch.device, **sizes: object) -> DecodeStep:
    problem = make_problem(topn=policy.topn, tail=policy.tail, select=policy.select, **sizes).to(device)  # type: ignore[arg-type]
    threshold = problem.threshold
    return DecodeStep(
        problem.query, problem.keys, problem.values, problem.length, problem.scaling, policy, mask=problem.mask,
        lowrank=problem.lowrank, threshold=threshold,
        tally=None if threshold is None else torch.tensor([3, 0], device=device),
    )  # fmt: skip


def weighed(result: DecodeResult) -> list[dict[int, float]]:
    """What each pick weighs, for each row of picks."""
    rows = zip(result.picks.flatten(0, -2).tolist(), result.weights.flatten(0, -2).tolist(), strict=True)
    return [{at: weight for at, weight in zip(*row, strict=True) if at >= 0} for row in rows]


@pytest.mark.parametrize(
    ("policy", "sizes"),
    [
        (Policy(topn=12), {}),
        (Policy(topn=12, select="head"), {}),
        (Policy.paper(12), {}),
        (Policy(topn=12, tail="renormalise"), {}),
        (Policy(topn=5000), {}),
        (Policy(topn=12), {"threshold": 0.2}),
        (Policy(topn=2), {"threshold": 0.8}),
        (Policy(topn=2, select="head"), {"threshold": 0.8, "dtype": torch.bfloat16}),
        (Policy(topn=12), {"threshold": 0.2, "dim": 8}),
        (Policy(topn=5000), {"capacity": 192}),
        (Policy(topn=5000), {"threshold": 0.001, "capacity": 192}),
    ],
    ids=[
        "default", "per head", "paper", "renormalised", "all rows", "above", "above, the most", "above, per head",
        "a head size the kernels do not take", "all rows, width above the capacity", "above, width above the capacity",
    ],
)  # fmt: skip
def test_triton_backend_equals_reference(policy: Policy, sizes: dict[str, Any], device: torch.device) -> None:
    step = make_step(policy, device, **{"length": 90, "capacity": 128, "padded": True, **sizes})
    backend, reference = TritonBackend(device), ReferenceBackend()
    exact = step.query.dtype == torch.float32
    tallies = []
    for runs in (backend, backend, reference):
        tallies.append(None if step.tally is None else step.tally.clone())
        mine = replace(step, tally=tallies[-1])
        got, want = runs.decode(mine), reference.decode(replace(step, tally=None))
        torch.testing.assert_close(got.out, want.out, rtol=1e-4 if exact else 1e-2, atol=1e-5 if exact else 1e-3)
        torch.testing.assert_close(got.mass, want.mass, rtol=1e-5, atol=1e-6)
        assert got.picks.shape[:-1] == want.picks.shape[:-1]
        assert got.weights.shape == got.picks.shape
        width = want.picks.shape[-1]
        assert (got.picks[..., width:] == -1).all()
        for mine_row, row in zip(weighed(got), weighed(want), strict=True):
            assert mine_row.keys() == row.keys()
            assert list(mine_row.values()) == pytest.approx([row[at] for at in mine_row], rel=1e-4, abs=1e-6)
    if step.tally is not None:
        assert torch.equal(tallies[0], tallies[2])
        assert torch.equal(tallies[2] - step.tally, (want.picks >= 0).flatten(1).sum(1))
    assert len(backend._workspaces) <= 1


@pytest.mark.parametrize("threshold", [None, 0.2])
def test_triton_growth_does_not_compile_kernels_anew(threshold: float | None, device: torch.device) -> None:
    """How many rows may be picked is a constant of the kernels: buffers of many capacities share a few."""
    backend = TritonBackend(device)
    widths = set()
    for capacity in range(64, 1025, 64):
        more = {} if threshold is None else {"threshold": threshold}
        found = backend.workspace(make_step(Policy(topn=512), device, length=60, capacity=capacity, **more))
        assert found is not None
        widths.add(found.width)
        assert found.width >= min(512, capacity)
    assert widths <= {64, 128, 256, 512, 1024, 2048, 4096}


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


def test_triton_steps_that_do_not_fit_the_card_run_in_torch(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tried = []

    def too_large(*args: Any, **kwargs: Any) -> Any:
        tried.append(args)
        raise OutOfResources(147456, 101376, "shared memory")

    for name in ("triton_decode", "dense_decode"):
        monkeypatch.setattr(f"kcache.backends.triton.backend.{name}", too_large)
    backend, step = TritonBackend(device), make_step(Policy(topn=9), device)
    for _ in range(2):
        result, want = backend.decode(step), ReferenceBackend().decode(step)
        torch.testing.assert_close(result.out, want.out)
        torch.testing.assert_close(backend.dense(step), ReferenceBackend().dense(step))
    assert backend.scratch == ()
    assert backend.workspace(step) is None, "the host has to wait for V before such a step"
    assert len(tried) == 2, "each is tried once"
    assert [record.message for record in caplog.records] == [
        f"a kernel wants 147456 bytes of shared memory and {device} has 101376: such steps run in torch operators"
    ] * 2


@pytest.mark.parametrize(
    ("capability", "problem", "reason"),
    [
        ((7, 5), None, r"cuda:0 has compute capability 7\.5, kernels need 8\.0"),
        (
            (8, 9),
            "RuntimeError: Failed to find C compiler.",
            r"triton cannot be used here \(RuntimeError: Failed",
        ),
    ],
)
def test_cards_without_kernels_run_torch_operators(
    capability: tuple[int, int], problem: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("kcache.machine.devices.driver_problem", lambda: problem)
    assert choose_backend("auto", card).name == "reference"
    with pytest.raises(PolicyError, match=reason):
        choose_backend("triton", card)


def test_kernels_are_not_for_rocm(monkeypatch: pytest.MonkeyPatch) -> None:
    card = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 4))
    monkeypatch.setattr("kcache.machine.devices.driver_problem", lambda: None)
    assert choose_backend("auto", card).name == "triton"
    monkeypatch.setattr(torch.version, "hip", "7.1")
    assert choose_backend("auto", card).name == "reference"
    with pytest.raises(PolicyError, match="ROCm"):
        choose_backend("triton", card)


def test_cards_with_kernels_run_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr("kcache.machine.devices.driver_problem", lambda: None)
    assert choose_backend("auto", torch.device("cuda", 0)).name == "triton"

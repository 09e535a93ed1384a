"""What is measured: the cross product, and what makes no sense to ask for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kcache.bench.cases import make_cases
from kcache.bench.engines import make_engine
from kcache.bench.spec import DEFAULT_ENGINES, ENGINES, Spec
from kcache.errors import InputError
from kcache.policy import Policy


def test_cross_product() -> None:
    spec = Spec(ctxs=(64, 32), batches=(2, 1), topns=(8, 16), engines=("kcache", "dense", "hf-static"))
    cases = make_cases(spec)
    assert [(case.ctx, case.batch) for case in cases] == [(32, 1), (32, 2), (64, 1), (64, 2)]
    for case in cases:
        assert [engine.label for engine in case.engines] == ["kcache N=8", "kcache N=16", "dense", "hf-static"]


def test_the_default_offloads_all_and_has_a_rival_first() -> None:
    spec = Spec()
    assert spec.policy.offload == "all"
    assert set(DEFAULT_ENGINES) < set(ENGINES)
    (engine, *_) = make_cases(spec)[0].engines
    assert engine.policy == Policy(offload="all")


def test_repeated_values_are_measured_once() -> None:
    assert Spec(ctxs=(64, 64), topns=(8, 8)).ctxs == (64,)
    assert len(make_cases(Spec(ctxs=(64,), topns=(8, 8), engines=("kcache",)))[0].engines) == 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engines": ("vllm",)}, "the engines are kcache, dense"),
        ({"engines": ()}, "engines is empty"),
        ({"ctxs": (0,)}, "ctxs must be"),
        ({"repeats": 0}, "repeats must be"),
        ({"steps": 0}, "steps must be"),
    ],
)
def test_bad_specs(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Spec(**changes)
    with pytest.raises(InputError):
        make_engine("vllm", Policy())


def test_dense_keeps_all_v_whatever_the_policy() -> None:
    engine = make_engine("dense", Policy(offload="all", resident_layers=1, kv_budget="1MiB"))
    assert engine.policy is not None
    assert (engine.policy.offload, engine.policy.resident_layers, engine.policy.kv_budget) == ("none", None, None)
    assert engine.topn is None


def test_who_cannot_run_without_cuda() -> None:
    cpu = torch.device("cpu")
    reasons = {name: make_engine(name, Policy()).unavailable(cpu) for name in ENGINES}
    assert [name for name, reason in reasons.items() if reason] == ["hf-offloaded"]
    assert make_engine("hf-offloaded", Policy()).unavailable(torch.device("cuda")) is None

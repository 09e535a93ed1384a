"""What cannot be recorded is decoded without, for a reason that is kept, and with the same tokens."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kcache.attaching import attach
from kcache.cache import KCache
from kcache.decoding.forward import prefill
from kcache.decoding.loop import decode, graph_of
from kcache.policy import Policy
from tests.graph.recorder import RecordedTape
from tests.graph.samplers import Forced
from tests.tiny_models import make, tokens

POLICY = Policy(
    topn=6, dense_below=0, dense_layers=0, resident_layers=0, offload="all", backend="triton", spread="even",
    tail="none", hot_rows=0,
)  # fmt: skip
SMALL = {"head_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
STEPS = 6


def run(
    model: PreTrainedModel, policy: Policy, make_tape: Callable[[], Any] | None
) -> tuple[KCache, list[torch.Tensor]]:
    """The cache, and the logits after each of the same few tokens."""
    cache = KCache(model, policy, max_length=40)
    cache.shared.make_tape = make_tape
    sampler = Forced(tokens(7, STEPS + 1, 1))
    with attach(model):
        *_, (logits, _) = prefill(model, cache, tokens(1, 1, 20), None)
        steps = decode(model, cache, logits, sampler, tokens(1, 1, 1))
        for _ in range(STEPS + 1):
            next(steps)
        steps.close()  # type: ignore[attr-defined]
    return cache, sampler.seen


def check(model: PreTrainedModel, reason: str, policy: Policy = POLICY, tape: Any = RecordedTape) -> None:
    """It is refused, and nothing is left of it: logits are those of a run that never recorded."""
    cache, got = run(model, policy, tape)
    _, want = run(model, policy, None)
    graph = graph_of(cache)
    assert graph is not None
    assert graph.replayed == 0
    assert graph.reason is not None
    assert reason in graph.reason
    assert len(got) == len(want) == STEPS + 1
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)


class Failing(RecordedTape):
    """Records half a step."""

    def record(self, step: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
        super().record(step, device)
        raise RuntimeError("operation not permitted when stream is capturing")


class Wrong(RecordedTape):
    """Replays something else than it recorded: the logits it leaves are those of another step."""

    def record(self, step: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
        self.logits = super().record(step, device)
        return self.logits

    def replay(self) -> None:
        super().replay()
        self.logits.mul_(1.2)


class Elsewhere(RecordedTape):
    """Replays with rows it should not have: V of another token gets to the row past the end, and into hot rows."""

    def replay(self) -> None:
        for function, arguments, *_ in self.operators:
            if function is torch.ops.aten.embedding.default:
                arguments[1].add_(7).remainder_(50)
        super().replay()


class Stuck(RecordedTape):
    """Forgets to count: replays with the length it was recorded at, as a length on the host would make it."""

    def record(self, step: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
        logits = super().record(step, device)
        self.first = logits.clone()
        self.logits = logits
        return logits

    def replay(self) -> None:
        super().replay()
        self.logits.copy_(self.first)


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make("llama", **SMALL)


@pytest.mark.parametrize(
    ("tape", "reason"),
    [
        (Failing, "not permitted when stream is capturing"),
        (Wrong, "logits were off"),
        (Stuck, "logits were off"),
        (Elsewhere, "logits were off"),
    ],
)
@pytest.mark.parametrize("hot_rows", [0, 32])
def test_triton_a_recording_that_fails_or_is_wrong_is_not_used(
    llama: PreTrainedModel, tape: Any, reason: str, hot_rows: int
) -> None:
    check(llama, reason, POLICY.replace(hot_rows=hot_rows), tape)


class Halfway(RecordedTape):
    """Fails when one layer of two is through."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.second: Any = model.get_decoder().layers[1]

    def record(self, step: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
        def fail(*_: Any) -> None:
            raise RuntimeError("out of memory")

        hook = self.second.register_forward_pre_hook(fail)
        try:
            return step()
        finally:
            hook.remove()


def test_triton_half_a_step_leaves_the_threshold_alone(llama: PreTrainedModel) -> None:
    policy = POLICY.replace(spread="need")
    check(llama, "out of memory", policy, lambda: Halfway(llama))
    caches = [run(llama, policy, tape)[0] for tape in (lambda: Halfway(llama), None)]
    mine, theirs = (cache.shared.spread.state[0] for cache in caches)  # type: ignore[union-attr]
    torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_other_backends_run_each_step(llama: PreTrainedModel, backend: Any) -> None:
    check(llama, f"is served by the {backend} backend", POLICY.replace(backend=backend))


def test_triton_sizes_the_kernels_do_not_take() -> None:
    check(make("llama", **{**SMALL, "head_dim": 8}), "do not take these sizes")


def test_triton_a_model_that_asks_the_device_for_a_value() -> None:
    """Dynamic rotary embeddings look at the largest position on the host, in every step."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    check(make("llama", rope_parameters=rope, **SMALL), "asks the device for a value")


def test_without_a_tape_or_with_the_policy_off_there_is_no_recording(llama: PreTrainedModel) -> None:
    assert graph_of(KCache(llama, POLICY)) is None
    assert KCache(llama, POLICY.replace(graph="off")).shared.make_tape is None


def test_a_device_without_triton_has_no_recording(llama: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    cache, got = run(llama, POLICY.replace(backend="reference"), RecordedTape)
    assert graph_of(cache) is None
    assert len(got) == STEPS + 1


def test_stock_caches_are_decoded_as_ever(llama: PreTrainedModel) -> None:
    from transformers import DynamicCache

    from kcache.decoding.forward import step_logits

    cache = DynamicCache(config=llama.config)
    logits = step_logits(llama, cache, tokens(1, 1, 5))
    steps = decode(llama, cache, logits, Forced(tokens(7, 3, 1)), tokens(1, 1, 1))
    assert [next(steps) for _ in range(3)] == tokens(7, 3, 1).tolist()
    assert cache.get_seq_length() == 7

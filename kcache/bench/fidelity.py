"""What TopN costs in answers: KL divergence and top-1 agreement with full attention, on a real text.

The reference prose (:mod:`kcache.bench.context`) is prefilled once, exactly. Its rows then fill a cache under each
policy, just as that policy's own prefill would have (prefill is always exact), and the text goes on token by token,
teacher-forced, through both. One sequence, :data:`STEPS` steps.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kcache.attention import attach
from kcache.bench.context import real_ids
from kcache.bench.engines import Engine
from kcache.cache import KCache
from kcache.generation import prefill, step_logits
from kcache.policy import Policy

if TYPE_CHECKING:
    from kcache.loading import LoadedModel

STEPS = 64


@dataclass(frozen=True)
class Fidelity:
    """Mean KL divergence from full attention, in nats, and share of steps with the same likeliest token."""

    kl: float
    top1: float


def measure_fidelity(
    lm: LoadedModel, engines: Sequence[Engine], ctx: int, watch: Callable[[str], None] = lambda label: None
) -> dict[Engine, Fidelity]:
    """Measure each engine's policy against full attention after ``ctx`` tokens of text.

    Where those and the steps together are longer than the model's context, the prompt is that much shorter.
    """
    if not engines:
        return {}
    room = ctx + STEPS if lm.context_length is None else max(STEPS + 1, min(ctx + STEPS, lm.context_length))
    ids = real_ids(lm, room, 1)
    prompt, forced = ids[:, :-STEPS], ids[:, -STEPS:]
    found: dict[Engine, Fidelity] = {}
    with attach(lm.model):
        watch(f"context {ctx:,} · fidelity: full attention")
        full = KCache(lm.model, Policy(offload="none"), max_length=room)
        for _ in prefill(lm.model, full, prompt, None):
            pass
        caches = {engine: _refilled(lm, full, engine.policy or Policy(), prompt) for engine in engines}
        wanted = _forced(lm, full, forced)
        for engine, cache in caches.items():
            watch(f"context {ctx:,} · fidelity: {engine.label}")
            found[engine] = _compare(wanted, _forced(lm, cache, forced))
    return found


def _refilled(lm: LoadedModel, full: KCache, policy: Policy, prompt: torch.Tensor) -> KCache:
    """Make a cache under ``policy`` that holds what ``full`` holds, or prefill it if a layer cannot be copied."""
    cache = KCache(lm.model, policy, max_length=full.shared.max_length)
    if len(full.tiered_layers) < len(full.layers):
        for _ in prefill(lm.model, cache, prompt, None):
            pass
        return cache
    for index, layer in enumerate(full.tiered_layers):
        assert layer.keys is not None and layer.values is not None
        cache.update(layer.keys, layer.values, index)
    return cache


def _forced(lm: LoadedModel, cache: KCache, forced: torch.Tensor) -> torch.Tensor:
    """Log-probabilities ``[T, vocabulary]`` fp32 after each of the tokens ``[1, T]``, fed one by one."""
    steps = [step_logits(lm.model, cache, token)[0].float().log_softmax(-1) for token in forced.split(1, dim=1)]
    return torch.stack(steps)


def _compare(wanted: torch.Tensor, got: torch.Tensor) -> Fidelity:
    kl = (wanted.exp() * (wanted - got)).sum(-1).mean()
    top1 = (wanted.argmax(-1) == got.argmax(-1)).float().mean()
    return Fidelity(float(kl), float(top1))

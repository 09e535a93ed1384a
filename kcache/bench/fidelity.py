"""What TopN costs in answers, beside its speed: KL and top-1 agreement with full attention at one place of a text.

The text is the reference prose (:mod:`kcache.bench.context`); how it is measured is in :mod:`kcache.evaluate.fidelity`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kcache.bench.context import real_ids
from kcache.bench.engines import Engine
from kcache.evaluate.fidelity import Case, measure
from kcache.evaluate.places import Place
from kcache.policy import Policy

if TYPE_CHECKING:
    from kcache.models.loaded import LoadedModel

STEPS = 64


@dataclass(frozen=True)
class Fidelity:
    """Mean KL divergence from full attention, in nats, and share of steps with the same likeliest token."""

    kl: float
    top1: float


def measure_fidelity(
    lm: LoadedModel, engines: Sequence[Engine], ctx: int, watch: Callable[[str], None] = lambda label: None
) -> dict[Engine, Fidelity]:
    """Measure each engine's policy against full attention over :data:`STEPS` steps after ``ctx`` tokens of text.

    Where those and the steps together are longer than the model's context, the prompt is that much shorter.
    """
    if not engines:
        return {}
    steps = STEPS if lm.context_length is None else min(STEPS, lm.context_length // 2)
    room = ctx + steps if lm.context_length is None else min(ctx + steps, lm.context_length)
    cases = [Case(engine.label, engine.policy or Policy()) for engine in engines]
    found = measure(
        lm,
        Place(0, real_ids(lm, room + 1, 1)),
        steps,
        cases,
        lambda label: watch(f"context {ctx:,} · fidelity: {label}"),
    )
    figures = [Fidelity(statistics.fmean(at.kl), at.top1) for _, at in found]
    return dict(zip(engines, figures, strict=True))

"""What a benchmark measures: the cross product of contexts, batches and engines, and how often.

A case is one context and batch; its engines take turns. TopN multiplies only the kcache engine: the others do not
read it, so one measurement of them serves every N of the case.
"""

from __future__ import annotations

from dataclasses import dataclass

from kcache.bench.engines import Engine, make_engine
from kcache.bench.spec import Spec


@dataclass(frozen=True)
class Case:
    """One context and batch, and the engines that meet there."""

    ctx: int
    batch: int
    engines: tuple[Engine, ...]

    @property
    def label(self) -> str:
        """The case in words."""
        return f"context {self.ctx:,} · batch {self.batch}"


def make_cases(spec: Spec) -> list[Case]:
    """Return all cases, the cheap ones first."""
    engines = tuple(
        make_engine(name, spec.policy.replace(topn=topn))
        for name in spec.engines
        for topn in (spec.topns if name == "kcache" else spec.topns[:1])
    )
    return [Case(ctx, batch, engines) for ctx in sorted(spec.ctxs) for batch in sorted(spec.batches)]

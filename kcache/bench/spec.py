"""What is asked of a benchmark, checked before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass, field

from kcache.errors import InputError
from kcache.policy import Policy

ENGINES = ("kcache", "dense", "hf-dynamic", "hf-static", "hf-offloaded")
DEFAULT_ENGINES = ("kcache", "dense", "hf-static", "hf-dynamic")


def check_engine(name: str) -> None:
    """Raise :class:`InputError` if there is no engine called ``name``."""
    if name not in ENGINES:
        raise InputError(f"no engine {name!r}; the engines are {', '.join(ENGINES)}")


@dataclass(frozen=True)
class Spec:
    """What to measure.

    Attributes
    ----------
    ctxs, batches, topns : tuple of int
        Contexts in tokens, sequences decoded together, rows fetched per KV head.
    engines : tuple of str
        Names out of ``ENGINES``; the first that is not ours is what ratios refer to.
    policy : Policy
        Of the kcache engine; its ``topn`` is replaced by each of ``topns``.
    repeats, steps, warmup : int
        Turns per engine, decode steps timed per turn, and steps run before them that are not.
    turn_s : float
        A turn that takes longer ends once it has four steps, so that long contexts do not take forever.
    case_s : float or None
        A case that takes longer ends after the round of turns it is in, but not before the second; None is no limit.
    real_prefill : bool
        Run a real text through the model instead of filling the caches with random rows.
    fidelity : bool
        Measure KL and top-1 agreement with full attention too.
    check_plan : bool
        Put what :mod:`kcache.planning.plan` predicts beside what is measured.
    """

    ctxs: tuple[int, ...] = (2048, 8192)
    batches: tuple[int, ...] = (1,)
    topns: tuple[int, ...] = (Policy.topn,)
    engines: tuple[str, ...] = DEFAULT_ENGINES
    policy: Policy = field(default_factory=lambda: Policy(offload="all"))
    repeats: int = 5
    steps: int = 16
    warmup: int = 1
    turn_s: float = 3.0
    case_s: float | None = None
    real_prefill: bool = False
    fidelity: bool = False
    check_plan: bool = False

    def __post_init__(self) -> None:
        for name in ("ctxs", "batches", "topns", "engines"):
            values = getattr(self, name)
            if not values:
                raise InputError(f"{name} is empty; give at least one")
            object.__setattr__(self, name, tuple(dict.fromkeys(values)))
        for name in ("ctxs", "batches", "topns"):
            if any(value < 1 for value in getattr(self, name)):
                raise InputError(f"{name} must be whole numbers of at least 1, got {getattr(self, name)}")
        for name, least in (("repeats", 1), ("steps", 1), ("warmup", 0)):
            if getattr(self, name) < least:
                raise InputError(f"{name} must be at least {least}, got {getattr(self, name)}")
        for name in self.engines:
            check_engine(name)

    @property
    def new_tokens(self) -> int:
        """Tokens decoded after the context by each engine."""
        return 2 + (self.repeats + 1) * (self.steps + max(1, self.warmup))

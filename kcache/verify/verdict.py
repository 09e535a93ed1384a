"""What became of one architecture: its verdict, and the reason in one line. Plain data, so it crosses processes."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

Kind = Literal["exact", "exact, stock layers", "refused", "differs", "crashed"]
KINDS: tuple[Kind, ...] = get_args(Kind)
"""Best first. The last two are never acceptable."""


@dataclass(frozen=True)
class Verdict:
    """The outcome for one model type or model.

    Attributes
    ----------
    model_type : str
        Its key in transformers' mapping, or the name a model was given by.
    model_class : str
        The class that was run.
    kind : Kind
        ``exact``: every layer is tiered, and nothing differs from stock. ``exact, stock layers``: some layers, or
        all, keep the cache that transformers makes for them. ``refused``: a user is told the reason when loading.
        ``differs`` and ``crashed`` are faults of kcache's.
    reason : str
        One line: why layers are not tiered, why it is refused, or what went wrong.
    tiered, layers : int
        Layers of the cache that are tiered, and all.
    difference : float or None
        Largest difference of two logits, of the largest logit; None where nothing was compared.
    tokens : bool or None
        Whether all greedy tokens agreed.
    seconds : float
    """

    model_type: str
    model_class: str
    kind: Kind
    reason: str = ""
    tiered: int = 0
    layers: int = 0
    difference: float | None = None
    tokens: bool | None = None
    seconds: float = 0.0

    @property
    def acceptable(self) -> bool:
        """Whether kcache is right about this model, be it that it refuses it."""
        return self.kind not in ("differs", "crashed")

    @property
    def exact(self) -> bool:
        """Whether the model is served, exactly."""
        return self.kind.startswith("exact")

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values."""
        return asdict(self)

"""Where the rows go: how many V rows each layer and KV head fetches of a budget that is the same for all of them.

Attention is sharp in some heads and diffuse in others, so the same N everywhere is too many rows here and too few
there. With ``spread="need"`` a row is fetched when its probability is above a threshold, one for all layers and heads
of a sequence, and the threshold follows the rows it lets through: after each step it grows or shrinks so that
``topn`` rows per KV head are fetched on average. Probabilities sum to one, so no head can ask for many more rows than
one over the threshold.
"""

from __future__ import annotations

import torch

from kcache.parallel import ALONE, Ranks
from kcache.policy import Policy

GAIN = 0.5
"""How fast the threshold follows: its logarithm moves by this times the relative error of the last step's rows."""
MOST = 8
"""A head fetches at most this many times ``topn`` rows in a step."""


class Spread:
    """The thresholds of one cache's sequences, ``[B]`` fp32; a sequence's own does not depend on the rest of its batch.

    Decode steps come layer by layer: the first layer of a step closes the one before.
    """

    def __init__(self, policy: Policy, ranks: Ranks = ALONE) -> None:
        self._policy = policy
        self._ranks = ranks
        self._threshold: torch.Tensor | None = None
        self._rows: torch.Tensor | None = None
        self._heads = 0
        self._latest = -1

    def threshold(self, layer: int, batch: int, device: torch.device) -> torch.Tensor:
        """Return the least probability worth a row in this step of layer number ``layer``, ``[B]`` fp32."""
        if layer <= self._latest:
            self._follow()
        self._latest = layer
        if self._threshold is None or len(self._threshold) != batch:
            self._threshold = torch.full((batch,), 1 / (4 * self._policy.topn), device=device)
            self._rows = None
        return self._threshold.to(device)

    def note(self, counts: torch.Tensor, heads: int) -> None:
        """Take in what one layer fetched: rows per sequence ``[B]`` over so many heads."""
        assert self._threshold is not None
        counts = counts.to(self._threshold.device)
        self._rows = counts if self._rows is None else self._rows + counts
        self._heads += heads

    def select(self, index: torch.Tensor) -> None:
        """Keep the sequences ``index`` ``[B']``, in that order."""
        for name in ("_threshold", "_rows"):
            held = getattr(self, name)
            if held is not None:
                setattr(self, name, held.index_select(0, index.to(held.device)))

    def _follow(self) -> None:
        if self._threshold is None or self._rows is None:
            return
        rows = self._ranks.total(self._rows)  # where the heads are shared out, the threshold is still one for all
        error = rows / (self._heads * self._ranks.size * self._policy.topn) - 1
        self._threshold = self._threshold * torch.exp(GAIN * error.clamp(max=2))
        self._rows, self._heads = None, 0


def spread_of(policy: Policy, ranks: Ranks = ALONE) -> Spread | None:
    """Return the thresholds a policy asks for; None when rows are spread evenly."""
    return Spread(policy, ranks) if policy.spread == "need" else None

"""Where the rows go: how many V rows each layer and KV head fetches of a budget that is the same for all of them.

Attention is sharp in some heads and diffuse in others, so the same N everywhere is too many rows here and too few
there. With ``spread="need"`` a row is fetched when its probability is above a threshold, one for all layers and heads
of a sequence, and the threshold follows the rows it lets through: after each step it grows or shrinks so that
``topn`` rows per KV head are fetched on average. Probabilities sum to one, so no head can ask for many more rows than
one over the threshold.
"""

from __future__ import annotations

import torch

from kcache.machine.parallel import ALONE, Ranks
from kcache.policy import Policy

GAIN = 0.5
"""How fast the threshold follows: its logarithm moves by this times the relative error of the last step's rows."""


class Spread:
    """The thresholds of one cache's sequences, ``[B]`` fp32; a sequence's own does not depend on the rest of its batch.

    Decode steps come layer by layer: the first layer of a step closes the one before. Rows are counted where they are
    picked, in a tally per layer that only grows; nothing here waits for the device but :meth:`fetched`. Tensors change
    in place, so a captured step goes on from where the last replay left them.
    """

    def __init__(self, policy: Policy, ranks: Ranks = ALONE) -> None:
        self._policy = policy
        self._ranks = ranks
        self._threshold: torch.Tensor | None = None
        self._tallies: dict[int, torch.Tensor] = {}
        self._closed: torch.Tensor | None = None
        self._before: dict[int, int] = {}
        self._heads = 0
        self._latest = -1

    def begin(self, layer: int, heads: int, batch: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Begin this step of layer number ``layer``, of so many heads that pick.

        Returns
        -------
        threshold : Tensor ``[B]`` fp32
            The least probability worth a row.
        tally : Tensor ``[B]`` int64
            To which the rows picked for each sequence are to be added.
        """
        if layer <= self._latest:
            self._follow()
        self._latest = layer
        self._heads += heads
        if self._threshold is None or len(self._threshold) != batch:
            self._settle()
            self._heads = heads
            with torch.inference_mode(False):
                self._threshold = torch.full((batch,), 1 / (4 * self._policy.topn), device=device)
                self._closed = torch.zeros(batch, dtype=torch.int64, device=device)
        if layer not in self._tallies:
            with torch.inference_mode(False):
                self._tallies[layer] = torch.zeros(batch, dtype=torch.int64, device=device)
        return self._threshold.to(device), self._tallies[layer]

    def begun(self, layer: int) -> bool:
        """Whether a layer's next step finds all that :meth:`begin` would otherwise make."""
        return self._heads > 0 and layer in self._tallies

    @property
    def place(self) -> tuple[int, int]:
        """How far this step has come, which :attr:`state` does not say."""
        return self._heads, self._latest

    def go_back(self, place: tuple[int, int]) -> None:
        """Be where a step that was not completed began."""
        self._heads, self._latest = place

    @property
    def state(self) -> list[torch.Tensor]:
        """What a step changes in place."""
        held = (self._threshold, self._closed, *self._tallies.values())
        return [tensor for tensor in held if tensor is not None]

    def fetched(self, layer: int) -> int:
        """Rows that a layer picked since the cache was made or reset; waits for the device."""
        tally = self._tallies.get(layer)
        return self._before.get(layer, 0) + (0 if tally is None else int(tally.sum()))

    def select(self, index: torch.Tensor) -> None:
        """Keep the sequences ``index`` ``[B']``, in that order."""
        if self._threshold is None or self._closed is None:
            return
        index = index.to(self._threshold.device)
        with torch.inference_mode(False):
            open_rows = self._total() - self._closed
            self._threshold = self._threshold.index_select(0, index)
            self._closed = -open_rows.index_select(0, index)
            self._settle()

    def _settle(self) -> None:
        """Take the tallies' totals to the host; they begin anew."""
        self._before = {layer: self.fetched(layer) for layer in {*self._before, *self._tallies}}
        self._tallies = {}

    def _total(self) -> torch.Tensor:
        """Rows of all layers per sequence, ``[B]`` int64."""
        assert self._closed is not None
        if not self._tallies:
            return torch.zeros_like(self._closed)
        return torch.stack([tally.to(self._closed.device) for tally in self._tallies.values()]).sum(0)

    def _follow(self) -> None:
        if self._threshold is None or self._closed is None or not self._heads:
            return
        total = self._total()
        rows = self._ranks.total(total - self._closed)  # where heads are shared out, the threshold is one for all
        error = rows.to(self._threshold.device) / (self._heads * self._ranks.size * self._policy.topn) - 1
        self._threshold.mul_(torch.exp(GAIN * error.clamp(max=2)))
        self._closed.copy_(total)
        self._heads = 0


def spread_of(policy: Policy, ranks: Ranks = ALONE) -> Spread | None:
    """Return the thresholds a policy asks for; None when rows are spread evenly."""
    return Spread(policy, ranks) if policy.spread == "need" else None

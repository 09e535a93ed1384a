"""What a decode step is given, and what it leaves, of the whole batch or of a slice of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kcache.lowrank import LowRank


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What :func:`triton_decode` was given, of the whole batch or of a slice of it."""

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    length: torch.Tensor
    scaling: float
    out: torch.Tensor
    lowrank: LowRank | None = None
    mask: torch.Tensor | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    threshold: torch.Tensor | None = None
    tally: torch.Tensor | None = None
    key_scales: torch.Tensor | None = None
    value_scales: torch.Tensor | None = None

    def of(self, first: int, last: int) -> StepInputs:
        """The sequences ``first:last``."""

        def part(tensor: torch.Tensor | None) -> torch.Tensor | None:
            return None if tensor is None else tensor[first:last]

        tail = self.lowrank
        if tail is not None:
            tail = LowRank(tail.base[first:last], tail.basis[first:last], tail.coefficients[first:last])
        return StepInputs(
            self.query[first:last], self.keys[first:last], self.values[first:last], self.length, self.scaling,
            self.out[first:last], tail, part(self.mask), self.softcap, self.sinks, part(self.threshold),
            part(self.tally), part(self.key_scales), part(self.value_scales),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class Results:
    """What a step leaves beside its output.

    Picks ``[R, width]`` int32, and the probability they hold, fp32: together ``[R, G]``, and each, mean over heads,
    ``[R, width]``.
    """

    picks: torch.Tensor
    mass: torch.Tensor
    weights: torch.Tensor

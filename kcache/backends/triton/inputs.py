"""What a decode step is given, and what it leaves."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kcache.backends.base import LowRank, NarrowKeys


@dataclass(frozen=True, slots=True)
class StepInputs:
    """What :func:`triton_decode` was given."""

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
    narrow: NarrowKeys | None = None
    value_scales: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class Results:
    """What a step leaves beside its output.

    Picks ``[R, width]`` int32, and the probability they hold, fp32: together ``[R, G]``, and each, mean over heads,
    ``[R, width]``.
    """

    picks: torch.Tensor
    mass: torch.Tensor
    weights: torch.Tensor

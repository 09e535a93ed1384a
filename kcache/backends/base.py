"""What a backend is: the four verbs of a decode step over one layer.

``score`` takes q and K to probabilities, ``select`` picks N positions per KV head, ``fetch`` brings their V rows to
the device, ``combine`` makes the layer's output of them and of the tail. The torch reference defines what is right;
every other backend is tested equal to it.

Shapes: B sequences, Hq query heads, Hkv KV heads, G = Hq / Hkv, L rows, D and Dv head sizes, N picks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from kcache.policy import Policy

MOST = 8
"""With a threshold a head fetches at most this many times ``topn`` rows in a step."""


@dataclass(frozen=True, slots=True)
class LowRank:
    """What a decode step needs to know of the tail.

    Attributes
    ----------
    base : Tensor ``[B, Hkv, Dv]`` fp32
    basis : Tensor ``[B, Hkv, r, Dv]`` fp32
        Orthonormal rows.
    coefficients : Tensor ``[B, Hkv, r, capacity]``
        In V's dtype. Columns not yet used hold anything finite.
    """

    base: torch.Tensor
    basis: torch.Tensor
    coefficients: torch.Tensor

    def rows(self, length: int) -> torch.Tensor:
        """Return the approximation of the first ``length`` rows, ``[B, Hkv, length, Dv]`` fp32."""
        coefficients = self.coefficients[..., :length].float()
        return self.base.unsqueeze(2) + torch.matmul(coefficients.transpose(2, 3), self.basis)


class HotStore(Protocol):
    """Recently fetched V rows of one layer, kept on the device by the backend that made it.

    Attributes
    ----------
    hits : Tensor ``[B, Hkv]`` int64
        Picks found in it since it was made.
    """

    hits: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes it takes."""
        ...

    def forget(self) -> None:
        """Forget every row: positions are about to mean others."""
        ...


@dataclass(frozen=True, slots=True)
class NarrowKeys:
    """What belongs to K in 8 bits (:mod:`kcache.tiers.bytes`), all on the device.

    Attributes
    ----------
    scales : Tensor ``[B, Hkv, capacity]`` fp32
        What a row of whole numbers is to be multiplied by.
    centre : Tensor ``[B, Hkv, D]`` fp32, contiguous
        What is then to be added.
    lower : Tensor ``[B, Hkv, capacity, D]`` int8, laid out like K, or None
        What rounding has left: picks are weighed by both.
    """

    scales: torch.Tensor
    centre: torch.Tensor
    lower: torch.Tensor | None = None

    def tensors(self) -> list[torch.Tensor]:
        """Those there are."""
        return [self.scales, self.centre, *([] if self.lower is None else [self.lower])]


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One layer's inputs to a TopN decode step.

    Attributes
    ----------
    query : Tensor ``[B, Hq, D]``
    keys : Tensor ``[B, Hkv, capacity, D]``
        The whole K buffer on the device; rows from ``length`` on are not valid memory. int8 with ``narrow``.
    narrow : NarrowKeys or None
        What belongs to K in 8 bits.
    values : Tensor ``[B, Hkv, capacity, Dv]``
        The whole V buffer in the host tier (pinned where there is a CUDA device); for ``dense``, on the device.
        int8 with ``value_scales``.
    length : int
        Rows in the cache, the new token's included.
    scaling : float
    policy : Policy
    lowrank : LowRank or None
        What each row is in a few directions, with ``policy.tail == "lowrank"``.
    mask : Tensor ``[B, L]`` bool or None
        True where a row may be attended.
    softcap : float or None
    sinks : Tensor ``[Hq]`` or None
        Attention sinks: one extra logit per head that takes mass and carries no value.
    threshold : Tensor ``[B]`` fp32 or None
        Pick the rows whose probability is above it, at most :data:`MOST` times ``topn`` per head;
        with None, exactly ``topn`` rows.
    tally : Tensor ``[B]`` int64 or None
        With a threshold, the backend adds the rows it picked for each sequence, all heads together.
    value_scales : Tensor ``[B, Hkv, capacity]`` fp32 or None
        On the device: what a row of whole numbers is to be multiplied by.
    hot : HotStore or None
        What :meth:`Backend.keep_hot` made for this layer: picks found there need not be fetched.
    device_length : Tensor ``[1]`` int32 or None
        The length, where only the device knows it: ``length`` is then the most it may be. For kernels alone.
    """

    query: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    length: int
    scaling: float
    policy: Policy
    lowrank: LowRank | None = None
    mask: torch.Tensor | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    threshold: torch.Tensor | None = None
    tally: torch.Tensor | None = None
    hot: HotStore | None = None
    device_length: torch.Tensor | None = None
    narrow: NarrowKeys | None = None
    value_scales: torch.Tensor | None = None


@dataclass(frozen=True, slots=True)
class DecodeResult:
    """One layer's output of a TopN decode step.

    Attributes
    ----------
    out : Tensor ``[B, Hq, Dv]``
        In the query's dtype.
    picks : Tensor ``[B, Hkv, N]`` or, picked per query head, ``[B, Hkv, G, N]``
        With a threshold N is at least the largest number any head picked, and what heads did not pick is -1.
    mass : Tensor ``[B, Hkv, G]`` fp32
        Probability the picks hold, per query head.
    weights : Tensor of the shape of ``picks``, fp32
        Probability of each pick, mean over the query heads it was made for; anything where a pick is -1.
    """

    out: torch.Tensor
    picks: torch.Tensor
    mass: torch.Tensor
    weights: torch.Tensor


def count_picks(picks: torch.Tensor, step: DecodeStep) -> None:
    """Add picks, filled up with -1, to the step's tally."""
    if step.tally is not None:
        step.tally.add_((picks >= 0).flatten(1).sum(1))


class Backend(Protocol):
    """Computes decode steps of one token. An instance belongs to one cache and may keep scratch memory between steps.

    ``reads_host_by_kernel`` tells that the host tier is read by the device itself, in stream order, and not by torch
    operators on the host.
    """

    name: str
    reads_host_by_kernel: bool

    def decode(self, step: DecodeStep) -> DecodeResult:
        """Run score, select, fetch and combine for one layer."""
        ...

    def keep_hot(self, step: DecodeStep) -> HotStore | None:
        """Make a store of hot rows for the layer of this step; None where V is as near anyway."""
        ...

    def dense(self, step: DecodeStep) -> torch.Tensor:
        """Attend exactly, with V on the device (``step.values``); returns ``[B, Hq, Dv]`` in the query's dtype."""
        ...

"""The floor of a decode step: the bytes it cannot do without, over the bandwidths this machine was measured to have.

A step reads the weights and K once, writes and reads the scores once, reads what is resident of V and of the tail, and
brings N rows per KV head over the link. Each engine is held to its own floor: full attention owes all of V, and a
cache that lives in RAM owes the link all of K and V.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kcache.layers.tiered import TieredLayer
from kcache.models.weights import Weights
from kcache.planning.plan import SCORE_BYTES, SCORE_PASSES, Speeds
from kcache.planning.sizes import tail_unit


class Bandwidths(Speeds, Protocol):
    """What of :class:`kcache.speed.machine.Machine` is needed for floors and predictions."""

    @property
    def h2d_gb_s(self) -> float | None:
        """Large copies over the link; None where both tiers are RAM."""


@dataclass(frozen=True)
class Traffic:
    """Bytes one decode step moves at least.

    Attributes
    ----------
    weights_bytes, k_bytes, v_bytes, score_bytes, tail_bytes : int
        Over the memory of the device.
    link_bytes : float
        Over the link, as counted.
    link_in_bulk : bool
        Whether those are large copies, and not single rows.
    """

    weights_bytes: int
    k_bytes: int
    v_bytes: int
    score_bytes: int
    tail_bytes: int
    link_bytes: float
    link_in_bulk: bool = False

    @property
    def memory_bytes(self) -> int:
        """All that crosses the device's memory bus."""
        return self.weights_bytes + self.k_bytes + self.v_bytes + self.score_bytes + self.tail_bytes


@dataclass(frozen=True)
class Floor:
    """What a step's bytes take on this machine.

    Attributes
    ----------
    memory_ms, link_ms : float
        The two parts. They add, since a fetch waits for its selection; what is fetched while other rows are still
        scored hides a little of the second.
    """

    memory_ms: float
    link_ms: float

    @property
    def ms(self) -> float:
        """The whole step."""
        return self.memory_ms + self.link_ms


def floor_of(traffic: Traffic, machine: Bandwidths) -> Floor:
    """Return the floor of a step."""
    link = machine.gather_gb_s
    if traffic.link_in_bulk and machine.h2d_gb_s is not None:
        link = machine.h2d_gb_s
    return Floor(traffic.memory_bytes / machine.memory_gb_s / 1e6, traffic.link_bytes / link / 1e6)


def traffic_of(model: PreTrainedModel, cache: Cache, link_bytes: float) -> Traffic:
    """Bytes of a decode step of ``model`` with ``cache`` as it now is, beside ``link_bytes`` that were counted.

    What a cache offloads whole must still be read once it has arrived.
    """
    length, batch, k, v, score, tail = int(cache.get_seq_length()), 1, 0, 0, 0, 0
    for layer in cache.layers:
        if isinstance(layer, TieredLayer):
            if not layer.length:
                continue
            batch, k = layer.batch_size, k + layer.key_bytes
            rows_bytes, dim = _value_bytes(layer)
            if layer.mode == "topn":
                assert layer.mass is not None
                score += SCORE_PASSES * SCORE_BYTES * layer.mass.numel() * length
                tail += tail_unit(layer.shared.policy, rows_bytes, dim)[0]
            else:
                v += rows_bytes
            continue
        keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
        if not isinstance(keys, torch.Tensor) or not isinstance(values, torch.Tensor):
            continue
        batch = keys.shape[0]
        used = min(1.0, length / keys.shape[2])
        k += int(keys.nbytes * used)
        v += int(values.nbytes * used)
    return Traffic(
        weights_bytes=Weights.of_model(model).read_bytes(batch),
        k_bytes=k,
        v_bytes=v,
        score_bytes=score,
        tail_bytes=tail,
        link_bytes=link_bytes,
        link_in_bulk=bool(getattr(cache, "offloading", False)),
    )


def _value_bytes(layer: TieredLayer) -> tuple[int, int]:
    """Bytes of V of the tokens held, as attention reads them, and its head size: without a look at a row."""
    batch, heads, _, dim = layer.buffers().values.shape
    return batch * heads * layer.length * dim * layer.dtype.itemsize, dim

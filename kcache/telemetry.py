"""What a cache counts, and the immutable picture of one step that viewers read.

Counters are plain integers computed from shapes where the bytes move, or sums that the device keeps, so counting never
waits for it. Reading those sums does, and a snapshot copies the last step's picks to the host: only whoever asks pays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import numpy as np

LayerKind = Literal["tiered", "resident", "stock"]
StepMode = Literal["idle", "prefill", "dense", "topn"]


@dataclass(frozen=True)
class Stats:
    """Totals of a cache since it was made or last reset.

    Attributes
    ----------
    bytes_h2d, bytes_d2h : int
        Bytes moved over the link, host to device and device to host. On a host-only run both tiers are RAM and the
        same bytes are counted.
    rows_fetched : int
        V rows that decode steps took from the host tier, hot rows included.
    hot_hits : int
        Those of them that were found in device memory and did not cross the link.
    device_bytes, host_bytes : int
        Bytes now held in either tier: K, resident V and policy overhead; offloaded V.
    k_bytes, resident_v_bytes, overhead_bytes : int
        What ``device_bytes`` is made of.
    full_kv_bytes : int
        What a full KV cache with room for as many tokens as there is room for here would take on the device.
    steps : int
        Decode steps run.
    tokens : int
        Tokens now in the cache (the longest layer's length).
    hot_bytes : int
        What of ``overhead_bytes`` is rows that were fetched lately and kept on the device.
    """

    bytes_h2d: int = 0
    bytes_d2h: int = 0
    rows_fetched: int = 0
    hot_hits: int = 0
    device_bytes: int = 0
    host_bytes: int = 0
    k_bytes: int = 0
    resident_v_bytes: int = 0
    overhead_bytes: int = 0
    full_kv_bytes: int = 0
    steps: int = 0
    tokens: int = 0
    hot_bytes: int = 0


@dataclass(frozen=True)
class LayerSnapshot:
    """One layer of a :class:`StepSnapshot`.

    ``picks`` are the picked positions of the last decode step, ``[B, Hkv, N]`` (``[B, Hkv, G, N]`` when picked per
    query head), in no order; heads that picked fewer than others are filled up with -1. ``mass`` is the share of
    attention they hold per query head, ``[B, Hkv, G]``, ``weights`` what each of them holds, in the shape of ``picks``,
    mean over the query heads it was picked for and 0 where a pick is -1; all ``None`` when the last step was not a TopN
    step, or rows have been removed or reordered since. Arrays are read-only.
    """

    index: int
    kind: LayerKind
    mode: StepMode
    stats: Stats
    picks: np.ndarray | None = field(default=None, compare=False)
    mass: np.ndarray | None = field(default=None, compare=False)
    weights: np.ndarray | None = field(default=None, compare=False)


@dataclass(frozen=True)
class StepSnapshot:
    """The state of a cache after its latest forward: totals, and the same per layer."""

    step: int
    tokens: int
    batch: int
    stats: Stats
    layers: tuple[LayerSnapshot, ...]

"""What a layer of a cache counts, and what its latest step picked: the part of a layer that viewers see."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

import torch
from transformers.cache_utils import CacheLayerMixin

from kcache.layers.shared import Shared
from kcache.planning.sizes import SCALE_BYTES
from kcache.telemetry import Stats, StepMode
from kcache.tiers.bytes import ByteRows
from kcache.tiers.rows import RowBuffer
from kcache.tiers.values import ValueStore


class Picked(NamedTuple):
    """What a step picked, or would have: as in :class:`~kcache.backends.base.DecodeResult`."""

    picks: torch.Tensor
    mass: torch.Tensor
    weights: torch.Tensor


class CountedLayer(CacheLayerMixin):
    """The counters of a layer that keeps K and V of ``length`` tokens.

    Attributes
    ----------
    mode : {"idle", "prefill", "dense", "topn"}
        How the latest forward attended.
    picked : Picked or None
        What it picked; None where it picked nothing.
    steps : int
        Decode steps run.
    """

    index: int
    shared: Shared
    length: int
    _k: RowBuffer | ByteRows | None
    _v: ValueStore | None

    def _begin_to_count(self) -> None:
        self.mode: StepMode = "idle"
        self.picked: Picked | None = None
        self.steps = self._even_rows = 0

    def _note(self, mode: StepMode, picked: Picked | None = None) -> None:
        """Note how the latest forward attended, and count the rows of a step that fetched some.

        Rows of a step that picked as many as it needed are tallied on the device.
        """
        self.mode, self.picked = mode, picked
        if mode == "topn" and picked is not None and not self.follows_threshold(self.length):
            picks = picked.picks
            self._even_rows += picks[..., 0].numel() * min(picks.shape[-1], self.length)

    @property
    def picks(self) -> torch.Tensor | None:
        """The latest step's picks ``[B, Hkv, N]`` or ``[B, Hkv, G, N]``; None where there are none."""
        return None if self.picked is None else self.picked.picks

    @property
    def mass(self) -> torch.Tensor | None:
        """What they hold of each query head's attention, ``[B, Hkv, G]`` fp32."""
        return None if self.picked is None else self.picked.mass

    @property
    def weights(self) -> torch.Tensor | None:
        """What each of them holds, in the shape of ``picks``, fp32."""
        return None if self.picked is None else self.picked.weights

    @property
    def batch_size(self) -> int:
        """Sequences in the layer, or -1 while empty."""
        return -1 if self._k is None or self._k.data is None else self._k.data.shape[0]

    def follows_threshold(self, length: int) -> bool:
        """Whether a step over ``length`` rows picks by a threshold: where there is one, and something to choose."""
        return self.shared.spread is not None and self.shared.policy.topn < length

    @property
    def key_bytes(self) -> int:
        """Bytes of K of the tokens held, which a decode step reads."""
        if self._k is None or self._k.data is None:
            return 0
        scale = SCALE_BYTES if isinstance(self._k, ByteRows) else 0
        return self.batch_size * self._k.heads * (self._k.row_bytes + scale) * self.length

    @property
    def rows_fetched(self) -> int:
        """V rows that decode steps took from the host tier; waits for the device, which counts them."""
        spread = self.shared.spread
        return self._even_rows + (0 if spread is None else spread.fetched(self.index))

    def stats(self) -> Stats:
        """Counters and bytes of this layer."""
        return Stats(*self.counts())

    def counts(self) -> tuple[int, ...]:
        """The values of :meth:`stats` in the order of its fields: all that a frame needs of them, and quicker."""
        if self._k is None or self._v is None:
            return (0,) * len(fields(Stats))
        k_bytes = self._k.nbytes + (self._k.scale_bytes if isinstance(self._k, ByteRows) else 0)
        resident, overhead = self._v.resident_bytes, self._v.overhead_bytes
        v = self._v.host or self._v.resident
        rows, hits = self.rows_fetched, self._v.hot_hits
        row_bytes = 0 if self._v.host is None else self._v.host.row_bytes
        per_token = 0
        if v is not None:
            per_token = self._k.places * (self._k.heads * self._k.full_row_bytes + v.heads * v.full_row_bytes)
        return (
            self._v.bytes_h2d + (rows - hits) * row_bytes,
            self._v.bytes_d2h,
            rows,
            hits,
            k_bytes + resident + overhead,
            self._v.host_bytes,
            k_bytes,
            resident,
            overhead,
            per_token * self._k.capacity,
            self.steps,
            self.length,
            self._v.hot_bytes,
        )

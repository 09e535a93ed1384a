"""How a layer answers the attention function: a prefill chunk exactly, a single new token with the TopN decode step."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import NamedTuple

import torch

from kcache.attention.handles import AttentionCall
from kcache.attention.masks import as_bool, is_row_mask, plain_rows, rows_of
from kcache.backends import dense
from kcache.backends.base import DecodeResult, DecodeStep, HotStore, NarrowKeys
from kcache.layers.counted import CountedLayer, Picked
from kcache.layers.would_pick import would_pick
from kcache.telemetry import LayerKind
from kcache.tiers.bytes import ByteRows
from kcache.tiers.lowrank import LowRankTail


class Buffers(NamedTuple):
    """Where a layer's rows are: K and V ``[B, Hkv, capacity, D]``, the tail, and what belongs to rows in 8 bits."""

    keys: torch.Tensor
    values: torch.Tensor
    tail: LowRankTail | None
    narrow: NarrowKeys | None
    value_scales: torch.Tensor | None


class AttendingLayer(CountedLayer):
    """Attention over the rows of a layer that stores them in either tier.

    Attributes
    ----------
    following : AttendingLayer or None
        The layer whose V is wanted next.
    waits_for_attention : bool
        Whether rows were stored whose attention has not come yet.
    """

    device: torch.device
    following: AttendingLayer | None
    waits_for_attention: bool

    @property
    def offloaded(self) -> bool:
        """Whether V lives in the host tier."""
        return self._v is not None and self._v.host is not None

    def spill(self) -> None:
        """Move V to the host tier."""
        if self._v is not None:
            self._v.spill()

    @property
    def kind(self) -> LayerKind:
        """``"tiered"`` when the layer's V may leave the device, ``"resident"`` when it stays."""
        return "resident" if self.shared.is_resident(self) else "tiered"

    def attend(self, call: AttentionCall) -> torch.Tensor:
        """Attention of this forward's queries over everything the layer holds, ``[B, Hq, Q, Dv]``."""
        assert self._k is not None and self._v is not None
        self.waits_for_attention = False
        count = call.query.shape[2]
        mask = None if call.mask is None else call.mask[..., : self.length]
        allowed = as_bool(mask)
        if count == 1:
            mask = plain_rows(mask, allowed)
        if allowed is not None:
            allowed = allowed.expand(call.query.shape[0], -1, -1, -1)
        self.shared.validity.record(self.length, allowed)
        self._v.settle()
        if count == 1 and self._decodes_topn(mask):
            return self._decode(call, mask)
        self._note("dense" if count == 1 else "prefill")
        if count == 1 and self._v.resident is not None and is_row_mask(mask):
            step = self.step_of(call, rows_of(mask))
            if self.shared.probing and self.kind == "tiered":
                self._note("dense", Picked(*would_pick(step)))
            return self.shared.backend(self.device).dense(step).unsqueeze(2)
        values = self._v.whole(call.value)
        if self.following is not None:
            self.following.prefetch_values(call.key.shape[2])
        keys = self._k.followed_by(call.key, self.length)
        out = dense.attend(call.query, keys, values, mask, call.scaling, call.softcap, call.sinks)
        if self.following is None:
            self._v.release()
        return out

    def prefetch_values(self, chunk: int) -> None:
        """Start bringing V to the device for the exact pass over ``chunk`` new rows that is about to come."""
        if self._v is not None:
            self._v.prefetch(chunk)

    def _decodes_topn(self, mask: torch.Tensor | None) -> bool:
        if not self.offloaded or self.shared.force_exact or self.length < self.shared.policy.dense_below:
            return False
        if not is_row_mask(mask):
            warnings.warn(
                "a mask that differs among heads, or weighs rows, is not for TopN: steps with it attend exactly, and "
                "V that has left comes back whole for each; a bool mask [B, 1, 1, L] is served by TopN",
                stacklevel=2,
            )
            return False
        return True

    def _decode(self, call: AttentionCall, mask: torch.Tensor | None) -> torch.Tensor:
        """The TopN decode step: score, select, fetch, combine."""
        assert self._v is not None and self._v.host is not None
        backend, step = self.shared.backend(self.device), self._with_choice(self.step_of(call, rows_of(mask)))
        kernels = getattr(backend, "workspace", None)  # where they do not take a step's sizes, the host reads
        if backend.reads_host_by_kernel and (kernels is None or kernels(step) is not None):
            self._v.ready_for_kernels()
        else:
            self._v.finish_sending()
        result = backend.decode(step)
        self._note("topn", Picked(result.picks, result.mass, result.weights))
        return result.out.unsqueeze(2)

    def step_of(self, call: AttentionCall, mask: torch.Tensor | None) -> DecodeStep:
        """What a backend is given for a call with one query; ``mask`` ``[B, at least L]`` bool."""
        held = self.buffers()
        return DecodeStep(
            query=call.query[:, :, 0].detach(),
            keys=held.keys,
            values=held.values,
            length=self.length,
            scaling=call.scaling,
            policy=self.shared.policy,
            lowrank=None if held.tail is None else held.tail.state(),
            mask=None if mask is None else mask.expand(call.query.shape[0], -1),
            softcap=call.softcap,
            sinks=call.sinks,
            hot=self.hot,
            narrow=held.narrow,
            value_scales=held.value_scales,
        )

    def decode_step(self, step: DecodeStep) -> DecodeResult:
        """Score, select, fetch and combine."""
        return self.shared.backend(self.device).decode(self._with_choice(step))

    def _with_choice(self, step: DecodeStep) -> DecodeStep:
        """The step with what decides on its rows: the threshold, if there is one, and a store of hot rows."""
        assert self._v is not None
        spread, policy = self.shared.spread, self.shared.policy
        if spread is not None and self.follows_threshold(step.length):
            heads = step.keys.shape[1] if policy.select == "group" else step.query.shape[1]
            threshold, tally = spread.begin(self.index, heads, len(step.query), self.device)
            step = replace(step, threshold=threshold, tally=tally)
        if step.hot is None:
            self._v.hot = self.shared.backend(self.device).keep_hot(step)
            step = step if self._v.hot is None else replace(step, hot=self._v.hot)
        return step

    @property
    def hot(self) -> HotStore | None:
        """The store of hot rows, once a TopN step has made one."""
        return None if self._v is None else self._v.hot

    def buffers(self) -> Buffers:
        """The whole buffers, V in whichever tier holds it; valid until the layer grows."""
        assert self._k is not None and self._k.data is not None and self._v is not None
        held = self._v.host or self._v.resident
        assert held is not None and held.data is not None
        return Buffers(
            self._k.data,
            held.data,
            self._v.tail,
            self._k.narrow if isinstance(self._k, ByteRows) else None,
            held.scales if isinstance(held, ByteRows) else None,
        )

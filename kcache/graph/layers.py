"""What the model finds in place of its cache while a step is recorded: layers that store and attend by kernels alone.

A captured layer stands for one layer of a :class:`~kcache.KCache`. Where a row goes and how many there are it reads
from tensors on the device, so what was recorded at one length is right at every other, as long as buffers stay where
they are. ``fingerprint`` names the memory and the choices that a recording depends on; ``advance`` tells the layer it
stands for that a replayed step has been taken in.

Shapes: B sequences, Hkv KV heads, D and Dv head sizes, W rows of a window.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from kcache.attention.handles import AttentionCall, with_handle
from kcache.backends.base import DecodeStep
from kcache.backends.triton import append
from kcache.errors import GraphError
from kcache.layers.counted import Picked
from kcache.layers.tiered import TieredLayer
from kcache.tiers.validity import Validity


class Inputs:
    """What a step reads and the host sets before each replay.

    Attributes
    ----------
    ids, positions : Tensor ``[B, 1]`` int64
    length : Tensor ``[1]`` int32
        Rows in the cache, the new token's included.
    row : Tensor ``[1]`` int64
        Where the new token's row goes: ``length - 1``.
    going : Tensor ``[B]`` bool
        False for sequences that have ended and are fed padding.
    valid : Tensor ``[B, capacity]`` bool or None
        Which rows are real; None where all are.
    """

    def __init__(self, batch: int, capacity: int, padded: bool, device: torch.device) -> None:
        self.ids = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.positions = torch.zeros(batch, 1, dtype=torch.int64, device=device)
        self.length = torch.ones(1, dtype=torch.int32, device=device)
        self.row = torch.zeros(1, dtype=torch.int64, device=device)
        self.going = torch.ones(batch, dtype=torch.bool, device=device)
        self.valid = torch.zeros(batch, capacity, dtype=torch.bool, device=device) if padded else None

    def locate(self) -> None:
        """Work out from the length where the new row and token are; part of the recorded step."""
        self.row.copy_(self.length - 1)
        if self.valid is None:
            self.positions.copy_(self.row.expand_as(self.positions))
            return
        self.valid.index_copy_(1, self.row, self.going[:, None])
        self.positions.copy_((self.valid.sum(1, keepdim=True) - 1).clamp(min=0))


class _Captured(CacheLayerMixin):
    """A layer that is asked for nothing but its rows: a length given to the host would be recorded with the step."""

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        raise GraphError("a captured layer is made for tensors that exist")

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        raise GraphError("the model asks its cache for a mask's size on the host in every step")

    def get_seq_length(self) -> int:
        raise GraphError("the model asks its cache for its length on the host in every step")

    def get_max_length(self) -> int:
        raise GraphError("the model asks its cache for its capacity on the host in every step")

    @abstractmethod
    def attend(self, module: torch.nn.Module, call: AttentionCall) -> torch.Tensor:
        """Answer the attention function's call; returns ``[B, Hq, 1, Dv]``."""


class CapturedTiered(_Captured):
    """Stands for a :class:`~kcache.layers.tiered.TieredLayer`, V in either tier."""

    is_sliding = False

    def __init__(self, layer: TieredLayer, inputs: Inputs) -> None:
        super().__init__()
        self.layer, self.inputs = layer, inputs
        self.latest: list[torch.Tensor] = []  # picks, mass and weights, where a replay writes them
        self.shown: list[torch.Tensor] = []  # those of the step taken in last

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a row of K and of V ``[B, Hkv, 1, D]``, and what the tail keeps of it, where the device says."""
        held, inputs = self.layer.buffers(), self.inputs
        append(
            _row(key_states), _row(value_states), held.keys, held.values, inputs.length, offset=-1,
            lowrank=None if held.tail is None else held.tail.state(), mask=inputs.valid, narrow=held.narrow,
            value_scales=held.value_scales,
        )  # fmt: skip
        return key_states, with_handle(value_states, self)

    def attend(self, module: torch.nn.Module, call: AttentionCall) -> torch.Tensor:
        """The TopN step, or exact attention where V is on the device."""
        layer, inputs = self.layer, self.inputs
        layer.shared.check_owner(module)
        step = layer.step_of(call, inputs.valid)
        step = replace(step, length=step.keys.shape[2], device_length=inputs.length)
        if not layer.offloaded:
            return layer.shared.backend(layer.device).dense(step).unsqueeze(2)
        result = layer.decode_step(step)
        self.latest = [result.picks, result.mass, result.weights]
        return result.out.unsqueeze(2)

    def fingerprint(self) -> tuple[object, ...]:
        """What a recording depends on."""
        layer, held = self.layer, self.layer.buffers()
        tensors = [held.keys, held.values, held.value_scales]
        if held.narrow is not None:
            tensors += held.narrow.tensors()
        if held.tail is not None:
            state = held.tail.state()
            tensors += [state.base, state.basis, state.coefficients]
        if layer.hot is not None:
            tensors.append(layer.hot.hits)
        places = ((tensor.data_ptr(), tuple(tensor.shape)) for tensor in tensors if tensor is not None)
        return (layer.offloaded, *places)

    def advance(self, event: torch.cuda.Event | None) -> None:
        """Take in a step that was replayed; ``event`` ends it."""
        self.layer.stepped_on_device(Picked(*self.shown) if self.shown else None, event)


class CapturedWindow(_Captured):
    """Stands for a sliding-window layer: its rows in a ring of ``W``, the new one in the place of the oldest.

    Rows in a ring are out of order; attention does not mind, since keys carry their positions.
    """

    is_sliding = True

    def __init__(self, layer: DynamicSlidingWindowLayer, inputs: Inputs, shared: Any) -> None:
        super().__init__()
        assert layer.keys is not None and layer.values is not None
        self.layer, self.inputs, self.shared = layer, inputs, shared
        self.window = layer.sliding_window
        batch, heads, _, dim = layer.keys.shape
        device = layer.keys.device
        self.ring_k = layer.keys.new_zeros(batch, heads, self.window, dim)
        self.ring_v = layer.values.new_zeros(batch, heads, self.window, layer.values.shape[3])
        self.valid = torch.zeros(batch, self.window, dtype=torch.bool, device=device)
        self.size = torch.full((1,), self.window, dtype=torch.int32, device=device)
        self._at = torch.zeros(1, dtype=torch.int64, device=device)

    def enter(self, validity: Validity) -> None:
        """Take over the rows that the layer holds."""
        length, keys, values = self.layer.cumulative_length, self.layer.keys, self.layer.values
        assert keys is not None and values is not None
        held = keys.shape[2]
        slots = torch.arange(length - held, length, device=keys.device) % self.window
        self.ring_k.index_copy_(2, slots, keys)
        self.ring_v.index_copy_(2, slots, values)
        real = validity.rows(length - held, length, keys.device)
        self.valid.zero_()
        self.valid.index_copy_(1, slots, self.valid.new_ones(len(self.valid), held) if real is None else real)

    def leave(self) -> None:
        """Give the layer its rows back, in order."""
        length = self.layer.cumulative_length
        held = min(length, self.window - 1)
        slots = torch.arange(length - held, length, device=self.ring_k.device) % self.window
        self.layer.keys, self.layer.values = self.ring_k.index_select(2, slots), self.ring_v.index_select(2, slots)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a row of K and of V ``[B, Hkv, 1, D]`` over the oldest."""
        self._at.copy_(self.inputs.row % self.window)
        self.ring_k.index_copy_(2, self._at, key_states)
        self.ring_v.index_copy_(2, self._at, value_states)
        self.valid.index_copy_(1, self._at, self.inputs.going[:, None])
        return key_states, with_handle(value_states, self)

    def attend(self, module: torch.nn.Module, call: AttentionCall) -> torch.Tensor:
        """Exact attention over the ring."""
        self.shared.check_owner(module)
        step = DecodeStep(
            call.query[:, :, 0], self.ring_k, self.ring_v, self.window, call.scaling, self.shared.policy,
            mask=self.valid, softcap=call.softcap, sinks=call.sinks, device_length=self.size,
        )  # fmt: skip
        return self.shared.backend(self.ring_k.device).dense(step).unsqueeze(2)

    def fingerprint(self) -> tuple[object, ...]:
        """Nothing but the ring, which is the recording's own."""
        held = self.layer.keys
        return (self.ring_k.data_ptr(), None if held is None else held.shape[0])

    def advance(self, event: torch.cuda.Event | None) -> None:
        """Count the step; the rows are given back on leaving."""
        self.layer.cumulative_length += 1


CapturedLayer = CapturedTiered | CapturedWindow


class CapturedCache(Cache):
    """The cache the model is given while a step is recorded."""

    def __init__(self, layers: Sequence[CapturedLayer]) -> None:
        super().__init__(layers=list(layers))


def _row(states: torch.Tensor) -> torch.Tensor:
    """``[B, Hkv, 1, D]`` as ``[B, Hkv, D]`` with each row contiguous."""
    row = states[:, :, 0]
    return row if row.stride(-1) == 1 else row.contiguous()

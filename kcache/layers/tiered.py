"""TieredLayer: one full-attention layer of a cache, K on its device, V in one of the two tiers.

V starts on the device while the context is short (``Policy.dense_below``) or the layer is resident, and leaves for
the host tier once it is not. ``update`` only stores; the attention function then calls ``attend``
(:class:`~kcache.layers.attending.AttendingLayer`).
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from kcache.attention.gradients import without_gradient
from kcache.attention.handles import with_handle
from kcache.errors import CacheStateError, InputError
from kcache.layers.attending import AttendingLayer
from kcache.layers.chunk import Chunk
from kcache.layers.counted import Picked
from kcache.layers.kinds import RowKind
from kcache.layers.shared import Shared
from kcache.layers.stepwise import Block
from kcache.tiers.bytes import ByteRows
from kcache.tiers.rows import RowBuffer
from kcache.tiers.values import ValueStore


class TieredLayer(AttendingLayer):
    """K and V of one layer across the tiers.

    Parameters
    ----------
    index : int
        The layer's number in the model.
    shared : Shared
        What all layers of a cache have in common: policy, backend, validity of rows, residency.
    """

    is_sliding = False
    is_croppable = True
    is_compileable = False

    def __init__(self, index: int, shared: Shared) -> None:
        self.index = index
        self.shared = shared
        self.following = None
        self._forget()

    def _forget(self) -> None:
        self.is_initialized = False
        self.length = 0
        self._k: RowBuffer | ByteRows | None = None
        self._v: ValueStore | None = None
        self.waits_for_attention = False
        self._begin_to_count()

    # -- what transformers asks ------------------------------------------------------------------------------------

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]  # a view, where the base has an attribute
        """K ``[B, Hkv, L, D]``, a view of the device buffer (a copy, if that is in 8 bits); None while empty."""
        return self._k.get(self.length) if self._k is not None and self._k.data is not None else None

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """V ``[B, Hkv, L, Dv]``, a view in whichever tier holds it; None while empty."""
        return self._v.view() if self._v is not None and self.batch_size >= 0 else None

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Learn device, dtype and shapes from the first K and V."""
        self.dtype, self.device = key_states.dtype, key_states.device
        plan = self.shared.residency
        self._k = RowBuffer(self.device, partial(plan.key_room, self))
        self._v = ValueStore(
            self.device, self.shared.policy, self.shared.validity, plan.room, partial(plan.resident_room, self),
            self.shared.link(self.device), plan.most_sequences,
        )  # fmt: skip
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store new rows ``[B, Hkv, T, D]``.

        Attached, returns the new rows alone, V carrying the handle the attention function looks for. Otherwise
        returns all rows, so that any attention function is right with it.
        """
        kind = RowKind.of(self.index, key_states, value_states)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        assert self._k is not None and self._v is not None
        if self._k.data is None:
            self._kind = kind
        elif self._k.data.shape[0] != key_states.shape[0]:
            raise CacheStateError(
                f"this cache holds {self._k.data.shape[0]} sequences and was given {key_states.shape[0]}; "
                "make a new cache for another batch"
            )
        self._kind.check(self.index, kind)
        keys, values = key_states.detach(), value_states.detach()
        end = self.length + keys.shape[2]
        if self.shared.replays(self, key_states):
            return key_states, with_handle(value_states, Block(self, self.length))
        self.shared.plan_residency(self, keys, values, end)
        self._v.append(values, self.length, self.shared.residency.leaves(self, end))
        self._store_keys(keys)
        self.length = end
        if (keys.shape[2] == 1 or self.shared.look is not None) and not self.shared.force_exact:
            self.steps += keys.shape[2]  # a block that is attended whole stands for as many steps
        if not self.shared.attached:
            return without_gradient(self._k.get(end), key_states), without_gradient(self._v.everything(), value_states)
        return key_states, with_handle(value_states, Chunk(self, end))

    def _store_keys(self, rows: torch.Tensor) -> None:
        """Keep K of new rows, in 8 bits once V has left if the policy says so."""
        assert self._k is not None
        policy = self.shared.policy
        if policy.key_planes and self.offloaded and isinstance(self._k, RowBuffer):
            planes, room = policy.key_planes, self.shared.residency.room
            narrow = ByteRows(self.device, self.device, room, planes=planes, centred=True)
            self._centre(narrow, rows)
            if self.length:
                narrow.put(self._k.view(self.length), 0)  # may not fit; nothing has been lost then
            self._k = narrow
        self._k.put(rows, self.length)

    def _centre(self, narrow: ByteRows, rows: torch.Tensor) -> None:
        """Choose what rows in 8 bits are told from: the new ones, or those there are if that is more."""
        assert self._k is not None
        more = rows.shape[2] >= self.length
        sample, start = (rows, self.length) if more else (self._k.view(self.length), 0)
        if end := start + sample.shape[2]:
            validity = self.shared.validity
            narrow.centre_on(sample, validity.rows(start, end, self.device) if validity.length >= end else None)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the mask for ``query_length`` new tokens."""
        return self.length + query_length, 0

    def get_seq_length(self) -> int:
        """Tokens held."""
        return self.length

    def get_max_length(self) -> int:
        """-1: the layer grows as needed."""
        return -1

    # -- storing and moving ----------------------------------------------------------------------------------------

    def release(self) -> None:
        """Let go of the latest V's device memory, if no attention has done so."""
        if self._v is not None:
            self._v.release()

    def settle(self) -> None:
        """Take rows that were stored without attention into the tail, as real ones."""
        if self._v is not None:
            self.shared.validity.record(self.length, None)
            self._v.settle()

    def ready_for_kernels(self) -> None:
        """Let the device read V only after what is under way has arrived; the host does not wait."""
        if self._v is not None:
            self._v.ready_for_kernels()

    def reset(self) -> None:
        """Empty the layer and give its memory back; counters start anew."""
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; the argument is negative, as transformers has it (``crop(-3)`` removes three)."""
        if tokens_to_remove > 0:
            raise InputError(f"crop takes a negative number of tokens to remove, got {tokens_to_remove}")
        if tokens_to_remove == 0 or self._v is None:
            return
        self.waits_for_attention = False
        self.length = max(0, self.length + tokens_to_remove)
        self.picked = None
        self.shared.validity.crop(self.length)
        self._v.crop(self.length)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the sequences for beam search; rows in the host tier are copied on the host."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times."""
        if self.length:
            self.batch_select_indices(torch.arange(self.batch_size).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences ``indices`` ``[B']``, in that order."""
        if self._k is None or self._v is None or not self.length:
            return
        self.picked = None
        self._k.select(indices)
        self._v.select(indices)

    def forget_unseen(self) -> None:
        """Let nothing remain of rows that a step wrote past the end and that were never taken in."""
        if self._v is not None:
            self._v.crop(self.length)

    def stepped_on_device(self, picked: Picked | None, event: torch.cuda.Event | None) -> None:
        """Take in a decode step that a recording has run: K and V are stored, ``event`` ends it."""
        assert self._v is not None
        self.length += 1
        self.steps += 1
        self._v.stored_by_kernel(event)
        self._note("dense" if picked is None else "topn", picked)

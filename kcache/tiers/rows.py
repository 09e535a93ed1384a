"""Growable storage for K or V rows, ``[B, H, capacity, D]``, in device memory or in (pinned) host memory.

A row ``[D]`` is contiguous and rows of one head follow each other, so a kernel reads a picked row with wide loads and
a matrix product over one head's rows copies nothing. Buffers grow one layer at a time, to the length the cache plans
for; appending never copies what is already there.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch

from kcache.tiers.arena import Arena
from kcache.tiers.pinned import pinned_empty

_LEAST_GROWTH = 64


class RowBuffer:
    """Rows of one layer in one memory.

    Parameters
    ----------
    device : torch.device
        Where the rows live; ``cpu`` for the host tier.
    room : callable, optional
        Tells how many rows to make room for when the buffer has to grow; by default by a quarter.
    reader : torch.device, optional
        A CUDA device whose kernels and copies reach this host memory directly: it is registered with the driver.
    axis : int
        Where the rows are counted: 2 for ``[B, H, capacity, D]``, 3 for ``[B, H, D, capacity]``; the capacity is a
        multiple of 16 then, so that kernels may read 16 rows at a time.
    arena : Arena, optional
        Where registered memory may have been prepared.
    sequences : callable, optional
        Tells how many sequences to make room for, if fewer come than will be.
    """

    def __init__(
        self,
        device: torch.device,
        room: Callable[[], int] | None = None,
        reader: torch.device | None = None,
        axis: int = 2,
        arena: Arena | None = None,
        sequences: Callable[[], int] | None = None,
    ) -> None:
        self.device = device
        self.reader = reader
        self.axis = axis
        self._room = room
        self._arena = arena
        self._sequences = sequences
        self.data: torch.Tensor | None = None

    @property
    def capacity(self) -> int:
        """Rows there is room for."""
        return 0 if self.data is None else self.data.shape[self.axis]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self.data is None else self.data.untyped_storage().nbytes()

    @property
    def places(self) -> int:
        """Sequences there is room for; more than there are where some have left."""
        return 0 if self.data is None or not len(self.data) else self.nbytes // self.data[0].nbytes

    @property
    def heads(self) -> int:
        """Heads per sequence."""
        return 0 if self.data is None else self.data.shape[1]

    @property
    def row_bytes(self) -> int:
        """Bytes of one row ``[D]``."""
        return 0 if self.data is None else self.data.shape[3] * self.data.element_size()

    @property
    def full_row_bytes(self) -> int:
        """Bytes of one row in the type it came in."""
        return self.row_bytes

    def put(self, rows: torch.Tensor, start: int) -> None:
        """Store rows ``[B, H, T, D]`` from number ``start`` on."""
        self.take(rows, start, lambda part, place: place.copy_(part))

    def take(self, rows: torch.Tensor, start: int, send: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        """Like :meth:`put`, with the copy left to ``send(rows, their place)``."""
        end = start + rows.shape[2]
        self.reserve(rows, end)
        send(rows, self.view(end)[:, :, start:])

    def widen(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Rows from here in the type they came in: as they are."""
        return rows

    def followed_by(self, latest: torch.Tensor, length: int) -> torch.Tensor:
        """The first ``length`` rows, the last of which are ``latest``: here they are as they came anyway."""
        return self.view(length)

    def get(self, length: int) -> torch.Tensor:
        """The first ``length`` rows, without a copy."""
        return self.view(length)

    def view(self, length: int) -> torch.Tensor:
        """The first ``length`` rows, ``[B, H, length, D]`` (or ``[B, H, D, length]``), without a copy."""
        if self.data is None:
            raise ValueError("the buffer holds no rows yet")
        return self.data.narrow(self.axis, 0, length)

    def reserve(self, like: torch.Tensor, length: int) -> None:
        """Make room for ``length`` rows, otherwise shaped and typed like ``like``, keeping what is there."""
        if length <= self.capacity:
            return
        shape = list(like.shape)
        shape[self.axis] = grown_length(length, self.capacity) if self._room is None else max(length, self._room())
        if self.axis == 3:
            shape[3] = -(-shape[3] // 16) * 16
        if self._sequences is not None:
            shape[0] = max(shape[0], self._sequences())
        with torch.inference_mode(False):
            data = self._empty(tuple(shape), like.dtype)[: like.shape[0]]
        if self.data is not None:
            data.narrow(self.axis, 0, self.capacity).copy_(self.data)
        self.data = data

    def select(self, index: torch.Tensor) -> None:
        """Keep the batch rows ``index`` ``[B']``, in that order; a row may be named several times.

        Where some leave and the others keep their order, those move up, which takes no memory and gives none back; nor
        does what is copied to places that there is room for already.
        """
        if self.data is None:
            return
        order = index.tolist()
        if all(before < after for before, after in pairwise(order)):
            with torch.inference_mode(False):
                for place, row in enumerate(order):
                    if place != row:
                        self.data[place].copy_(self.data[row])
                self.data = self.data[: len(order)]
            return
        if len(self.data) < len(order) <= self.places and all(row <= place for place, row in enumerate(order)):
            with torch.inference_mode(False):
                self.data = self.data.as_strided((len(order), *self.data.shape[1:]), self.data.stride())
                for place, row in reversed(list(enumerate(order))):  # so that no row is read after it is written
                    if place != row:
                        self.data[place].copy_(self.data[row])
            return
        picked = self._empty((len(index), *self.data.shape[1:]), self.data.dtype)
        self.data = torch.index_select(self.data, 0, index.to(self.data.device), out=picked)

    def __deepcopy__(self, memo: dict[int, Any]) -> RowBuffer:
        """A buffer of its own in the same kind of memory; a plain copy of a pinned tensor would not be pinned."""
        memo[id(self)] = twin = RowBuffer(self.device, reader=self.reader, axis=self.axis)
        twin._room, twin._arena, twin._sequences = copy.deepcopy((self._room, self._arena, self._sequences), memo)
        if self.data is not None:
            twin.data = twin._empty(tuple(self.data.shape), self.data.dtype).copy_(self.data)
        return twin

    def _empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Allocate; a buffer made in inference mode must still be writable outside of it."""
        with torch.inference_mode(False):
            if self.reader is not None and self._arena is not None:
                return pinned_empty(shape, dtype, self.reader, self._arena)
            if self.reader is not None:
                return pinned_empty(shape, dtype, self.reader)
            # Zeros, since a product over the whole buffer weighs rows not yet filled with 0, and 0 x NaN is NaN.
            return torch.zeros(shape, dtype=dtype, device=self.device)

    def wipe(self, start: int, end: int) -> None:
        """Zero rows ``start:end``, so that what they held can reach no product over the whole buffer."""
        if self.data is not None:
            self.data.narrow(self.axis, start, max(0, end - start)).zero_()


def grown_length(length: int, capacity: int) -> int:
    """A quarter more than there was, in whole multiples of 64 rows; the first allocation is exact up to that rounding.

    Memory is what is short, and no row is copied more than some four times on the way.
    """
    wanted = length if capacity == 0 else max(length, capacity + max(_LEAST_GROWTH, capacity // 4))
    return -(-wanted // 64) * 64

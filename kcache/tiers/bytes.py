"""Rows in 8 bits: whole numbers from -127 to 127, and one fp32 scale for each row.

Half the bytes of a 16-bit row, for K on the device or for V in the host tier. A row's error is at most half a step of
its own scale. Scales always stay on the device: four bytes a row, and none of them crosses the link.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kcache.tiers.rows import RowBuffer


def quantise(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn rows ``[..., D]`` into int8 ``[..., D]`` and fp32 scales ``[..., 1]``; a row of zeros has scale 0."""
    rows = rows.float()
    scales = rows.abs().amax(-1, keepdim=True) / 127
    return (rows / torch.where(scales > 0, scales, 1.0)).round_().to(torch.int8), scales


def dequantise(rows: torch.Tensor, scales: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The opposite of :func:`quantise`, rounded to ``dtype``."""
    return (rows.float() * scales).to(dtype)


class ByteRows:
    """Rows of one layer in 8 bits, ``[B, H, capacity, D]``; it has what a :class:`~kcache.tiers.rows.RowBuffer` has.

    Parameters
    ----------
    device : torch.device
        Where the rows live.
    scale_device : torch.device
        Where the scales do.
    room, reader
        As for a RowBuffer.

    Attributes
    ----------
    dtype : torch.dtype
        Of the rows that come and go: that of the latest.
    """

    def __init__(
        self,
        device: torch.device,
        scale_device: torch.device,
        room: Callable[[], int] | None = None,
        reader: torch.device | None = None,
    ) -> None:
        self.dtype = torch.float32
        self.rows = RowBuffer(device, room, reader)
        self._scales = RowBuffer(scale_device, room)

    @property
    def data(self) -> torch.Tensor | None:
        """The whole numbers, int8 ``[B, H, capacity, D]``."""
        return self.rows.data

    @property
    def scales(self) -> torch.Tensor | None:
        """Scales ``[B, H, capacity]`` fp32."""
        return None if self._scales.data is None else self._scales.data.squeeze(3)

    @property
    def capacity(self) -> int:
        """Rows there is room for."""
        return self.rows.capacity

    @property
    def heads(self) -> int:
        """Heads per sequence."""
        return self.rows.heads

    @property
    def nbytes(self) -> int:
        """Bytes of the whole numbers."""
        return self.rows.nbytes

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales."""
        return self._scales.nbytes

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as it is kept."""
        return self.rows.row_bytes

    @property
    def full_row_bytes(self) -> int:
        """Bytes of one row in the type it came in."""
        return self.rows.row_bytes * self.dtype.itemsize

    def reserve(self, like: torch.Tensor, length: int) -> None:
        """Make room for ``length`` rows, otherwise shaped like ``like``, keeping what is there."""
        self.rows.reserve(torch.empty(like.shape, dtype=torch.int8, device="meta"), length)

    def put(self, rows: torch.Tensor, start: int) -> None:
        """Store rows ``[B, H, T, D]`` from number ``start`` on."""
        self.take(rows, start, lambda part, place: place.copy_(part))

    def take(self, rows: torch.Tensor, start: int, send: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        """Like :meth:`put`, with the copy left to ``send(int8 rows, their place)``."""
        end, self.dtype = start + rows.shape[2], rows.dtype
        whole, scales = quantise(rows)
        self.rows.reserve(whole, end)
        self._scales.put(scales, start)
        send(whole, self.rows.view(end)[:, :, start:])

    def view(self, length: int) -> torch.Tensor:
        """The first ``length`` rows as they are kept, without a copy."""
        return self.rows.view(length)

    def get(self, length: int) -> torch.Tensor:
        """The first ``length`` rows in their own type: a copy, where the whole numbers are."""
        return self.widen(self.rows.view(length), 0)

    def widen(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Whole numbers ``[B, H, T, D]``, rows ``start`` and following, wherever they are, in the type they came in."""
        scales = self._scales.view(start + rows.shape[2])[:, :, start:].to(rows.device)
        return dequantise(rows, scales, self.dtype)

    def select(self, index: torch.Tensor) -> None:
        """Keep the batch rows ``index`` ``[B']``, in that order."""
        self.rows.select(index)
        self._scales.select(index)

"""The tail: what the rows that were not picked still contribute.

The unpicked rows hold 10-25 % of the attention mass; dropping them is the largest error of the paper's scheme. V is
summarised by the mean of each block of ``block`` rows, over valid rows only, accumulated in fp32 and kept on the
device in V's own dtype: ``1 / block`` of V. The sum of the open (last, partial) block is kept in fp32, so a block's
mean is rounded once.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kcache.tiers.rows import RowBuffer


class BlockTail:
    """Means of V per block of rows of one layer, ``[B, H, ceil(T / block), D]``."""

    def __init__(self, block: int, device: torch.device, room: Callable[[], int] | None = None) -> None:
        self.block = block
        self.length = 0
        self._room = room
        self._means = RowBuffer(device, None if room is None else self._blocks)
        self._open_sum: torch.Tensor | None = None

    def _blocks(self) -> int:
        """Blocks to make room for."""
        return 0 if self._room is None else -(-self._room() // self.block)

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        open_bytes = 0 if self._open_sum is None else self._open_sum.numel() * 4
        return self._means.nbytes + open_bytes

    def means(self) -> torch.Tensor:
        """The block means over the rows appended so far, ``[B, H, ceil(length / block), D]``."""
        return self._means.view(-(-self.length // self.block))

    def buffer(self) -> torch.Tensor:
        """All memory of the means, ``[B, H, blocks there is room for, D]``; not yet used ones hold anything finite."""
        assert self._means.data is not None
        return self._means.data

    def begins_at(self, end: int) -> int:
        """The first row that :meth:`append` must be given to come to ``end`` rows."""
        return self.length

    def append(self, rows: torch.Tensor, valid: torch.Tensor | None, counts: torch.Tensor | None) -> None:
        """Take in new rows.

        Parameters
        ----------
        rows : Tensor ``[B, H, T, D]``
            V of the new rows, on the device.
        valid : Tensor ``[B, T]`` bool, or None when all are valid
        counts : Tensor ``[B, ceil((length + T) / block)]`` int32, or None
            Valid rows per block once the new rows are in.
        """
        start, end = self.length, self.length + rows.shape[2]
        first, last = start // self.block, -(-end // self.block)
        self._means.reserve(rows[:, :, :1], last)
        if valid is not None:
            rows = torch.where(valid[:, None, :, None], rows, 0)
        sums = self._sums(rows, start - first * self.block)
        if start % self.block and self._open_sum is not None:
            sums[:, :, :1].add_(self._open_sum)
        means = self._means.view(last)[:, :, first:]
        if counts is not None:
            means.copy_(sums / counts[:, None, first:last, None].clamp(min=1))
        else:
            means.copy_(sums / self._sizes(first, last, end, sums.device))
        self._open_sum = sums[:, :, -1:].clone() if end % self.block else None
        self.length = end

    def _sizes(self, first: int, last: int, end: int, device: torch.device) -> torch.Tensor | int:
        """Rows in each of the blocks ``first:last`` when all are valid and ``end`` is the last row's successor."""
        size = end - (last - 1) * self.block
        if last - first == 1:
            return size
        sizes = torch.full((last - first, 1), float(self.block), device=device)
        sizes[-1] = size
        return sizes

    def _sums(self, rows: torch.Tensor, offset: int) -> torch.Tensor:
        """Sum ``rows`` per block in fp32; the first row stands ``offset`` rows into its block."""
        count = rows.shape[2]
        if count == 1:
            return rows.to(torch.float32, copy=True)
        pieces = []
        head = min(count, (self.block - offset) % self.block)
        if head:
            pieces.append(rows[:, :, :head].sum(2, keepdim=True, dtype=torch.float32))
        whole = (count - head) // self.block
        if whole:
            body = rows[:, :, head : head + whole * self.block]
            blocks = body.unflatten(2, (whole, self.block))
            pieces.append(blocks.sum(3, dtype=torch.float32))
        if head + whole * self.block < count:
            pieces.append(rows[:, :, head + whole * self.block :].sum(2, keepdim=True, dtype=torch.float32))
        return torch.cat(pieces, 2)

    def crop(self, length: int, open_rows: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Cut back to ``length`` rows.

        Parameters
        ----------
        length : int
            Rows to keep.
        open_rows : Tensor ``[B, H, length % block, D]``
            V of the rows of the block that becomes the open one, on the device.
        valid : Tensor ``[B, length % block]`` bool or None
        """
        self.length = length - open_rows.shape[2]
        self._open_sum = None
        if open_rows.shape[2]:
            counts = None
            if valid is not None:
                counts = torch.ones(valid.shape[0], -(-length // self.block), dtype=torch.int32, device=valid.device)
                counts[:, -1] = valid.sum(-1)
            self.append(open_rows, valid, counts)

    def select(self, index: torch.Tensor) -> None:
        """Keep the batch rows ``index`` ``[B']``."""
        self._means.select(index)
        if self._open_sum is not None:
            self._open_sum = self._open_sum.index_select(0, index.to(self._open_sum.device))

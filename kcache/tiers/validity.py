"""Which cached rows are real: a bitmap ``[B, T]`` shared by all layers of a cache.

Left padding makes holes at the start of a sequence, and a batch's second turn makes more of them in the middle. Rows
nobody has called invalid are valid, so an unpadded run never touches the bitmap.
"""

from __future__ import annotations

import torch


class Validity:
    """The bitmap and its length."""

    def __init__(self) -> None:
        self.bitmap: torch.Tensor | None = None
        self.length = 0

    def record(self, end: int, mask: torch.Tensor | None) -> None:
        """Note the rows up to ``end``; ``mask`` is the attention mask ``[B, 1, Q, end]`` (bool, True = attend) or None.

        Every layer of a forward calls this with the same rows; only the first call does anything.
        """
        start = self.length
        if end <= start:
            return
        if mask is None and self.bitmap is None:
            self.length = end
            return
        if mask is not None:
            rows = mask[:, 0, -1, start:end]
            if self.bitmap is None:
                self.bitmap = torch.ones(rows.shape[0], start, dtype=torch.bool, device=rows.device)
            fresh = rows.to(self.bitmap.device)
        else:
            assert self.bitmap is not None
            fresh = self.bitmap.new_ones(self.bitmap.shape[0], end - start)
        if fresh.shape[0] != self.bitmap.shape[0]:
            fresh = fresh.expand(self.bitmap.shape[0], -1)
        self.bitmap = torch.cat([self.bitmap, fresh], dim=1)
        self.length = end

    def grow(self, end: int, bitmap: torch.Tensor | None) -> None:
        """Note the rows up to ``end``, which are real, or said to be by ``bitmap`` ``[B, at least end]``.

        The bitmap is not copied: what it says of those rows must stay so.
        """
        self.length = end
        if bitmap is not None:
            self.bitmap = bitmap[:, :end]

    def rows(self, start: int, end: int, device: torch.device) -> torch.Tensor | None:
        """The bitmap of rows ``start:end`` on ``device``, ``[B, end - start]``, or None when all are valid."""
        if self.bitmap is None:
            return None
        return self.bitmap[:, start:end].to(device)

    def crop(self, length: int) -> None:
        """Forget rows from ``length`` on."""
        if length < self.length:
            self.length = length
            if self.bitmap is not None:
                self.bitmap = self.bitmap[:, :length]

    def select(self, index: torch.Tensor) -> None:
        """Keep the batch rows ``index`` ``[B']``."""
        if self.bitmap is not None:
            self.bitmap = self.bitmap.index_select(0, index.to(self.bitmap.device))

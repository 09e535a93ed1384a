"""Rows in 8 bits: whole numbers from -127 to 127, and one fp32 scale for each row.

Half the bytes of a 16-bit row, for K on the device or for V in the host tier. A row's error is at most half a step of
its own scale. Scales always stay on the device: four bytes a row, and none of them crosses the link.

Of K each row's distance from a centre is kept, the mean of the first real rows that come: in many models a few numbers
are large in every row of a head, as where K has a bias, and would set the scale (SageAttention, Zhang et al., 2025,
smooths K so before each product).

What rounding leaves can be kept as well, as whole numbers of a 254th of a step. Both planes together are as many bytes
as 16-bit rows, and the error is a 65,000th of the largest number (of K of the largest distance from the centre): what
bf16 can tell apart, but for numbers less than a 126th of it, is the same again. Whoever is content with 8 bits reads
half as much.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kcache.backends.base import NarrowKeys
from kcache.backends.rounding import LOWER_STEPS, PIECE, centre_of, quantise, remainder
from kcache.machine.devices import runs_kernels
from kcache.tiers.arena import Arena
from kcache.tiers.rows import RowBuffer


def narrowed(
    rows: torch.Tensor, planes: int, centre: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Whole numbers, scales, and with two ``planes`` what rounding has left; by a kernel on a device that runs ours."""
    if runs_kernels(rows.device):
        from kcache.backends.triton.narrow import narrow

        return narrow(rows, planes, centre)
    whole, scales = quantise(rows, centre)
    return whole, scales, remainder(rows, whole, scales, centre) if planes == 2 else None


def dequantise(
    rows: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    lower: torch.Tensor | None = None,
    centre: torch.Tensor | None = None,
) -> torch.Tensor:
    """The opposite of :func:`quantise`, rounded to the type of ``out`` ``[..., T, D]``, where it is written.

    ``lower`` is what :func:`remainder` told, if that was kept.
    """
    if runs_kernels(out.device):
        from kcache.backends.triton.narrow import widen

        widen(rows, scales, out, lower, centre)
        return out
    for at in range(0, rows.shape[-2], PIECE):
        part, scale, into = (each[..., at : at + PIECE, :] for each in (rows, scales, out))
        steps = part if lower is None else part + lower[..., at : at + PIECE, :] / LOWER_STEPS
        exact = steps * scale
        into.copy_(exact if centre is None else exact + centre.unsqueeze(-2))
    return out


class ByteRows:
    """Rows of one layer in 8 bits, ``[B, H, capacity, D]``; it has what a :class:`~kcache.tiers.rows.RowBuffer` has.

    Parameters
    ----------
    device : torch.device
        Where the rows live.
    scale_device : torch.device
        Where the scales do.
    room, reader, arena, sequences
        As for a RowBuffer.
    planes : {1, 2}
        With 2, what rounding leaves is kept as well; for rows that are :meth:`put`.
    centred : bool
        Keep each row's distance from the mean of those that come first.

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
        arena: Arena | None = None,
        sequences: Callable[[], int] | None = None,
        planes: int = 1,
        centred: bool = False,
    ) -> None:
        self.dtype = torch.float32
        self.rows = RowBuffer(device, room, reader, arena=arena, sequences=sequences)
        self._scales = RowBuffer(scale_device, room)
        self._lower = RowBuffer(device, room) if planes == 2 else None
        self._centred = centred
        self._centre: torch.Tensor | None = None

    @property
    def data(self) -> torch.Tensor | None:
        """The whole numbers, int8 ``[B, H, capacity, D]``."""
        return self.rows.data

    @property
    def scales(self) -> torch.Tensor | None:
        """Scales ``[B, H, capacity]`` fp32."""
        return None if self._scales.data is None else self._scales.data.squeeze(3)

    @property
    def narrow(self) -> NarrowKeys | None:
        """What belongs to the whole numbers, of rows that have a centre."""
        if self.scales is None or self._centre is None:
            return None
        return NarrowKeys(self.scales, self._centre, None if self._lower is None else self._lower.data)

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
        return self.rows.nbytes + (0 if self._lower is None else self._lower.nbytes)

    @property
    def places(self) -> int:
        """Sequences there is room for; more than there are where some have left."""
        return self.rows.places

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales, and of the centre."""
        return self._scales.nbytes + (0 if self._centre is None else self._centre.nbytes)

    @property
    def row_bytes(self) -> int:
        """Bytes of one row as it is read, the upper plane alone."""
        return self.rows.row_bytes

    @property
    def full_row_bytes(self) -> int:
        """Bytes of one row in the type it came in."""
        return self.rows.row_bytes * self.dtype.itemsize

    def reserve(self, like: torch.Tensor, length: int) -> None:
        """Make room for ``length`` rows, otherwise shaped like ``like``, and for their scales; keeps what is there."""
        for plane in (self.rows, *([] if self._lower is None else [self._lower])):
            plane.reserve(torch.empty(like.shape, dtype=torch.int8, device="meta"), length)
        self._scales.reserve(torch.empty(*like.shape[:3], 1, dtype=torch.float32, device="meta"), length)

    def centre_on(self, rows: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Keep rows that are about to come as their distance from the mean of these, of which some are ``valid``."""
        self._centre = centre_of(rows, valid)

    def put(self, rows: torch.Tensor, start: int) -> None:
        """Store rows ``[B, H, T, D]`` from number ``start`` on."""
        self.take(rows, start, lambda part, place: place.copy_(part))

    def take(self, rows: torch.Tensor, start: int, send: Callable[[torch.Tensor, torch.Tensor], object]) -> None:
        """Like :meth:`put`, with the copy left to ``send(int8 rows, their place)``."""
        end, self.dtype = start + rows.shape[2], rows.dtype
        if self._centred and self._centre is None:
            self._centre = centre_of(rows)
        whole, scales, lower = narrowed(rows, 1 if self._lower is None else 2, self._centre)
        self.rows.reserve(whole, end)
        self._scales.put(scales, start)
        if self._lower is not None and lower is not None:
            self._lower.put(lower, start)
        send(whole, self.rows.view(end)[:, :, start:])

    def view(self, length: int) -> torch.Tensor:
        """The first ``length`` rows as they are kept, without a copy."""
        return self.rows.view(length)

    def get(self, length: int) -> torch.Tensor:
        """The first ``length`` rows in their own type: a copy, where the whole numbers are."""
        return self.widen(self.rows.view(length), 0)

    def widen(self, rows: torch.Tensor, start: int) -> torch.Tensor:
        """Whole numbers ``[B, H, T, D]``, rows ``start`` and following, wherever they are, in the type they came in."""
        return self._widen(rows, start, rows.new_empty(rows.shape, dtype=self.dtype))

    def followed_by(self, latest: torch.Tensor, length: int, rows: torch.Tensor | None = None) -> torch.Tensor:
        """The first ``length`` rows in their own type, the last of which are ``latest``, as they came.

        ``rows`` are the whole numbers of those before, if they have been brought elsewhere.
        """
        past = length - latest.shape[2]
        if past == 0:
            return latest
        out = latest.new_empty(*latest.shape[:2], length, latest.shape[3])
        self._widen(self.rows.view(past) if rows is None else rows[:, :, :past], 0, out[:, :, :past])
        out[:, :, past:].copy_(latest)
        return out

    def _widen(self, rows: torch.Tensor, start: int, out: torch.Tensor) -> torch.Tensor:
        end = start + rows.shape[2]
        scales = self._scales.view(end)[:, :, start:]
        lower = None if self._lower is None else self._lower.view(end)[:, :, start:]
        return dequantise(rows, scales.to(rows.device), out, lower, self._centre)

    def select(self, index: torch.Tensor) -> None:
        """Keep the batch rows ``index`` ``[B']``, in that order."""
        self.rows.select(index)
        self._scales.select(index)
        if self._lower is not None:
            self._lower.select(index)
        if self._centre is not None:
            self._centre = self._centre.index_select(0, index.to(self._centre.device))

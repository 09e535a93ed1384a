"""Rounding rows to 8 bits, and what it leaves: the form that :mod:`kcache.tiers.bytes` keeps, in torch operators.

A ``centre`` ``[..., D]`` fp32 is taken from each row before.
"""

from __future__ import annotations

import torch

PIECE = 2048
"""Rows of a head turned at a time: the arithmetic is in fp32, and a whole layer's rows in it take much memory."""
LOWER_STEPS = 254
"""Steps of the lower plane to one of the upper."""
_SAMPLE = 2048


def centre_of(rows: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """The mean of the last of rows ``[B, H, T, D]``, fp32 ``[B, H, D]``.

    ``valid`` ``[B, T]`` tells which are real: of a sequence that has some there, padding does not count.
    """
    rows = rows[..., -_SAMPLE:, :]
    mean = rows.mean(-2, dtype=torch.float32)
    if valid is not None:
        kept = valid[:, None, -_SAMPLE:, None]
        count = kept.sum(-2)
        real = torch.where(kept, rows, 0).sum(-2, dtype=torch.float32) / count.clamp(min=1)
        mean = torch.where(count > 0, real, mean)
    return mean.nan_to_num_(0.0, 0.0, 0.0)


def quantise(rows: torch.Tensor, centre: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn rows ``[..., T, D]`` into int8 ``[..., T, D]`` and fp32 scales ``[..., T, 1]``; one of zeros has scale 0."""
    whole = rows.new_empty(rows.shape, dtype=torch.int8)
    scales = rows.new_empty((*rows.shape[:-1], 1), dtype=torch.float32)
    for part, into, scale in zip(*(each.split(PIECE, -2) for each in (rows, whole, scales)), strict=True):
        exact = _from_centre(part, centre)
        scale.copy_(exact.abs().amax(-1, keepdim=True) / 127)
        into.copy_((exact / torch.where(scale > 0, scale, 1.0)).round_())
    return whole, scales


def remainder(
    rows: torch.Tensor, whole: torch.Tensor, scales: torch.Tensor, centre: torch.Tensor | None = None
) -> torch.Tensor:
    """What :func:`quantise` has rounded away of ``rows``, int8 ``[..., T, D]``: 254ths of a step, -127 to 127."""
    lower = torch.empty_like(whole)
    for part, upper, scale, into in zip(*(each.split(PIECE, -2) for each in (rows, whole, scales, lower)), strict=True):
        steps = _from_centre(part, centre) / torch.where(scale > 0, scale, 1.0)
        into.copy_(((steps - upper) * LOWER_STEPS).round_())
    return lower


def _from_centre(rows: torch.Tensor, centre: torch.Tensor | None) -> torch.Tensor:
    return rows.float() if centre is None else rows.float() - centre.unsqueeze(-2)

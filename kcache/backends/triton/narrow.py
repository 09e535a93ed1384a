"""Narrow and widen: rows of a prompt to 8 bits and back, by the arithmetic of :mod:`kcache.tiers.bytes`.

One launch each, where torch operators take a dozen for each piece of the rows.

Shapes: B sequences, H heads, T rows of each, D size of a row.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kcache.backends.triton.common import LOWER, in_steps, largest_size, on_device, power_of_two

_NUMBERS = 4096
"""That a program turns at a time."""


@triton.jit
def own_tile(heads, length, D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr):
    """A program's sequence and head, its rows ``[TILE]``, places ``[BLOCK_D]`` in them, and which of these exist."""
    batch, head = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    at, dims = (tl.program_id(0) * TILE + tl.arange(0, TILE)).to(tl.int64), tl.arange(0, BLOCK_D)
    return batch, head, at, dims, (at < length)[:, None] & (dims < D)[None, :]


@triton.jit
def narrow_kernel(
    rows, upper, lower, scales, centre, heads, length, stride_b, stride_h, stride_t,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_CENTRE: tl.constexpr,
):  # fmt: skip
    """A tile of rows of one head; the results are contiguous."""
    batch, head, at, dims, inside = own_tile(heads, length, D, BLOCK_D, TILE)
    own = rows + batch * stride_b + head * stride_h
    wide = tl.load(own + at[:, None] * stride_t + dims[None, :], mask=inside, other=0.0).to(tl.float32)
    if HAS_CENTRE:
        middle = tl.load(centre + tl.program_id(1).to(tl.int64) * D + dims, mask=dims < D, other=0.0)
        wide = wide - middle[None, :]
    scale = largest_size(wide, 1) / 127.0
    whole, rest = in_steps(wide, scale[:, None])
    place = tl.program_id(1).to(tl.int64) * length + at
    tl.store(scales + place, scale, mask=at < length)
    tl.store(upper + place[:, None] * D + dims[None, :], whole.to(tl.int8), mask=inside)
    if HAS_LOWER:
        tl.store(lower + place[:, None] * D + dims[None, :], rest.to(tl.int8), mask=inside)


@triton.jit
def widen_kernel(
    upper, lower, scales, centre, out, heads, length, stride_ub, stride_uh, stride_ut, stride_sb, stride_sh, stride_ob,
    stride_oh, stride_ot,
    D: tl.constexpr, BLOCK_D: tl.constexpr, TILE: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_CENTRE: tl.constexpr,
):  # fmt: skip
    """A tile of rows of one head; both planes lie alike."""
    batch, head, at, dims, inside = own_tile(heads, length, D, BLOCK_D, TILE)
    place = batch * stride_ub + head * stride_uh + at[:, None] * stride_ut + dims[None, :]
    steps = tl.load(upper + place, mask=inside, other=0).to(tl.float32)
    if HAS_LOWER:
        steps += tl.load(lower + place, mask=inside, other=0).to(tl.float32) * (1.0 / LOWER)
    scale = tl.load(scales + batch * stride_sb + head * stride_sh + at, mask=at < length, other=0.0)
    o_ptrs = out + batch * stride_ob + head * stride_oh + at[:, None] * stride_ot + dims[None, :]
    exact = steps * scale[:, None]
    if HAS_CENTRE:
        middle = tl.load(centre + tl.program_id(1).to(tl.int64) * D + dims, mask=dims < D, other=0.0)
        exact += middle[None, :]
    tl.store(o_ptrs, exact.to(out.dtype.element_ty), mask=inside)


def narrow(
    rows: torch.Tensor, planes: int, centre: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Rows ``[B, H, T, D]`` as int8, their scales ``[B, H, T, 1]`` fp32, and with two ``planes`` what rounding left.

    ``centre`` ``[B, H, D]`` fp32, contiguous, is taken from each row before.
    """
    batch, heads, length, dim = rows.shape
    rows = rows if rows.stride(3) == 1 else rows.contiguous()
    upper = torch.empty(rows.shape, dtype=torch.int8, device=rows.device)
    lower = torch.empty_like(upper) if planes == 2 else None
    scales = torch.empty(batch, heads, length, 1, dtype=torch.float32, device=rows.device)
    with on_device(rows.device):
        narrow_kernel[_grid(batch * heads, length, dim)](
            rows, upper, upper if lower is None else lower, scales, scales if centre is None else centre, heads, length,
            *rows.stride()[:3], HAS_LOWER=lower is not None, HAS_CENTRE=centre is not None, **_sizes(dim),
        )  # fmt: skip
    return upper, scales, lower


def widen(
    upper: torch.Tensor,
    scales: torch.Tensor,
    out: torch.Tensor,
    lower: torch.Tensor | None,
    centre: torch.Tensor | None = None,
) -> None:
    """Write rows in the type of ``out`` ``[B, H, T, D]``.

    Parameters
    ----------
    upper, lower : Tensor ``[B, H, T, D]`` int8
        Alike in their strides; there may be no ``lower``.
    scales : Tensor ``[B, H, T, 1]`` fp32
        Rows of a head side by side.
    centre : Tensor ``[B, H, D]`` fp32, contiguous, or None
        Is added to each row.
    """
    batch, heads, length, dim = upper.shape
    with on_device(out.device):
        widen_kernel[_grid(batch * heads, length, dim)](
            upper, upper if lower is None else lower, scales, scales if centre is None else centre, out, heads, length,
            *upper.stride()[:3], *scales.stride()[:2], *out.stride()[:3], HAS_LOWER=lower is not None,
            HAS_CENTRE=centre is not None, **_sizes(dim),
        )  # fmt: skip


def _grid(rows: int, length: int, dim: int) -> tuple[int, int]:
    return triton.cdiv(length, _tile(dim)), rows


def _tile(dim: int) -> int:
    return max(1, _NUMBERS // power_of_two(dim))


def _sizes(dim: int) -> dict[str, int]:
    """Compile-time constants of both kernels, and how they are launched."""
    return {
        "D": dim, "BLOCK_D": power_of_two(dim), "TILE": _tile(dim), "num_warps": 4, "enable_fp_fusion": True
    }  # fmt: skip

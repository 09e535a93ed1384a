"""Append: a new token's K row to the device, its V row to the host, and its place along the tail's directions.

One launch. The position is read on the device, so a captured graph appends at the right place on every replay; V is
written straight into pinned host memory, without a copy call per token.

Shapes: R = B * Hkv rows of work, D and Dv head sizes, r directions.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kcache.backends.base import LowRank, NarrowKeys
from kcache.backends.triton.common import in_steps, largest_size, on_device, power_of_two


@triton.jit
def store_row(row, rows_ptr, lower_ptr, scale_ptr, live, PLANES: tl.constexpr):
    """Store a row ``[D]``, with ``PLANES`` as whole numbers with a scale, and with two what rounding leaves as well."""
    if PLANES > 0:
        wide = row.to(tl.float32)
        scale = largest_size(wide, 0) / 127.0
        nearest, lower = in_steps(wide, scale)
        tl.store(rows_ptr, nearest.to(tl.int8), mask=live)
        if PLANES == 2:
            tl.store(lower_ptr, lower.to(tl.int8), mask=live)
        tl.store(scale_ptr, scale)
    else:
        tl.store(rows_ptr, row, mask=live)


@triton.jit(do_not_specialize=["offset", "stride_mb"])
def append_kernel(
    new_keys, new_values, keys, values, key_lower, key_scales, key_centre, value_scales, basis, coefficients, mask,
    length_ptr, offset,
    stride_nkb, stride_nkh, stride_nvb, stride_nvh, stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl, stride_ksb, stride_ksh, stride_vsb, stride_vsh,
    stride_cb, stride_ch, stride_cr, stride_mb,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    RANK: tl.constexpr, AT_ONCE: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_MASK: tl.constexpr,
    KEY_PLANES: tl.constexpr, VALUE_PLANES: tl.constexpr,
):  # fmt: skip
    """One program per row of work."""
    row = tl.program_id(0)
    batch = (row // HEADS).to(tl.int64)
    head = (row % HEADS).to(tl.int64)
    pos = (tl.load(length_ptr) + offset).to(tl.int64)
    dims = tl.arange(0, BLOCK_D)
    key = tl.load(new_keys + batch * stride_nkb + head * stride_nkh + dims, mask=dims < D, other=0.0)
    k_at = batch * stride_kb + head * stride_kh + pos * stride_kl + dims
    if KEY_PLANES > 0:
        key = key.to(tl.float32) - tl.load(key_centre + row.to(tl.int64) * D + dims, mask=dims < D, other=0.0)
    k_scale = key_scales + batch * stride_ksb + head * stride_ksh + pos
    store_row(key, keys + k_at, key_lower + k_at, k_scale, dims < D, KEY_PLANES)
    vdims = tl.arange(0, BLOCK_DV)
    value = tl.load(new_values + batch * stride_nvb + head * stride_nvh + vdims, mask=vdims < DV, other=0.0)
    v_ptr = values + batch * stride_vb + head * stride_vh + pos * stride_vl + vdims
    v_scale = value_scales + batch * stride_vsb + head * stride_vsh + pos
    store_row(value, v_ptr, v_ptr, v_scale, vdims < DV, VALUE_PLANES)
    if HAS_TAIL:
        for first in range(0, RANK, AT_ONCE):
            directions = first + tl.arange(0, AT_ONCE)
            real = directions < RANK
            u_ptrs = basis + row.to(tl.int64) * RANK * DV + directions[:, None] * DV + vdims[None, :]
            # Directions are rounded to V's type, as they are for the rows of a prompt.
            rows = tl.load(u_ptrs, mask=real[:, None] & (vdims < DV)[None, :], other=0.0).to(value.dtype)
            along = tl.sum(rows.to(tl.float32) * value.to(tl.float32)[None, :], 1)
            if HAS_MASK:
                along = tl.where(tl.load(mask + batch * stride_mb + pos) != 0, along, 0.0)
            c_ptrs = coefficients + batch * stride_cb + head * stride_ch + directions * stride_cr + pos
            tl.store(c_ptrs, along.to(coefficients.dtype.element_ty), mask=real)


def append(
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    *,
    offset: int = 0,
    lowrank: LowRank | None = None,
    mask: torch.Tensor | None = None,
    narrow: NarrowKeys | None = None,
    value_scales: torch.Tensor | None = None,
) -> None:
    """Write one token's K and V at position ``length + offset``, and the tail's coefficients of it.

    Parameters
    ----------
    new_keys, new_values : Tensor ``[B, Hkv, D]``, ``[B, Hkv, Dv]``
        On the device; the last dimension contiguous.
    keys, values : Tensor ``[B, Hkv, capacity, D]``, ``[B, Hkv, capacity, Dv]``
        The buffers; ``values`` in pinned host memory or on the device.
    length : Tensor ``[1]`` int32 on the device
        Read when the kernel runs.
    offset : int
        0 when ``length`` does not count the new token yet, -1 when it does.
    lowrank : LowRank or None
        The tail, its coefficients with room for the token.
    mask : Tensor ``[B, capacity]`` bool or None
        True where a row is valid, the new token's included; the coefficients of others are 0.
    narrow : NarrowKeys or None
        Where ``keys`` are int8: gets the row's scale, and what rounding leaves of it if there is a place for that.
    value_scales : Tensor ``[B, Hkv, capacity]`` fp32 on the device, or None
        Where ``values`` are int8: gets the row's scale.
    """
    batch, heads, dim = new_keys.shape
    dim_v = new_values.shape[-1]
    basis = new_keys if lowrank is None else lowrank.basis
    coefficients = new_values if lowrank is None else lowrank.coefficients
    rank = 1 if lowrank is None else basis.shape[2]
    valid = mask if mask is not None else length.view(1, -1)
    planes = 0 if narrow is None else 1 if narrow.lower is None else 2
    narrow = narrow or NarrowKeys(new_keys, new_keys)
    v_scales = new_keys if value_scales is None else value_scales
    lower = keys if narrow.lower is None else narrow.lower
    with on_device(new_keys.device):
        append_kernel[(batch * heads,)](
            new_keys, new_values, keys, values, lower, narrow.scales, narrow.centre, v_scales, basis, coefficients,
            valid, length, offset,
            new_keys.stride(0), new_keys.stride(1), new_values.stride(0), new_values.stride(1),
            keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
            narrow.scales.stride(0), narrow.scales.stride(1), v_scales.stride(0), v_scales.stride(1),
            coefficients.stride(0), coefficients.stride(1), coefficients.stride(2), valid.stride(0),
            HEADS=heads, D=dim, DV=dim_v, BLOCK_D=power_of_two(dim), BLOCK_DV=power_of_two(dim_v),
            RANK=rank, AT_ONCE=min(power_of_two(rank), 2048 // power_of_two(dim_v)), HAS_TAIL=lowrank is not None,
            HAS_MASK=mask is not None, KEY_PLANES=planes,
            VALUE_PLANES=int(value_scales is not None), num_warps=1, enable_fp_fusion=True,
        )  # fmt: skip

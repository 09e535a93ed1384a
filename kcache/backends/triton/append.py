"""Append: a new token's K row to the device, its V row to the host, and the open block's mean, in one launch.

The position is read on the device, so a captured graph appends at the right place on every replay; V is written
straight into pinned host memory, without a copy call per token.

Shapes: R = B * Hkv rows of work, D and Dv head sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kcache.backends.triton.common import on_device, power_of_two


@triton.jit(do_not_specialize=["offset", "stride_mb"])
def append_kernel(
    new_keys, new_values, keys, values, means, open_sum, mask, length_ptr, offset,
    stride_nkb, stride_nkh, stride_nvb, stride_nvh, stride_kb, stride_kh, stride_kl,
    stride_vb, stride_vh, stride_vl, stride_tb, stride_th, stride_tl, stride_mb,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    TAIL_BLOCK: tl.constexpr, TAIL_P2: tl.constexpr, HAS_TAIL: tl.constexpr, HAS_MASK: tl.constexpr,
):  # fmt: skip
    """One program per row of work."""
    row = tl.program_id(0)
    batch = (row // HEADS).to(tl.int64)
    head = (row % HEADS).to(tl.int64)
    pos = tl.load(length_ptr) + offset
    dims = tl.arange(0, BLOCK_D)
    key = tl.load(new_keys + batch * stride_nkb + head * stride_nkh + dims, mask=dims < D, other=0.0)
    k_ptr = keys + batch * stride_kb + head * stride_kh + pos.to(tl.int64) * stride_kl
    tl.store(k_ptr + dims, key, mask=dims < D)
    vdims = tl.arange(0, BLOCK_DV)
    value = tl.load(new_values + batch * stride_nvb + head * stride_nvh + vdims, mask=vdims < DV, other=0.0)
    v_ptr = values + batch * stride_vb + head * stride_vh + pos.to(tl.int64) * stride_vl
    tl.store(v_ptr + vdims, value, mask=vdims < DV)
    if HAS_TAIL:
        block = pos // TAIL_BLOCK
        first = block * TAIL_BLOCK
        sum_ptr = open_sum + row * DV + vdims
        total = tl.load(sum_ptr, mask=vdims < DV, other=0.0)
        total = tl.where(pos > first, total, 0.0)
        if HAS_MASK:
            lanes = first + tl.arange(0, TAIL_P2)
            bits = tl.load(mask + batch * stride_mb + lanes, mask=lanes <= pos, other=0) != 0
            bits = bits & (lanes - first < TAIL_BLOCK)
            count = tl.sum(bits.to(tl.int32), 0)
            own = tl.sum((bits & (lanes == pos)).to(tl.int32), 0)
            total += tl.where(own > 0, value.to(tl.float32), 0.0)
        else:
            count = pos - first + 1
            total += value.to(tl.float32)
        tl.store(sum_ptr, total, mask=vdims < DV)
        mean = total / tl.maximum(count, 1).to(tl.float32)
        t_ptr = means + batch * stride_tb + head * stride_th + block.to(tl.int64) * stride_tl
        tl.store(t_ptr + vdims, mean.to(means.dtype.element_ty), mask=vdims < DV)


def append(
    new_keys: torch.Tensor,
    new_values: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: torch.Tensor,
    *,
    offset: int = 0,
    means: torch.Tensor | None = None,
    open_sum: torch.Tensor | None = None,
    tail_block: int = 16,
    mask: torch.Tensor | None = None,
) -> None:
    """Write one token's K and V at position ``length + offset`` and bring the block means up to date.

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
    means : Tensor ``[B, Hkv, capacity / tail_block, Dv]`` or None
    open_sum : Tensor ``[B, Hkv, Dv]`` fp32, contiguous; required with ``means``
        Sum of the valid V rows of the open block; what it holds when a block begins is ignored.
    mask : Tensor ``[B, capacity]`` bool or None
        True where a row is valid, the new token's included.
    """
    batch, heads, dim = new_keys.shape
    dim_v = new_values.shape[-1]
    if means is not None and open_sum is None:
        raise ValueError("means need open_sum, the fp32 sum of the open block")
    tail = means if means is not None else new_values.unsqueeze(2)
    valid = mask if mask is not None else length.view(1, -1)
    with on_device(new_keys.device):
        append_kernel[(batch * heads,)](
            new_keys, new_values, keys, values, tail, open_sum if open_sum is not None else new_values, valid,
            length, offset,
            new_keys.stride(0), new_keys.stride(1), new_values.stride(0), new_values.stride(1),
            keys.stride(0), keys.stride(1), keys.stride(2), values.stride(0), values.stride(1), values.stride(2),
            tail.stride(0), tail.stride(1), tail.stride(2), valid.stride(0),
            HEADS=heads, D=dim, DV=dim_v, BLOCK_D=power_of_two(dim), BLOCK_DV=power_of_two(dim_v),
            TAIL_BLOCK=tail_block, TAIL_P2=power_of_two(tail_block), HAS_TAIL=means is not None,
            HAS_MASK=mask is not None, num_warps=1,
        )  # fmt: skip

"""Pointwise: what lies between a model's matrix products, one launch each where torch needs a chain of small ones.

Numbers are fp32 between load and store, rounded in between where the chain rounds them. Sizes of a row are compiled
in, how many rows there are is not, so one variant of a kernel serves every batch.

Shapes: R rows, B sequences, H heads, D and I widths of a row.
"""

from __future__ import annotations

from typing import Literal

import torch
import triton
import triton.language as tl

from kcache.backends.triton.common import interpreted, on_device, power_of_two

Scaling = Literal["rounded", "plain", "one plus"]
"""How a normalised row meets its weight: rounded to its type first, in fp32, or as ``1 + weight`` in fp32."""
Activation = Literal["silu", "gelu_tanh"]

_GATED_BLOCK = 1024


@triton.jit
def nearest(values, dtype: tl.constexpr, BY_HAND: tl.constexpr):
    """Round fp32 to the nearest of ``dtype``, by hand in the interpreter, which cuts bf16 off."""
    if BY_HAND and dtype == tl.bfloat16:
        bits = values.to(tl.int32, bitcast=True)
        values = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return values.to(dtype)


@triton.jit
def norm_kernel(
    rows, weight, out, eps, inner, stride_o, stride_i,
    D: tl.constexpr, BLOCK: tl.constexpr, ROUNDED: tl.constexpr, ONE_PLUS: tl.constexpr,
    BY_HAND: tl.constexpr,
):  # fmt: skip
    """One program per row; ``inner`` rows, such as heads, lie evenly, and so do such groups."""
    row = tl.program_id(0).to(tl.int64)
    r_ptr = rows + (row // inner) * stride_o + (row % inner) * stride_i
    dims = tl.arange(0, BLOCK)
    dtype: tl.constexpr = out.dtype.element_ty
    scale = tl.load(weight + dims, mask=dims < D, other=0.0).to(tl.float32)
    values = tl.load(r_ptr + dims, mask=dims < D, other=0.0).to(tl.float32)
    normal = values * tl.rsqrt(tl.sum(values * values, 0) / D + eps)
    if ROUNDED:
        normal = nearest(normal, dtype, BY_HAND).to(tl.float32)
    if ONE_PLUS:
        scale += 1.0
    tl.store(out + row * D + dims, nearest(normal * scale, dtype, BY_HAND), mask=dims < D)


@triton.jit
def rotate_row(x_ptr, out_ptr, cos_ptr, sin_ptr, HALF: tl.constexpr, BLOCK: tl.constexpr, SECOND: tl.constexpr,
               ROUNDED: tl.constexpr, BY_HAND: tl.constexpr):  # fmt: skip
    """Rotate a row: element i of its first half against element i of its second."""
    dims = tl.arange(0, BLOCK)
    live = dims < HALF
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    low = tl.load(x_ptr + dims, mask=live, other=0.0).to(tl.float32)
    high = tl.load(x_ptr + HALF + dims, mask=live, other=0.0).to(tl.float32)
    low_cos = low * tl.load(cos_ptr + dims, mask=live, other=0.0).to(tl.float32)
    high_cos = high * tl.load(cos_ptr + SECOND + dims, mask=live, other=0.0).to(tl.float32)
    high_sin = high * tl.load(sin_ptr + dims, mask=live, other=0.0).to(tl.float32)
    low_sin = low * tl.load(sin_ptr + SECOND + dims, mask=live, other=0.0).to(tl.float32)
    if ROUNDED:
        low_cos = nearest(low_cos, dtype, BY_HAND).to(tl.float32)
        high_cos = nearest(high_cos, dtype, BY_HAND).to(tl.float32)
        low_sin = nearest(low_sin, dtype, BY_HAND).to(tl.float32)
        high_sin = nearest(high_sin, dtype, BY_HAND).to(tl.float32)
    tl.store(out_ptr + dims, nearest(low_cos - high_sin, dtype, BY_HAND), mask=live)
    tl.store(out_ptr + HALF + dims, nearest(high_cos + low_sin, dtype, BY_HAND), mask=live)


@triton.jit
def rotate_kernel(
    query, key, query_out, key_out, cos, sin, stride_qb, stride_qh, stride_kb, stride_kh, stride_cb, stride_sb,
    QUERY_HEADS: tl.constexpr, KEY_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK: tl.constexpr, SECOND: tl.constexpr,
    ROUNDED: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """One program per row of queries or keys."""
    batch = (tl.program_id(0) // (QUERY_HEADS + KEY_HEADS)).to(tl.int64)
    head = (tl.program_id(0) % (QUERY_HEADS + KEY_HEADS)).to(tl.int64)
    c_ptr = cos + batch * stride_cb
    s_ptr = sin + batch * stride_sb
    if head < QUERY_HEADS:
        q_ptr = query + batch * stride_qb + head * stride_qh
        q_out = query_out + (batch * QUERY_HEADS + head) * (2 * HALF)
        rotate_row(q_ptr, q_out, c_ptr, s_ptr, HALF, BLOCK, SECOND, ROUNDED, BY_HAND)
    else:
        k_ptr = key + batch * stride_kb + (head - QUERY_HEADS) * stride_kh
        k_out = key_out + (batch * KEY_HEADS + head - QUERY_HEADS) * (2 * HALF)
        rotate_row(k_ptr, k_out, c_ptr, s_ptr, HALF, BLOCK, SECOND, ROUNDED, BY_HAND)


@triton.jit
def gated_kernel(
    gate, up, out, width, stride_g, stride_u, GELU: tl.constexpr, BLOCK: tl.constexpr, BY_HAND: tl.constexpr,
):  # fmt: skip
    """One program per ``BLOCK`` elements of a row."""
    row = tl.program_id(1).to(tl.int64)
    dims = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    dtype: tl.constexpr = out.dtype.element_ty
    wide = tl.load(gate + row * stride_g + dims, mask=dims < width, other=0.0).to(tl.float32)
    factor = tl.load(up + row * stride_u + dims, mask=dims < width, other=0.0).to(tl.float32)
    # Half of 1 + tanh(z) is the sigmoid of 2 z.
    slope = 1.5957691216057308 * (wide + 0.044715 * wide * wide * wide) if GELU else wide
    active = wide / (1.0 + tl.exp(-slope))
    active = nearest(active, dtype, BY_HAND).to(tl.float32)
    tl.store(out + row * width + dims, nearest(active * factor, dtype, BY_HAND), mask=dims < width)


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    """``[..., D]`` as ``[R, D]`` with each row contiguous; a copy only where strides leave no choice."""
    flat = tensor.reshape(-1, tensor.shape[-1])
    return flat if flat.stride(-1) == 1 else flat.contiguous()


def _grouped(tensor: torch.Tensor) -> torch.Tensor:
    """``[..., H, D]`` as ``[R, H, D]`` with each row contiguous; heads cut from a wider product need no copy."""
    sizes = [size for size in tensor.shape[:-1] if size != 1]
    inner = sizes[-1] if len(sizes) > 1 else 1
    grouped = tensor.reshape(-1, inner, tensor.shape[-1])
    return grouped if grouped.stride(-1) == 1 else grouped.contiguous()


def rms_norm(rows: torch.Tensor, weight: torch.Tensor, eps: float, scaling: Scaling) -> torch.Tensor:
    """Divide rows ``[..., D]`` by their root mean square and multiply by ``weight`` ``[D]``; contiguous result."""
    width = rows.shape[-1]
    grouped = _grouped(rows)
    out = rows.new_empty(rows.shape)
    block = power_of_two(width)
    with on_device(rows.device):
        norm_kernel[(grouped.shape[0] * grouped.shape[1],)](
            grouped, weight, out, eps, grouped.shape[1], grouped.stride(0), grouped.stride(1), D=width, BLOCK=block,
            ROUNDED=scaling == "rounded", ONE_PLUS=scaling == "one plus", BY_HAND=interpreted(),
            num_warps=min(8, max(1, block // 512)), enable_fp_fusion=True,
        )  # fmt: skip
    return out


def rotate(
    query: torch.Tensor, key: torch.Tensor | None, cos: torch.Tensor, sin: torch.Tensor, *, rounded: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Turn queries and keys by their position's angles, halves of a row against each other, in one launch.

    Parameters
    ----------
    query, key : Tensor ``[B, H, D]``
        Of any strides but the last; there may be no key.
    cos, sin : Tensor ``[B, D]`` or ``[1, D]``, or of half as many columns where both halves have the same
    rounded : bool
        Whether products are rounded to the type of ``query`` before they are added.

    Returns
    -------
    tuple of Tensor ``[B, H, D]``
        Contiguous.
    """
    batch, heads, dim = query.shape
    other = query if key is None else key
    out, other_out = query.new_empty(query.shape), other.new_empty(other.shape if key is not None else (0,))
    key_heads = 0 if key is None else other.shape[1]
    shared = cos.shape[0] == 1
    with on_device(query.device):
        rotate_kernel[(batch * (heads + key_heads),)](
            query, other, out, other_out, cos, sin, query.stride(0), query.stride(1), other.stride(0),
            other.stride(1), 0 if shared else cos.stride(0), 0 if shared else sin.stride(0), QUERY_HEADS=heads,
            KEY_HEADS=key_heads, HALF=dim // 2, BLOCK=power_of_two(dim // 2),
            SECOND=dim // 2 if cos.shape[-1] == dim else 0, ROUNDED=rounded, BY_HAND=interpreted(), num_warps=1,
            enable_fp_fusion=not rounded,  # a fused product is not rounded before it is added
        )  # fmt: skip
    return out, None if key is None else other_out


def gated(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """``activation(gate) * up`` for ``[..., I]``, the activation rounded before the product; contiguous result."""
    width = gate.shape[-1]
    gates, ups = _flat(gate), _flat(up)
    out = gate.new_empty(gate.shape)
    with on_device(gate.device):
        gated_kernel[(triton.cdiv(width, _GATED_BLOCK), len(gates))](
            gates, ups, out, width, gates.stride(0), ups.stride(0), GELU=activation == "gelu_tanh",
            BLOCK=_GATED_BLOCK, BY_HAND=interpreted(), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out

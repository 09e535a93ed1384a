"""A prompt's attention where torch's flash kernel does not serve: masks, soft-capping, sinks.

A mask is looked at once, for the first and last row each query may attend and how many lie between. Where that is all
there is to it (left padding, a sliding window), tiles are left out, or attended whole, by these two numbers alone;
only queries with holes between them read their mask again. So a padded batch costs what its real tokens cost, and no
additive mask is made.

Query heads of a KV head lie side by side in a tile: row ``r`` of a KV head is head ``r % G`` of query ``r // G``.

Shapes: query ``[B, Hq, Q, D]``, keys ``[B, Hkv, L, D]``, values ``[B, Hkv, L, Dv]``, mask ``[B or 1, 1, Q, L]`` bool.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kcache.backends.triton.common import LOG2E, LOWEST, Chip, chip_of, interpreted, on_device, power_of_two
from kcache.backends.triton.score import log2_score

_SPAN_BLOCK = 4096
FREE = tl.constexpr(0)
SPANNED = tl.constexpr(1)
MASKED = tl.constexpr(2)


@triton.jit(do_not_specialize=["queries", "count", "length", "stride_mb", "stride_mq"])
def span_kernel(mask, spans, queries, count, length, stride_mb, stride_mq, BLOCK: tl.constexpr):
    """One program a query: the first and last row it may attend and their number, or ``length``, -1 and 0."""
    query = tl.program_id(0).to(tl.int64)
    m_base = mask + (query // count) * stride_mb + (query % count) * stride_mq
    lanes = tl.arange(0, BLOCK)
    first = tl.full([BLOCK], 2**30, tl.int32)
    last = tl.full([BLOCK], -1, tl.int32)
    number = tl.zeros([BLOCK], tl.int32)
    for start in range(0, length, BLOCK):
        pos = start + lanes
        allowed = tl.load(m_base + pos, mask=pos < length, other=0) != 0
        first = tl.minimum(first, tl.where(allowed, pos, 2**30))
        last = tl.maximum(last, tl.where(allowed, pos, -1))
        number += allowed.to(tl.int32)
    tl.store(spans + query, tl.minimum(tl.min(first, 0), length))
    tl.store(spans + queries + query, tl.max(last, 0))
    tl.store(spans + 2 * queries + query, tl.sum(number, 0))


@triton.jit
def attend_rows(
    q, k_base, v_base, m_ptrs, first, last, peak, total, result, start, end, length, stride_kl, stride_vl, scaling,
    softcap, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr, LIMITS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Take rows ``start`` to ``end`` into a running softmax; ``LIMITS`` says what may exclude them."""
    dims = tl.arange(0, BLOCK_D)
    vdims = tl.arange(0, BLOCK_DV)
    lanes = tl.arange(0, BLOCK_L)
    for at in tl.range(start, end, BLOCK_L, num_stages=STAGES):
        pos = at + lanes
        far = tl.cast(at, tl.int64)  # longer than 32 bits count, times a stride
        k_ptrs = k_base + far * stride_kl + lanes[:, None] * stride_kl + dims[None, :]
        v_ptrs = v_base + far * stride_vl + lanes[:, None] * stride_vl + vdims[None, :]
        inside = pos < length
        if LIMITS == FREE and D == BLOCK_D:
            k = tl.load(k_ptrs)
        else:
            k = tl.load(k_ptrs, mask=inside[:, None] & (dims < D)[None, :], other=0.0)
        if LIMITS == FREE and DV == BLOCK_DV:
            v = tl.load(v_ptrs)
        else:
            v = tl.load(v_ptrs, mask=inside[:, None] & (vdims < DV)[None, :], other=0.0)
        if UPCAST:
            product = tl.dot(q.to(tl.float32), tl.trans(k).to(tl.float32), input_precision="ieee")
        else:
            product = tl.dot(q, tl.trans(k), input_precision="ieee")
        if HAS_SOFTCAP:
            score = log2_score(product, scaling, softcap, True)
        else:
            score = product * (scaling * LOG2E)
        if LIMITS == SPANNED:
            seen = (pos[None, :] >= first[:, None]) & (pos[None, :] <= last[:, None])
            score = tl.where(seen, score, float("-inf"))
        elif LIMITS == MASKED:
            seen = tl.load(m_ptrs + pos[None, :], mask=inside[None, :], other=0) != 0
            score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        fade = tl.exp2(peak - higher)
        prob = tl.exp2(score - higher[:, None])
        total = total * fade + tl.sum(prob, 1)
        result = result * fade[:, None]
        if UPCAST:
            result += tl.dot(prob.to(v.dtype).to(tl.float32), v.to(tl.float32), input_precision="ieee")
        else:
            result = tl.dot(prob.to(v.dtype), v, result, input_precision="ieee")
        peak = higher
    return peak, total, result


@triton.jit(do_not_specialize=["queries", "count", "length", "stride_mb", "stride_mq", "stride_sb", "heads"])
def prompt_kernel(
    query, keys, values, mask, spans, sinks, out, queries, count, length,
    stride_qb, stride_qh, stride_qq, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl,
    stride_mb, stride_mq, stride_sb, stride_ob, stride_oq, stride_oh, scaling, softcap, heads,
    G: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, STAGES: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_SINKS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: ``BLOCK_R`` rows of queries of one KV head. The last ones, which attend most, begin first."""
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    batch = (tl.program_id(1) // heads).to(tl.int64)
    head = tl.program_id(1) % heads
    row = block * BLOCK_R + tl.arange(0, BLOCK_R)
    live = row < count * G
    row = tl.minimum(row, count * G - 1)
    base = (block * BLOCK_R // G).to(tl.int64)
    asked = row // G
    here = asked - base.to(tl.int32)
    member = head * G + row % G
    dims = tl.arange(0, BLOCK_D)
    vdims = tl.arange(0, BLOCK_DV)
    q_base = query + batch * stride_qb + base * stride_qq
    q_ptrs = q_base + here[:, None] * stride_qq + member[:, None].to(tl.int64) * stride_qh + dims[None, :]
    q = tl.load(q_ptrs, mask=(dims < D)[None, :], other=0.0)
    k_base = keys + batch * stride_kb + head.to(tl.int64) * stride_kh
    v_base = values + batch * stride_vb + head.to(tl.int64) * stride_vh
    m_ptrs = mask + batch * stride_mb + base * stride_mq + here[:, None] * stride_mq

    peak = tl.full([BLOCK_R], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    result = tl.zeros([BLOCK_R, BLOCK_DV], tl.float32)
    if HAS_MASK:
        s_ptrs = spans + batch * stride_sb + asked
        first = tl.load(s_ptrs)
        last = tl.load(s_ptrs + queries)
        number = tl.load(s_ptrs + 2 * queries)
        holes = tl.max((number != tl.maximum(last - first + 1, 0)).to(tl.int32), 0)
    else:
        first = tl.zeros([BLOCK_R], tl.int32)
        last = length - count + asked
        holes = 0
    low = tl.min(first, 0) // BLOCK_L * BLOCK_L
    high = tl.max(last, 0) + 1
    # Between these, every query of the tile attends every row.
    free = tl.cdiv(tl.max(first, 0), BLOCK_L) * BLOCK_L
    bound = (tl.min(last, 0) + 1) // BLOCK_L * BLOCK_L
    free, bound = tl.where(free < bound, free, high), tl.where(free < bound, bound, high)
    if holes != 0:  # a branch of its own: where the other loops come after this one, all products are serialized
        peak, total, result = attend_rows(
            q, k_base, v_base, m_ptrs, first, last, peak, total, result, low, high, length, stride_kl, stride_vl,
            scaling, softcap, D, BLOCK_D, DV, BLOCK_DV, 16, 1, MASKED, HAS_SOFTCAP, UPCAST,
        )  # fmt: skip
    else:
        peak, total, result = attend_rows(
            q, k_base, v_base, m_ptrs, first, last, peak, total, result, low, free, length, stride_kl, stride_vl,
            scaling, softcap, D, BLOCK_D, DV, BLOCK_DV, BLOCK_L, STAGES, SPANNED, HAS_SOFTCAP, UPCAST,
        )  # fmt: skip
        peak, total, result = attend_rows(
            q, k_base, v_base, m_ptrs, first, last, peak, total, result, free, bound, length, stride_kl, stride_vl,
            scaling, softcap, D, BLOCK_D, DV, BLOCK_DV, BLOCK_L, STAGES, FREE, HAS_SOFTCAP, UPCAST,
        )  # fmt: skip
        peak, total, result = attend_rows(
            q, k_base, v_base, m_ptrs, first, last, peak, total, result, bound, high, length, stride_kl, stride_vl,
            scaling, softcap, D, BLOCK_D, DV, BLOCK_DV, BLOCK_L, STAGES, SPANNED, HAS_SOFTCAP, UPCAST,
        )  # fmt: skip
    if HAS_SINKS:
        sink = tl.load(sinks + member).to(tl.float32) * LOG2E
        higher = tl.maximum(peak, sink)
        fade = tl.exp2(peak - higher)
        total = total * fade + tl.exp2(sink - higher)
        result = result * fade[:, None]
    result = result / tl.where(total > 0.0, total, 1.0)[:, None]
    o_base = out + batch * stride_ob + base * stride_oq
    o_ptrs = o_base + here[:, None] * stride_oq + member[:, None] * stride_oh + vdims[None, :]
    tl.store(o_ptrs, result.to(out.dtype.element_ty), mask=live[:, None] & (vdims < DV)[None, :])


def attend_prompt(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    chip: Chip | None = None,
) -> torch.Tensor:
    """Exact attention ``[B, Hq, Q, Dv]``, without a mask causal and aligned to the end.

    A query that may attend nothing gives zeros. Sums are fp32, weights are rounded to V's type before they are
    multiplied with it, as flash attention does (Dao et al., 2022).
    """
    batch, heads, count, dim = query.shape
    kv_heads, length, dim_v = keys.shape[1], keys.shape[2], values.shape[3]
    query, keys, values = (rows if rows.stride(3) == 1 else rows.contiguous() for rows in (query, keys, values))
    sinks = None if sinks is None else sinks.contiguous()
    out = query.new_empty(batch, count, heads, dim_v).transpose(1, 2)
    rows, tile, warps, stages = _tiles(max(dim, dim_v), chip or chip_of(query.device))
    spans, stride_mb, queries = query, 0, 0
    with on_device(query.device):
        if mask is not None:
            mask = (mask if mask.stride(3) == 1 else mask.contiguous()).view(torch.uint8)
            queries, stride_mb = mask.shape[0] * count, 0 if mask.shape[0] == 1 else mask.stride(0)
            spans = torch.empty(3, queries, dtype=torch.int32, device=query.device)
            span_kernel[(queries,)](
                mask, spans, queries, count, length, stride_mb, mask.stride(2), BLOCK=_SPAN_BLOCK, num_warps=4,
                enable_fp_fusion=True,
            )  # fmt: skip
        prompt_kernel[(triton.cdiv(count * (heads // kv_heads), rows), batch * kv_heads)](
            query, keys, values, query if mask is None else mask, spans, query if sinks is None else sinks, out,
            queries, count, length, query.stride(0), query.stride(1), query.stride(2), keys.stride(0), keys.stride(1),
            keys.stride(2), values.stride(0), values.stride(1), values.stride(2), stride_mb,
            0 if mask is None else mask.stride(2), count if queries > count else 0, out.stride(0), out.stride(2),
            out.stride(1), scaling, softcap or 1.0, kv_heads, G=heads // kv_heads, D=dim,
            BLOCK_D=max(16, power_of_two(dim)), DV=dim_v, BLOCK_DV=max(16, power_of_two(dim_v)), BLOCK_R=rows,
            BLOCK_L=tile, STAGES=stages, HAS_MASK=mask is not None, HAS_SOFTCAP=softcap is not None,
            HAS_SINKS=sinks is not None, UPCAST=interpreted(), num_warps=warps, num_stages=stages,
            enable_fp_fusion=True,
        )  # fmt: skip
    return out


def _tiles(widest: int, chip: Chip) -> tuple[int, int, int, int]:
    """Rows of queries, and of K and V, to a tile of heads of ``widest``, warps, and stages; none of them spills."""
    if chip.tiles_held(2) == 2:  # products read shared memory
        return (128, 128, 8, 2) if widest <= 64 else (128, 64, 8, 3) if widest <= 128 else (64, 64, 8, 2)
    return (128, 64, 8, 2) if widest <= 128 else (64, 32, 8, 2)

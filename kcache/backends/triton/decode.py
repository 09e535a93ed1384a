"""Dense decode for resident layers: one read of K and V in device memory, split over a length known on the device.

Every row of work (sequence, KV head) is cut into equal pieces whatever the length; a program keeps a running softmax
over its piece, and the last program of a row merges the pieces. Stock SDPA takes no length on the device, ignores
attention sinks and refuses soft-capping.

Shapes: R = B * Hkv rows of work, G query heads of each, S pieces, D and Dv head sizes.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kcache.backends.triton.common import LOG2E, LOWEST, dot
from kcache.backends.triton.score import log2_score


@triton.jit
def merge_pieces(
    part_max, part_sum, partial, sinks, out, row, head, batch, splits, stride_ob, stride_oh,
    G: tl.constexpr, G2: tl.constexpr, SP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    STEP: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """Merge a row's pieces by their log-sum-exp and write ``out``; a row with nothing to attend to gives zeros."""
    heads = tl.arange(0, G2)
    dims = tl.arange(0, BLOCK_D)
    every = tl.arange(0, SP)
    at = (row * splits + every)[:, None] * G + heads[None, :]
    live = (every < splits)[:, None] & (heads < G)[None, :]
    peaks = tl.load(part_max + at, mask=live, other=LOWEST, cache_modifier=".cg")
    sums = tl.load(part_sum + at, mask=live, other=0.0, cache_modifier=".cg")
    peak = tl.max(peaks, 0)
    if HAS_SINKS:
        sink = tl.load(sinks + head * G + heads, mask=heads < G, other=LOWEST).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
    total = tl.sum(sums * tl.exp2(peaks - peak[None, :]), 0)
    if HAS_SINKS:
        total += tl.exp2(sink - peak)
    total = tl.where(total > 0.0, total, 1.0)
    steps = tl.arange(0, STEP)
    result = tl.zeros([G2, BLOCK_D], tl.float32)
    for first in range(0, splits, STEP):
        part = first + steps
        there = (part < splits)[:, None] & (heads < G)[None, :]
        index = (row * splits + part)[:, None] * G + heads[None, :]
        scale = tl.exp2(tl.load(part_max + index, mask=there, other=LOWEST, cache_modifier=".cg") - peak[None, :])
        p_ptrs = partial + index[:, :, None] * D + dims[None, None, :]
        piece = tl.load(
            p_ptrs, mask=there[:, :, None] & (dims < D)[None, None, :], other=0.0, cache_modifier=".cg"
        )  # fmt: skip
        result += tl.sum(piece * tl.where(there, scale, 0.0)[:, :, None], 0)
    result = result / total[:, None]
    o_ptrs = out + batch * stride_ob + (head * G + heads)[:, None] * stride_oh + dims[None, :]
    tl.store(o_ptrs, result.to(out.dtype.element_ty), mask=(heads < G)[:, None] & (dims < D)[None, :])


@triton.jit(do_not_specialize=["splits", "stride_mb"])
def decode_kernel(
    query, keys, values, mask, sinks, part_max, part_sum, partial, counters, out, length_ptr,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_kl, stride_vb, stride_vh, stride_vl, stride_mb,
    stride_ob, stride_oh, scaling, softcap, splits,
    HEADS: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr, STEP: tl.constexpr, HAS_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
    HAS_SINKS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: one piece of one row of work."""
    pid = tl.program_id(0)
    row = pid // splits
    part = pid % splits
    batch = (row // HEADS).to(tl.int64)
    head = row % HEADS
    length = tl.load(length_ptr)
    tiles = tl.cdiv(tl.cdiv(length, BLOCK_L), splits)
    start = part * tiles * BLOCK_L
    end = tl.minimum(start + tiles * BLOCK_L, length)

    heads = tl.arange(0, GP)
    dims = tl.arange(0, BLOCK_D)
    vdims = tl.arange(0, BLOCK_DV)
    lanes = tl.arange(0, BLOCK_L)
    q_ptrs = query + batch * stride_qb + (head * G + heads)[:, None] * stride_qh + dims[None, :]
    q = tl.load(q_ptrs, mask=(heads < G)[:, None] & (dims < D)[None, :], other=0.0).to(keys.dtype.element_ty)
    k_base = keys + batch * stride_kb + head.to(tl.int64) * stride_kh
    v_base = values + batch * stride_vb + head.to(tl.int64) * stride_vh
    m_base = mask + batch * stride_mb

    peak = tl.full([GP], LOWEST, tl.float32)
    total = tl.zeros([GP], tl.float32)
    result = tl.zeros([GP, BLOCK_DV], tl.float32)
    for first in tl.range(start, end, BLOCK_L, num_stages=STAGES):
        pos = first + lanes
        inside = pos < end
        if D == BLOCK_D:
            k_seen = inside[:, None]
        else:
            k_seen = inside[:, None] & (dims < D)[None, :]
        if DV == BLOCK_DV:
            v_seen = inside[:, None]
        else:
            v_seen = inside[:, None] & (vdims < DV)[None, :]
        k_ptrs = k_base + pos[:, None] * stride_kl + dims[None, :]
        k = tl.load(k_ptrs, mask=k_seen, other=0.0)
        score = log2_score(dot(q, tl.trans(k), UPCAST), scaling, softcap, HAS_SOFTCAP)
        if HAS_MASK:
            allowed = tl.load(m_base + pos, mask=inside, other=0) != 0
            score = tl.where(allowed[None, :], score, float("-inf"))
        score = tl.where(inside[None, :], score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        fade = tl.exp2(peak - higher)
        prob = tl.exp2(score - higher[:, None])
        total = total * fade + tl.sum(prob, 1)
        v_ptrs = v_base + pos[:, None] * stride_vl + vdims[None, :]
        v = tl.load(v_ptrs, mask=v_seen, other=0.0)
        result = result * fade[:, None] + dot(prob.to(v.dtype), v, UPCAST)
        peak = higher
    at = (row * splits + part) * G + heads
    tl.store(part_max + at, peak, mask=heads < G)
    tl.store(part_sum + at, total, mask=heads < G)
    p_ptrs = partial + at[:, None] * DV + vdims[None, :]
    tl.store(p_ptrs, result, mask=(heads < G)[:, None] & (vdims < DV)[None, :])
    # All of this program's stores are ordered before its ticket, and the last ticket's loads after all others'.
    tl.debug_barrier()
    ticket = tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu")
    if ticket == splits - 1:
        tl.debug_barrier()
        merge_pieces(
            part_max, part_sum, partial, sinks, out, row, head, batch, splits, stride_ob, stride_oh,
            G, G2, SP, DV, BLOCK_DV, STEP, HAS_SINKS,
        )  # fmt: skip
        tl.store(counters + row, 0)

"""Dense decode for resident layers: one read of K and V in device memory, split over a length known on the device.

Every row of work (sequence, KV head) is cut into equal pieces whatever the length; a program keeps a running softmax
over its piece, and the last program of a row merges the pieces. Stock SDPA takes no length on the device, ignores
attention sinks and refuses soft-capping.

Shapes: R = B * Hkv rows of work, G query heads of each, S pieces, D and Dv head sizes.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from kcache.backends.triton.common import (
    LOG2E,
    LOWEST,
    chip_of,
    choose_splits,
    dot,
    interpreted,
    on_device,
    power_of_two,
    reduction_step,
)
from kcache.backends.triton.score import log2_score
from kcache.backends.triton.tuning import Tuning
from kcache.backends.triton.workspace import DeviceLength


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


class DenseWorkspace(DeviceLength):
    """Scratch of :func:`dense_decode`; parameters as for :class:`~kcache.backends.triton.workspace.Workspace`.

    ``itemsize`` is that of K and V: tiles of 16 bits may be larger.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        group: int,
        dim: int,
        dim_v: int,
        capacity: int,
        device: torch.device,
        *,
        itemsize: int = 4,
        tuning: Tuning | None = None,
    ) -> None:
        super().__init__(device)
        self.tuning = tune = tuning or Tuning()
        rows = batch * kv_heads
        chip, widest = tune.chip or chip_of(device), max(dim, dim_v)
        large = itemsize <= 2 and widest <= 128
        block = tune.dense_block or (128 if large else 64 if widest <= 128 else 32)
        stages = tune.dense_stages or (2 if large else 3)
        # The largest tiles of which one program fits. A tile of K and one of V have been copied to registers when the
        # next ones arrive: a product of so few rows is none of those that read shared memory.
        row_bytes = 2 * itemsize * power_of_two(widest)
        choices = [(block, stages), (block, 2), (block // 2, 2), (block // 4, 2)]
        fits = {each: chip.resident(tune.dense_residency, (each[1] - 1) * each[0] * row_bytes) for each in choices}
        self.block, self.stages = next((each for each in choices if fits[each]), choices[-1])
        resident = max(1, fits[self.block, self.stages])
        tiles = -(-capacity // self.block)
        self.device, self.capacity, self.upcast = device, capacity, interpreted()
        self.splits = choose_splits(rows, tiles, chip.multiprocessors * resident)
        self.part_max = torch.empty(rows, self.splits, group, dtype=torch.float32, device=device)
        self.part_sum = torch.empty_like(self.part_max)
        self.partial = torch.empty(rows, self.splits, group, dim_v, dtype=torch.float32, device=device)
        self.counters = torch.zeros(rows, dtype=torch.int32, device=device)


def dense_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: int | torch.Tensor,
    *,
    scaling: float,
    workspace: DenseWorkspace,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense attention of one new token over ``length`` rows; parameters as for ``triton_decode``.

    Returns
    -------
    Tensor ``[B, Hq, Dv]``
        In the query's dtype. A sequence with every row masked gives zeros.
    """
    ws, tune = workspace, workspace.tuning
    batch, kv_heads, _, dim = keys.shape
    group, dim_v = query.shape[1] // kv_heads, values.shape[-1]
    if out is None:
        out = query.new_empty(batch, query.shape[1], dim_v)
    lengths = ws.length_tensor(length)
    valid = lengths.view(1, -1) if mask is None else mask
    group2, block_v = power_of_two(group), power_of_two(dim_v)
    with on_device(query.device):
        decode_kernel[(batch * kv_heads * ws.splits,)](
            query, keys, values, valid, lengths if sinks is None else sinks,
            ws.part_max, ws.part_sum, ws.partial, ws.counters, out, lengths,
            query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), keys.stride(2),
            values.stride(0), values.stride(1), values.stride(2), valid.stride(0),
            out.stride(0), out.stride(1), scaling, softcap or 1.0, ws.splits,
            HEADS=kv_heads, G=group, G2=group2, GP=16, SP=power_of_two(ws.splits), D=dim, BLOCK_D=power_of_two(dim),
            DV=dim_v, BLOCK_DV=block_v, BLOCK_L=ws.block, STAGES=ws.stages,
            STEP=reduction_step(group2 * block_v, ws.splits), HAS_MASK=mask is not None,
            HAS_SOFTCAP=softcap is not None, HAS_SINKS=sinks is not None, UPCAST=ws.upcast,
            num_warps=tune.dense_warps, num_stages=ws.stages, enable_fp_fusion=True,
        )  # fmt: skip
    return out

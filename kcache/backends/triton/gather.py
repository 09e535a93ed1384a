"""Fetch and combine: picked V rows straight from pinned host memory, weighed and summed, plus the tail.

One launch holds two kinds of programs. The first ``R * PICK_SPLITS`` read the picked rows over the link: each issues
the 16-byte loads of all its rows before it uses any, and all of them are in flight at once, because bandwidth over the
link is bytes in flight over a round trip of a microsecond. The others stream the block means from device memory
meanwhile. The last program to finish a row adds the partial sums and writes the output, so there is no second launch.

With hot rows, picks found in the device store are read there, and rows that did cross the link are kept in it.

Shapes: R rows of work, G heads of each, N picks, Dv size of a V row, P partial sums per row of work.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kcache.backends.triton.common import weighted_rows


@triton.jit
def sum_partials(
    partial, out, row, total_parts, stride_ob, stride_oh,
    HEADS: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Add a row's partial sums ``[P, G, Dv]`` in a fixed order and write ``out`` in its own type."""
    heads = tl.arange(0, G2)
    dims = tl.arange(0, BLOCK_D)
    parts = tl.arange(0, STEP)
    wanted = (heads < G)[:, None] & (dims < D)[None, :]
    result = tl.zeros([G2, BLOCK_D], tl.float32)
    for first in range(0, total_parts, STEP):
        part = first + parts
        at = ((row * total_parts + part)[:, None, None] * G + heads[None, :, None]) * D + dims[None, None, :]
        live = (part < total_parts)[:, None, None] & wanted[None, :, :]
        result += tl.sum(tl.load(partial + at, mask=live, other=0.0, cache_modifier=".cg"), 0)
    batch = (row // HEADS).to(tl.int64)
    head = row % HEADS
    o_ptrs = out + batch * stride_ob + (head * G + heads)[:, None] * stride_oh + dims[None, :]
    tl.store(o_ptrs, result.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def picked_rows(
    values, picks, coefficients, hot_store, hot_slots, hot_inserts, row, part, batch, head,
    stride_vb, stride_vh, stride_vl,
    REPEAT: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, N: tl.constexpr, ROWS: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HOT_ROWS: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``sum_i coefficient_i * v_i`` over this program's ``ROWS`` picks, ``[GP, BLOCK_D]``."""
    heads = tl.arange(0, GP)
    dims = tl.arange(0, BLOCK_D)
    nth = part * ROWS + tl.arange(0, ROWS)
    pick = tl.load(picks + row * N + nth, mask=nth < N, other=-1)
    c_ptrs = coefficients + (row * G + heads)[:, None] * N + nth[None, :]
    weights = tl.load(c_ptrs, mask=(heads < G)[:, None] & (nth < N)[None, :], other=0.0)
    # A row that weighs nothing (masked) may hold anything: it is neither read nor multiplied.
    weighed = tl.max(tl.abs(weights), 0) > 0.0
    live = pick >= 0
    columns = (dims < D)[None, :]
    base = values + batch * stride_vb + (head // REPEAT).to(tl.int64) * stride_vh
    v_ptrs = base + tl.maximum(pick, 0).to(tl.int64)[:, None] * stride_vl + dims[None, :]
    if HOT_ROWS > 0:
        slot = tl.load(hot_slots + row * N + nth, mask=nth < N, other=-1)
        insert = tl.load(hot_inserts + row * N + nth, mask=nth < N, other=-1)
        h_base = hot_store + row.to(tl.int64) * HOT_ROWS * D
        hit = live & (slot >= 0)
        missed = live & (slot < 0)
        rows = tl.load(v_ptrs, mask=missed[:, None] & columns, other=0.0, cache_modifier=".cg")
        near_ptrs = h_base + tl.maximum(slot, 0)[:, None] * D + dims[None, :]
        near = tl.load(near_ptrs, mask=hit[:, None] & columns, other=0.0)
        keep_ptrs = h_base + tl.maximum(insert, 0)[:, None] * D + dims[None, :]
        tl.store(keep_ptrs, rows, mask=(missed & (insert >= 0))[:, None] & columns)
        rows = tl.where(hit[:, None], near, rows)
        rows = tl.where(weighed[:, None], rows, 0.0)
    else:
        rows = tl.load(v_ptrs, mask=(live & weighed)[:, None] & columns, other=0.0, cache_modifier=".cg")
    return weighted_rows(weights, rows, UPCAST)


@triton.jit
def block_means(
    means, tail, row, part, parts, batch, head, length, tail_blocks, stride_tb, stride_th, stride_tl,
    REPEAT: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TAIL_BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``sum_b tail_b * mean_b`` over this program's share of the blocks, ``[GP, BLOCK_D]``."""
    heads = tl.arange(0, GP)
    dims = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_T)
    count = tl.cdiv(length, TAIL_BLOCK)
    share = tl.cdiv(tl.cdiv(count, BLOCK_T), parts) * BLOCK_T
    start = part * share
    end = tl.minimum(start + share, count)
    base = means + batch * stride_tb + (head // REPEAT).to(tl.int64) * stride_th
    result = tl.zeros([GP, BLOCK_D], tl.float32)
    for first in tl.range(start, end, BLOCK_T, num_stages=STAGES):
        block = first + lanes
        inside = block < end
        w_ptrs = tail + (row * G + heads).to(tl.int64)[:, None] * tail_blocks + block[None, :]
        weights = tl.load(w_ptrs, mask=(heads < G)[:, None] & inside[None, :], other=0.0)
        if D == BLOCK_D:
            seen = inside[:, None]
        else:
            seen = inside[:, None] & (dims < D)[None, :]
        rows = tl.load(base + block[:, None] * stride_tl + dims[None, :], mask=seen, other=0.0)
        result += weighted_rows(weights, rows, UPCAST)
    return result


@triton.jit(do_not_specialize=["tail_blocks", "rows_of_work", "tail_splits"])
def gather_kernel(
    values, means, picks, coefficients, tail, partial, counters, out, length_ptr,
    hot_store, hot_slots, hot_inserts,
    stride_vb, stride_vh, stride_vl, stride_tb, stride_th, stride_tl, stride_ob, stride_oh,
    tail_blocks, rows_of_work, tail_splits,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, GP: tl.constexpr,
    N: tl.constexpr, ROWS: tl.constexpr, PICK_SPLITS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    TAIL_BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr, HAS_TAIL: tl.constexpr,
    HOT_ROWS: tl.constexpr, STEP: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Programs for picks come first: the link is the slower road, so its loads must be under way first."""
    pid = tl.program_id(0)
    is_tail = pid >= rows_of_work * PICK_SPLITS
    row = pid // PICK_SPLITS
    part = pid % PICK_SPLITS
    if HAS_TAIL:
        late = pid - rows_of_work * PICK_SPLITS
        row = tl.where(is_tail, late // tail_splits, row)
        part = tl.where(is_tail, late % tail_splits, part)
    batch = (row // HEADS).to(tl.int64)
    head = row % HEADS
    total_parts = PICK_SPLITS + tail_splits
    slot = part
    if HAS_TAIL:
        if is_tail:
            slot = PICK_SPLITS + part
            result = block_means(
                means, tail, row, part, tail_splits, batch, head, tl.load(length_ptr), tail_blocks,
                stride_tb, stride_th, stride_tl, REPEAT, G, GP, D, BLOCK_D, TAIL_BLOCK, BLOCK_T, STAGES, UPCAST,
            )  # fmt: skip
        else:
            result = picked_rows(
                values, picks, coefficients, hot_store, hot_slots, hot_inserts, row, part, batch, head,
                stride_vb, stride_vh, stride_vl, REPEAT, G, GP, N, ROWS, D, BLOCK_D, HOT_ROWS, UPCAST,
            )  # fmt: skip
    else:
        result = picked_rows(
            values, picks, coefficients, hot_store, hot_slots, hot_inserts, row, part, batch, head,
            stride_vb, stride_vh, stride_vl, REPEAT, G, GP, N, ROWS, D, BLOCK_D, HOT_ROWS, UPCAST,
        )  # fmt: skip
    heads = tl.arange(0, GP)
    dims = tl.arange(0, BLOCK_D)
    p_ptrs = partial + ((row * total_parts + slot) * G + heads)[:, None] * D + dims[None, :]
    tl.store(p_ptrs, result, mask=(heads < G)[:, None] & (dims < D)[None, :])
    # All of this program's stores are ordered before its ticket, and the last ticket's loads after all others'.
    tl.debug_barrier()
    ticket = tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu")
    if ticket == total_parts - 1:
        tl.debug_barrier()
        sum_partials(partial, out, row, total_parts, stride_ob, stride_oh, HEADS, G, G2, D, BLOCK_D, STEP)
        tl.store(counters + row, 0)

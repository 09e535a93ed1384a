"""Fetch and combine: picked V rows straight from pinned host memory, weighed and summed, and the tail added.

A program reads ``ROWS`` picked rows of a row of work over the link: all its 16-byte loads are issued before any is
used, because bandwidth over the link is bytes in flight over a round trip of microseconds. A head with many picks has
many programs, one with few leaves most of its own at once. With hot rows, picks found in the device store are read
there, and rows that did cross the link are kept in it.

The tail was summed over *all* rows, by programs that run at the same time (:mod:`.tail`); here the picks' part is taken
away again. Whoever is last to finish a row adds the sums up, turns the tail's back to V's coordinates and writes the
output (:func:`finish`), so there is no further launch.

Shapes: R rows of work, G heads of each, M picks at most, Dv size of a V row, r directions. Of the sums of a row of work
those of the tail's programs come first, then those of its picks'.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kcache.backends.triton.common import weighted_rows, whole_rows


@triton.jit
def probabilities(scores, lse, row, pos, live, capacity, G: tl.constexpr, GP: tl.constexpr):
    """Probabilities ``[GP, n]`` of the rows ``pos`` ``[n]``; 0 where masked or not ``live``."""
    heads = tl.arange(0, GP)
    s_ptrs = scores + (row.to(tl.int64) * G + heads)[:, None] * capacity + pos[None, :]
    score = tl.load(s_ptrs, mask=(heads < G)[:, None] & live[None, :], other=float("-inf"))
    norm = tl.load(lse + row * G + heads, mask=heads < G, other=0.0)
    return tl.exp2(score - norm[:, None])


@triton.jit
def picked_rows(
    values, scales, weights, pick, live, hot_store, hot_slots, hot_inserts, row, at, batch, head,
    stride_vb, stride_vh, stride_vl, stride_sb, stride_sh,
    D: tl.constexpr, BLOCK_D: tl.constexpr, HOT_ROWS: tl.constexpr, HAS_SCALES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``sum_i weight_i * v_i`` over this program's picks, ``[GP, BLOCK_D]``."""
    dims = tl.arange(0, BLOCK_D)
    columns = (dims < D)[None, :]
    # A row that weighs nothing (masked) may hold anything: it is neither read nor multiplied.
    weighed = tl.max(weights, 0) > 0.0
    base = values + batch * stride_vb + head.to(tl.int64) * stride_vh
    v_ptrs = base + tl.maximum(pick, 0).to(tl.int64)[:, None] * stride_vl + dims[None, :]
    if HOT_ROWS > 0:
        slot = tl.load(hot_slots + at, mask=live, other=-1)
        insert = tl.load(hot_inserts + at, mask=live, other=-1)
        h_base = hot_store + row.to(tl.int64) * HOT_ROWS * D
        hit = live & (slot >= 0)
        missed = live & (slot < 0)
        rows = tl.load(v_ptrs, mask=missed[:, None] & columns, other=0, cache_modifier=".cg")
        near_ptrs = h_base + tl.maximum(slot, 0)[:, None] * D + dims[None, :]
        near = tl.load(near_ptrs, mask=hit[:, None] & columns, other=0)
        keep_ptrs = h_base + tl.maximum(insert, 0)[:, None] * D + dims[None, :]
        tl.store(keep_ptrs, rows, mask=(missed & (insert >= 0))[:, None] & columns)
        rows = tl.where(hit[:, None], near, rows)
        rows = tl.where(weighed[:, None], rows, 0)
    else:
        rows = tl.load(v_ptrs, mask=(live & weighed)[:, None] & columns, other=0, cache_modifier=".cg")
    if HAS_SCALES:
        f_ptrs = scales + batch * stride_sb + head.to(tl.int64) * stride_sh + tl.maximum(pick, 0)
        scale = tl.load(f_ptrs, mask=live & weighed, other=0.0)
        # Whole numbers up to 127 are exact in bf16, whose exponents hold any product of weight and scale.
        result = weighted_rows(weights * scale[None, :], whole_rows(rows, tl.bfloat16), UPCAST)
    else:
        result = weighted_rows(weights, rows, UPCAST)
    return result


@triton.jit
def finish_row(
    partial, shares, held, base, basis, out, mass, row, head, live_parts, tail_splits, stride_oh,
    G: tl.constexpr, G2: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    RANK: tl.constexpr, RP: tl.constexpr, RANK_STEP: tl.constexpr, STEP: tl.constexpr, HAS_TAIL: tl.constexpr,
    RENORMALISE: tl.constexpr,
):  # fmt: skip
    """Add a row's partial sums in a fixed order, the tail's turned back to V's coordinates, and write the output."""
    heads = tl.arange(0, G2)
    dims = tl.arange(0, BLOCK_D)
    parts = tl.arange(0, STEP)
    real = heads < G
    columns = dims < D
    result = tl.zeros([G2, BLOCK_D], tl.float32)
    picked = tl.zeros([G2], tl.float32)
    for first in range(0, live_parts, STEP):
        part = first + parts
        at = (row * PARTS + part)[:, None] * G + heads[None, :]
        there = (part < live_parts)[:, None] & real[None, :]
        wanted = there[:, :, None] & columns[None, None, :]
        p_ptrs = partial + at[:, :, None] * D + dims[None, None, :]
        result += tl.sum(tl.load(p_ptrs, mask=wanted, other=0.0, cache_modifier=".cg"), 0)
        at = (row * (PARTS + tail_splits) + tail_splits + part)[:, None] * G + heads[None, :]
        picked -= tl.sum(tl.load(held + at, mask=there, other=0.0, cache_modifier=".cg"), 0)
    tl.store(mass + row * G + heads, picked, mask=real)
    if RENORMALISE:
        result = result / tl.maximum(picked, 1.0e-37)[:, None]
    if HAS_TAIL:
        total = tail_splits + live_parts
        origin = row * (PARTS + tail_splits)
        rest = tl.zeros([G2], tl.float32)
        for first in range(0, total, STEP):
            at = (origin + first + parts)[:, None] * G + heads[None, :]
            there = (first + parts < total)[:, None] & real[None, :]
            rest += tl.sum(tl.load(held + at, mask=there, other=0.0, cache_modifier=".cg"), 0)
        result += rest[:, None] * tl.load(base + dims, mask=columns, other=0.0)[None, :]
        for lowest in range(0, RANK, RANK_STEP):
            direction = lowest + tl.arange(0, RANK_STEP)
            inside = direction < RANK
            along = tl.zeros([RANK_STEP, G2], tl.float32)
            for first in range(0, total, STEP):
                at = (origin + first + parts)[:, None] * G + heads[None, :]
                there = (first + parts < total)[:, None] & real[None, :]
                s_ptrs = shares + at[:, None, :] * RP + direction[None, :, None]
                wanted = there[:, None, :] & inside[None, :, None]
                along += tl.sum(tl.load(s_ptrs, mask=wanted, other=0.0, cache_modifier=".cg"), 0)
            u_ptrs = basis + direction[:, None] * D + dims[None, :]
            rows = tl.load(u_ptrs, mask=inside[:, None] & columns[None, :], other=0.0)
            # Summed over the first axis: over the middle one the compiler would make it a product in tf32.
            result += tl.sum(along[:, :, None] * rows[:, None, :], 0)
    o_ptrs = out + (head * G + heads)[:, None] * stride_oh + dims[None, :]
    tl.store(o_ptrs, result.to(out.dtype.element_ty), mask=real[:, None] & columns[None, :])


@triton.jit
def finish(
    counters, counts, partial, shares, held, base, basis, out, mass, row, batch, head, kv_row, tail_splits, tickets,
    stride_ob, stride_oh,
    G: tl.constexpr, G2: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    RANK: tl.constexpr, RP: tl.constexpr, STEP: tl.constexpr, RANK_STEP: tl.constexpr, RENORMALISE: tl.constexpr,
):  # fmt: skip
    """Take a ticket for the sum that this program has stored; whoever takes a row's last one writes its output.

    The tail's programs take ``tickets`` of a row, those of its picks one each. How many these are is not yet known to a
    tail's program that is early, but then it is not the last either, whatever ``counts`` still says.
    """
    # All of a program's stores are ordered before its ticket, and the last ticket's loads after all others'.
    tl.debug_barrier()
    ticket = tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu")
    live_parts = tl.maximum(tl.cdiv(tl.load(counts + row, cache_modifier=".cg"), ROWS), 1)
    if ticket == tickets + live_parts - 1:
        tl.debug_barrier()
        finish_row(
            partial, shares, held, base + kv_row * D, basis + kv_row * RANK * D, out + batch * stride_ob, mass,
            row, head, live_parts, tail_splits, stride_oh,
            G, G2, PARTS, D, BLOCK_D, RANK, RP, RANK_STEP, STEP, RANK > 0, RENORMALISE,
        )  # fmt: skip
        tl.store(counters + row, 0)


@triton.jit(do_not_specialize=["rows_of_work", "tail_splits", "tickets"])
def gather_kernel(
    values, scales, scores, lse, coefficients, base, basis, picks, pick_weights, counts, partial, shares, held,
    counters, out, mass, hot_store, hot_slots, hot_inserts,
    stride_vb, stride_vh, stride_vl, stride_sb, stride_sh, stride_cb, stride_ch, stride_cr, stride_ob, stride_oh,
    capacity, rows_of_work, tail_splits, tickets,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, GP: tl.constexpr,
    WIDTH: tl.constexpr, ROWS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    RANK: tl.constexpr, RP: tl.constexpr, RANK_STEP: tl.constexpr, STEP: tl.constexpr, RENORMALISE: tl.constexpr,
    HOT_ROWS: tl.constexpr, HAS_SCALES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: the ``part``-th ``ROWS`` picks of one row of work."""
    pid = tl.program_id(0)
    row = pid % rows_of_work
    part = pid // rows_of_work
    if part < tl.maximum(tl.cdiv(tl.load(counts + row), ROWS), 1):
        batch = (row // HEADS).to(tl.int64)
        head = row % HEADS
        kv_head = head // REPEAT
        heads = tl.arange(0, GP)
        real = heads < G
        nth = part * ROWS + tl.arange(0, ROWS)
        at = row * WIDTH + nth
        pick = tl.load(picks + at, mask=nth < WIDTH, other=-1)
        live = pick >= 0
        weights = probabilities(scores, lse, row, tl.maximum(pick, 0), live, capacity, G, GP)
        tl.store(pick_weights + at, tl.sum(weights, 0) / G, mask=live)
        result = picked_rows(
            values, scales, weights, pick, live, hot_store, hot_slots, hot_inserts, row, at, batch, kv_head,
            stride_vb, stride_vh, stride_vl, stride_sb, stride_sh, D, BLOCK_D, HOT_ROWS, HAS_SCALES, UPCAST,
        )  # fmt: skip
        dims = tl.arange(0, BLOCK_D)
        p_ptrs = partial + ((row * PARTS + part) * G + heads)[:, None] * D + dims[None, :]
        tl.store(p_ptrs, result, mask=real[:, None] & (dims < D)[None, :])
        place = row * (PARTS + tail_splits) + tail_splits + part
        tl.store(held + place * G + heads, -tl.sum(weights, 1), mask=real)
        if RANK > 0:
            directions = tl.arange(0, RP)
            c_base = coefficients + batch * stride_cb + kv_head.to(tl.int64) * stride_ch
            c_ptrs = c_base + directions[None, :] * stride_cr + tl.maximum(pick, 0)[:, None]
            rows = tl.load(c_ptrs, mask=live[:, None] & (directions < RANK)[None, :], other=0.0)
            s_ptrs = shares + (place * G + heads)[:, None] * RP + directions[None, :]
            tl.store(s_ptrs, -weighted_rows(weights, rows, UPCAST), mask=real[:, None])
        finish(
            counters, counts, partial, shares, held, base, basis, out, mass, row, batch, head,
            batch * (HEADS // REPEAT) + kv_head, tail_splits, tickets, stride_ob, stride_oh,
            G, G2, ROWS, PARTS, D, BLOCK_D, RANK, RP, STEP, RANK_STEP, RENORMALISE,
        )  # fmt: skip

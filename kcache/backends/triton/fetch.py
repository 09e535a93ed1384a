"""Fetch and combine: picked V rows straight from pinned host memory, weighed and summed, and the tail added.

:func:`complete` is how the kernels that select go on. The one program of a row of work reads its picks over the link,
``ROWS`` at a time: all their 16-byte loads are issued before any is used, because bandwidth over the link is bytes in
flight over a round trip of a microsecond or two. With hot rows, picks found in the device store are read there, and
rows that did cross the link are kept in it.

The tail was summed over *all* rows, by programs that run at the same time (:mod:`.tail`); here the picks' part is taken
away again. Whoever is last to finish a row adds the sums up, turns the tail's back to V's coordinates and writes the
output (:func:`finish`), so there is no further launch.

Shapes: R rows of work, G heads of each, M picks at most, Dv size of a V row, r directions, P sums per row of work: one
for each of the tail's programs and then one for the picks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kcache.backends.triton.common import weighted_rows, whole_rows
from kcache.backends.triton.hot import hot_lookup


@triton.jit
def probabilities(scores, lse, row, pos, live, capacity, G: tl.constexpr, GP: tl.constexpr):
    """Probabilities ``[n, GP]`` of the rows ``pos`` ``[n]``; 0 where masked or not ``live``."""
    heads = tl.arange(0, GP)
    s_ptrs = scores + (row.to(tl.int64) * G + heads)[None, :] * capacity + pos[:, None]
    score = tl.load(s_ptrs, mask=(heads < G)[None, :] & live[:, None], other=float("-inf"))
    norm = tl.load(lse + row * G + heads, mask=heads < G, other=0.0)
    return tl.exp2(score - norm[None, :])


@triton.jit
def combined(weights, rows, GP: tl.constexpr, UPCAST: tl.constexpr):
    """The sum over n of ``weights`` ``[n, GP]`` times ``rows`` ``[n, m]``, ``[GP, m]`` in fp32.

    Few heads are multiplied on plain lanes: the tensor cores' tiles would be empty for the most part, and the registers
    full. n is the first axis: over the middle one the compiler would make a product of it, in tf32.
    """
    if GP <= 8:
        result = tl.sum(weights[:, :, None] * rows.to(tl.float32)[:, None, :], 0)
    else:
        result = weighted_rows(tl.trans(weights), rows, UPCAST)
    return result


@triton.jit
def picked_rows(
    values, scales, weights, pick, live, hot_store, hot_slots, hot_inserts, row, at, batch, head,
    stride_vb, stride_vh, stride_vl, stride_sb, stride_sh,
    GP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, HOT_ROWS: tl.constexpr, HAS_SCALES: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """``sum_i weight_i * v_i`` over this program's picks, ``[GP, BLOCK_D]``."""
    dims = tl.arange(0, BLOCK_D)
    columns = (dims < D)[None, :]
    # A row that weighs nothing (masked) may hold anything: it is neither read nor multiplied.
    weighed = tl.max(weights, 1) > 0.0
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
        result = combined(weights * scale[:, None], whole_rows(rows, tl.bfloat16), GP, UPCAST)
    else:
        result = combined(weights, rows, GP, UPCAST)
    return result


@triton.jit
def complete(
    values, scales, scores, lse, coefficients, base, basis, picks, hot_store, partial, shares, held, counters, out,
    mass, pick_weights, hot_tags, hot_stamps, hot_clock, hot_claims, hot_slots, hot_inserts, hot_hits, row, kept,
    stride_vb, stride_vh, stride_vl, stride_sb, stride_sh, stride_cb, stride_ch, stride_cr, stride_ob, stride_oh,
    sums, tickets, capacity,
    HEADS: tl.constexpr, G: tl.constexpr, WIDTH: tl.constexpr, REPEAT: tl.constexpr, G2: tl.constexpr,
    ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr,
    STEP: tl.constexpr, RANK_STEP: tl.constexpr, RENORMALISE: tl.constexpr, HOT_ROWS: tl.constexpr,
    HOT_SETS: tl.constexpr, HOT_WAYS: tl.constexpr, HOT_TILE: tl.constexpr, HAS_SCALES: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """All that follows once the ``kept`` picks of a row of work are written: hot rows, fetch, finish."""
    tl.debug_barrier()
    if HOT_WAYS > 0:
        hot_lookup(
            picks, hot_tags, hot_stamps, hot_clock, hot_claims, hot_slots, hot_inserts, hot_hits, row, kept,
            WIDTH, HOT_TILE, HOT_SETS, HOT_WAYS,
        )  # fmt: skip
        tl.debug_barrier()
    batch = (row // HEADS).to(tl.int64)
    kv_head = row % HEADS // REPEAT
    fetch(
        values, scales, scores, lse, coefficients + batch * stride_cb + kv_head.to(tl.int64) * stride_ch, picks,
        pick_weights, hot_store, hot_slots, hot_inserts, partial, shares, held, row, batch, kv_head, kept, capacity,
        stride_vb, stride_vh, stride_vl, stride_sb, stride_sh, stride_cr, sums,
        G, G2, WIDTH, ROWS, D, BLOCK_D, RANK, RP, HOT_ROWS, HAS_SCALES, UPCAST,
    )  # fmt: skip
    finish(
        counters, partial, shares, held, base, basis, out, mass, row, batch, row % HEADS,
        batch * (HEADS // REPEAT) + kv_head, sums, tickets, stride_ob, stride_oh,
        G, G2, D, BLOCK_D, RANK, RP, STEP, RANK_STEP, RENORMALISE,
    )  # fmt: skip


@triton.jit
def fetch(
    values, scales, scores, lse, coefficients, picks, pick_weights, hot_store, hot_slots, hot_inserts, partial, shares,
    held, row, batch, kv_head, kept, capacity, stride_vb, stride_vh, stride_vl, stride_sb, stride_sh, stride_cr, sums,
    G: tl.constexpr, GP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr,
    BLOCK_D: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, HOT_ROWS: tl.constexpr, HAS_SCALES: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """Sum ``w v``, ``w c`` and ``w`` over a row's ``kept`` picks; ``coefficients`` are those of the row's KV head.

    What each pick weighs, mean over heads, goes to ``pick_weights``. ``sums`` is P.
    """
    heads = tl.arange(0, GP)
    directions = tl.arange(0, RP)
    dims = tl.arange(0, BLOCK_D)
    real = heads < G
    result = tl.zeros([GP, BLOCK_D], tl.float32)
    along = tl.zeros([GP, RP], tl.float32)
    mass = tl.zeros([GP], tl.float32)
    for first in range(0, kept, ROWS):
        nth = first + tl.arange(0, ROWS)
        live = nth < kept
        at = row * WIDTH + nth
        pick = tl.load(picks + at, mask=live, other=0)
        weights = probabilities(scores, lse, row, pick, live, capacity, G, GP)
        result += picked_rows(
            values, scales, weights, pick, live, hot_store, hot_slots, hot_inserts, row, at, batch, kv_head,
            stride_vb, stride_vh, stride_vl, stride_sb, stride_sh, GP, D, BLOCK_D, HOT_ROWS, HAS_SCALES, UPCAST,
        )  # fmt: skip
        mass += tl.sum(weights, 0)
        tl.store(pick_weights + at, tl.sum(weights, 1) / G, mask=live)
        if RANK > 0:
            c_ptrs = coefficients + directions[None, :] * stride_cr + pick[:, None]
            part = tl.load(c_ptrs, mask=live[:, None] & (directions < RANK)[None, :], other=0.0)
            along += combined(weights, part, GP, UPCAST)
    place = row * sums + sums - 1
    p_ptrs = partial + (row * G + heads)[:, None] * D + dims[None, :]
    tl.store(p_ptrs, result, mask=real[:, None] & (dims < D)[None, :])
    tl.store(held + place * G + heads, -mass, mask=real)
    if RANK > 0:
        s_ptrs = shares + (place * G + heads)[:, None] * RP + directions[None, :]
        tl.store(s_ptrs, -along, mask=real[:, None])


@triton.jit
def finish(
    counters, partial, shares, held, base, basis, out, mass, row, batch, head, kv_row, sums, tickets,
    stride_ob, stride_oh,
    G: tl.constexpr, G2: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr,
    STEP: tl.constexpr, RANK_STEP: tl.constexpr, RENORMALISE: tl.constexpr,
):  # fmt: skip
    """Take a ticket for the sum that this program has stored; whoever takes a row's last one writes its output.

    Sums are added in a fixed order. ``sums`` is P, ``tickets`` how many are taken of a row, ``kv_row`` the number of
    the row's KV head over all sequences.
    """
    # All of a program's stores are ordered before its ticket, and the last ticket's loads after all others'.
    tl.debug_barrier()
    ticket = tl.atomic_add(counters + row, 1, sem="acq_rel", scope="gpu")
    if ticket == tickets - 1:
        tl.debug_barrier()
        heads = tl.arange(0, G2)
        dims = tl.arange(0, BLOCK_D)
        real = heads < G
        columns = dims < D
        p_ptrs = partial + (row * G + heads)[:, None] * D + dims[None, :]
        result = tl.load(p_ptrs, mask=real[:, None] & columns[None, :], other=0.0, cache_modifier=".cg")
        h_ptrs = held + (row * sums + sums - 1) * G + heads
        picked = -tl.load(h_ptrs, mask=real, other=0.0, cache_modifier=".cg")
        tl.store(mass + row * G + heads, picked, mask=real)
        if RENORMALISE:
            result = result / tl.maximum(picked, 1.0e-37)[:, None]
        if RANK > 0:
            result += tail_rows(
                shares, held, base + kv_row * D, basis + kv_row * RANK * D, row, sums, G, G2, D, BLOCK_D, RANK, RP,
                STEP, RANK_STEP,
            )  # fmt: skip
        o_ptrs = out + batch * stride_ob + (head * G + heads)[:, None] * stride_oh + dims[None, :]
        tl.store(o_ptrs, result.to(out.dtype.element_ty), mask=real[:, None] & columns[None, :])
        tl.store(counters + row, 0)


@triton.jit
def tail_rows(
    shares, held, base, basis, row, sums, G: tl.constexpr, G2: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    RANK: tl.constexpr, RP: tl.constexpr, STEP: tl.constexpr, RANK_STEP: tl.constexpr,
):  # fmt: skip
    """What the rows that were not picked hold of V, ``[G2, BLOCK_D]``, from the sums along its directions."""
    heads = tl.arange(0, G2)
    dims = tl.arange(0, BLOCK_D)
    parts = tl.arange(0, STEP)
    real = heads < G
    columns = dims < D
    rest = tl.zeros([G2], tl.float32)
    for first in range(0, sums, STEP):
        at = (row * sums + first + parts)[:, None] * G + heads[None, :]
        there = (first + parts < sums)[:, None] & real[None, :]
        rest += tl.sum(tl.load(held + at, mask=there, other=0.0, cache_modifier=".cg"), 0)
    result = rest[:, None] * tl.load(base + dims, mask=columns, other=0.0)[None, :]
    for lowest in range(0, RANK, RANK_STEP):
        direction = lowest + tl.arange(0, RANK_STEP)
        inside = direction < RANK
        along = tl.zeros([RANK_STEP, G2], tl.float32)
        for first in range(0, sums, STEP):
            at = (row * sums + first + parts)[:, None] * G + heads[None, :]
            there = (first + parts < sums)[:, None] & real[None, :]
            s_ptrs = shares + at[:, None, :] * RP + direction[None, :, None]
            wanted = there[:, None, :] & inside[None, :, None]
            along += tl.sum(tl.load(s_ptrs, mask=wanted, other=0.0, cache_modifier=".cg"), 0)
        u_ptrs = basis + direction[:, None] * D + dims[None, :]
        rows = tl.load(u_ptrs, mask=inside[:, None] & columns[None, :], other=0.0)
        # Summed over the first axis: over the middle one the compiler would make it a product in tf32.
        result += tl.sum(along[:, :, None] * rows[:, None, :], 0)
    return result

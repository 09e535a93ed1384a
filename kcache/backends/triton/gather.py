"""Fetch and combine: picked V rows straight from pinned host memory, weighed and summed, and the tail added.

One program serves a row of work. It reads many rows at a time, all 16-byte loads issued before any is used, because
bandwidth over the link is bytes in flight over a round trip of microseconds. With hot rows most of them are read out of
device memory, and what crosses the link is stored there on the way. Either way picks are summed in their order, so that
the sum is the same whatever was stored.

The tail was summed over *all* rows (:mod:`.tail`); here the picks' part is taken away again. Whoever is last to finish
a row adds the sums up, turns the tail's back to V's coordinates and writes the output (:func:`finish`).

Shapes: R rows of work, G heads of each, M picks at most, Dv size of a V row, r directions. Of the sums of a row of work
those of the tail's shares come first, then that of its picks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kcache.backends.triton.common import weighted_rows, whole_rows
from kcache.backends.triton.hot import hot_admit


@triton.jit
def weigh_picks(
    scores, norm, exact_norm, coefficients, picks, pick_weights, weights, mass, tags, stamps, clock, claims, slots,
    hits, shares, held, row, count, stride_cr, capacity,
    G: tl.constexpr, G2: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, RANK: tl.constexpr, RQ: tl.constexpr,
    RP: tl.constexpr, HOT_SETS: tl.constexpr, HOT_WAYS: tl.constexpr, HAS_LOWER: tl.constexpr,
):  # fmt: skip
    """Write what a row of work's picks weigh, ``weights`` ``[G, M]``, and where they are, ``slots`` ``[2, M]``.

    That is a pick's slot among the hot rows, or -1 less its position, and the slot where it is to be stored, or -1.

    Leaves in ``mass`` ``[G]`` what they weigh together, and in ``shares`` ``[G, RP]`` and ``held`` ``[G]`` minus the
    picks' part of the tail's sums. With ``HAS_LOWER``, ``weights`` has their scores by both planes of K, for which
    ``exact_norm`` is the log-sum-exp. What a pick needs is asked for at once, before any of it is used: under load a
    round trip takes two microseconds. ``RQ``: a power of two that holds the directions.
    """
    heads = tl.arange(0, G2)
    real = heads < G
    directions = tl.arange(0, RQ)
    lanes = tl.arange(0, TILE)
    along = tl.zeros([G2, RQ], tl.float32)
    total = norm * 0.0  # no number where the scores are none, of which nothing is picked
    taken = total
    if HOT_WAYS > 0:
        now = tl.load(clock + row) + 1
        hit = tl.load(hits + row)
    for first in tl.range(0, count, TILE, num_stages=1):
        nth = first + lanes
        live = nth < count
        pick = tl.load(picks + row * WIDTH + nth, mask=live, other=0)
        s_ptrs = scores + (row.to(tl.int64) * G + heads)[:, None] * capacity + pick[None, :]
        score = tl.load(s_ptrs, mask=real[:, None] & live[None, :], other=float("-inf"))
        w_ptrs = weights + (row * G + heads)[:, None] * WIDTH + nth[None, :]
        if HAS_LOWER:
            refined = tl.load(w_ptrs, mask=real[:, None] & live[None, :], other=float("-inf"))
        if RANK > 0:
            c_ptrs = coefficients + directions[:, None] * stride_cr + pick[None, :]
            part = tl.load(c_ptrs, mask=(directions < RANK)[:, None] & live[None, :], other=0.0)
        if HOT_WAYS > 0:
            slot, fresh = hot_admit(pick, live, tags, stamps, claims, row, now, TILE, HOT_SETS, HOT_WAYS)
            tl.store(slots + 2 * row * WIDTH + nth, tl.where(slot >= 0, slot, -1 - pick), mask=live)
            tl.store(slots + (2 * row + 1) * WIDTH + nth, fresh, mask=live)
            hit += tl.sum((slot >= 0).to(tl.int64), 0)
        part_of_tail = tl.exp2(score - norm[:, None])
        weight = part_of_tail
        if HAS_LOWER:
            weight = tl.exp2(refined - exact_norm[:, None])
            tl.debug_barrier()  # threads that hold copies of a small tile have all read what is written over now
            taken += tl.sum(part_of_tail, 1)
        tl.store(w_ptrs, weight, mask=real[:, None] & live[None, :])
        tl.store(pick_weights + row * WIDTH + nth, tl.sum(weight, 0) / G, mask=live)
        total += tl.sum(weight, 1)
        if RANK > 0:
            # A product for each of a few parts of the tile, of 16 picks at least: a sum over lanes is many shuffles.
            PARTS: tl.constexpr = min(8, TILE // 16)
            w_parts = tl.permute(tl.reshape(part_of_tail, [G2, PARTS, TILE // PARTS]), [1, 0, 2])
            c_parts = tl.permute(tl.reshape(part.to(tl.float32), [RQ, PARTS, TILE // PARTS]), [1, 2, 0])
            along += tl.sum(tl.dot(w_parts, c_parts, input_precision="ieee"), 0)
        if HOT_WAYS > 0:
            tl.debug_barrier()
    tl.store(mass + row * G + heads, total, mask=real)
    if not HAS_LOWER:
        taken = total
    tl.store(held + heads, -taken, mask=real)
    if RANK > 0:
        tl.store(shares + heads[:, None] * RP + directions[None, :], -along, mask=real[:, None])
    if HOT_WAYS > 0:
        tl.store(clock + row, now)
        tl.store(hits + row, hit)


@triton.jit
def read_rows(
    source, scales, picks, weights, store, slots, row, first, count, stride_vl,
    G: tl.constexpr, GP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HOT_WAYS: tl.constexpr, HAS_SCALES: tl.constexpr,
):  # fmt: skip
    """Weights ``[GP, ROWS]``, scales included, V rows ``[ROWS, BLOCK_D]`` of a row of work's next picks.

    Third, the slots where the rows are to be stored, or -1.
    """
    heads = tl.arange(0, GP)
    columns = tl.arange(0, BLOCK_D)[None, :] < D
    dims = tl.arange(0, BLOCK_D)[None, :]
    nth = first + tl.arange(0, ROWS)
    live = nth < count
    # Of loads under a mask the assembler makes one after the other, each with its wait.
    there = tl.minimum(nth, WIDTH - 1)
    fresh = tl.full([ROWS], -1, tl.int32)
    if HOT_WAYS > 0:
        place = tl.load(slots + 2 * row * WIDTH + there)
        fresh = tl.load(slots + (2 * row + 1) * WIDTH + nth, mask=live, other=-1)
        # One load for both: the device's memory and the host's are one space of addresses.
        far = source + (-1 - place).to(tl.int64)[:, None] * stride_vl + dims
        v_ptrs = tl.where((place >= 0)[:, None], store + place[:, None] * D + dims, far)
    else:
        v_ptrs = source + tl.load(picks + row * WIDTH + there).to(tl.int64)[:, None] * stride_vl + dims
    rows = tl.load(v_ptrs, mask=live[:, None] & columns, other=0, cache_modifier=".cg")
    w_ptrs = weights + (row * G + heads)[:, None] * WIDTH + nth[None, :]
    weight = tl.load(w_ptrs, mask=(heads < G)[:, None] & live[None, :], other=0.0)
    if HAS_SCALES:
        pick = tl.load(picks + row * WIDTH + nth, mask=live, other=0)
        scale = tl.load(scales + pick, mask=live, other=0.0)
        weight *= tl.where(tl.max(weight, 0) > 0.0, scale, 0.0)[None, :]
    return weight, rows, fresh


@triton.jit
def fetch_row(
    source, scales, picks, weights, partial, store, slots, row, count, stride_vl,
    G: tl.constexpr, GP: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HOT_WAYS: tl.constexpr, HAS_SCALES: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Leave ``sum p v`` of a row of work's picks in ``partial`` ``[G, D]``; ``source`` and ``store`` are its head's.

    The next rows are asked for before those at hand are multiplied.
    """
    heads = tl.arange(0, GP)
    dims = tl.arange(0, BLOCK_D)
    result = tl.zeros([GP, BLOCK_D], tl.float32)
    weight, rows, fresh = read_rows(
        source, scales, picks, weights, store, slots, row, 0, count, stride_vl,
        G, GP, WIDTH, ROWS, D, BLOCK_D, HOT_WAYS, HAS_SCALES,
    )  # fmt: skip
    for first in tl.range(0, count, ROWS, num_stages=1):
        next_weight, next_rows, next_fresh = read_rows(
            source, scales, picks, weights, store, slots, row, first + ROWS, count, stride_vl,
            G, GP, WIDTH, ROWS, D, BLOCK_D, HOT_WAYS, HAS_SCALES,
        )  # fmt: skip
        if HOT_WAYS > 0:
            arrived = (fresh >= 0)[:, None] & (dims < D)[None, :]
            tl.store(store + fresh[:, None] * D + dims[None, :], rows, mask=arrived)
        # A row that weighs nothing (masked) may hold anything: it is not multiplied.
        rows = tl.where((tl.max(tl.abs(weight), 0) > 0.0)[:, None], rows, 0)
        if HAS_SCALES:
            # Whole numbers up to 127 are exact in bf16, whose exponents hold any product of weight and scale.
            result += weighted_rows(weight, whole_rows(rows, tl.bfloat16), UPCAST)
        else:
            result += weighted_rows(weight, rows, UPCAST)
        weight, rows, fresh = next_weight, next_rows, next_fresh
    tl.store(partial + heads[:, None] * D + dims[None, :], result, mask=(heads < G)[:, None] & (dims < D)[None, :])


@triton.jit
def read_held(held, origin, first, total, G: tl.constexpr, G2: tl.constexpr, STEP: tl.constexpr):
    """What a row's parts from the ``first`` on say that rows weigh, ``[STEP, G2]``."""
    part, heads = first + tl.arange(0, STEP), tl.arange(0, G2)
    there = (part < total)[:, None] & (heads < G)[None, :]
    return tl.load(held + (origin + part)[:, None] * G + heads[None, :], mask=there, other=0.0, cache_modifier=".cg")


@triton.jit
def read_shares(
    shares, origin, first, lowest, total,
    G: tl.constexpr, G2: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, RANK_STEP: tl.constexpr,
    STEP: tl.constexpr,
):  # fmt: skip
    """Sums of a row's parts from the ``first`` on along directions from the ``lowest``, ``[STEP, RANK_STEP, G2]``."""
    part, direction, heads = first + tl.arange(0, STEP), lowest + tl.arange(0, RANK_STEP), tl.arange(0, G2)
    at = (origin + part)[:, None, None] * G + heads[None, None, :]
    wanted = (part < total)[:, None, None] & (direction < RANK)[None, :, None] & (heads < G)[None, None, :]
    return tl.load(shares + at * RP + direction[None, :, None], mask=wanted, other=0.0, cache_modifier=".cg")


@triton.jit
def read_directions(basis, lowest, D: tl.constexpr, BLOCK_D: tl.constexpr, RANK: tl.constexpr, RANK_STEP: tl.constexpr):
    """A head's directions from the ``lowest`` on, ``[RANK_STEP, BLOCK_D]``."""
    direction, dims = lowest + tl.arange(0, RANK_STEP), tl.arange(0, BLOCK_D)
    inside = (direction < RANK)[:, None] & (dims < D)[None, :]
    return tl.load(basis + direction[:, None] * D + dims[None, :], mask=inside, other=0.0)


@triton.jit
def finish_row(
    partial, shares, held, base, basis, out, mass, grown, row, head, tail_splits, stride_oh,
    G: tl.constexpr, G2: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr,
    RANK_STEP: tl.constexpr, STEP: tl.constexpr, RENORMALISE: tl.constexpr, HAS_LOWER: tl.constexpr,
):  # fmt: skip
    """Add a row's partial sums in a fixed order, the tail's turned back to V's coordinates, and write the output.

    All of a row of the usual sizes is asked for at once.
    """
    heads = tl.arange(0, G2)
    dims = tl.arange(0, BLOCK_D)
    real = heads < G
    columns = dims < D
    origin, total = row * (1 + tail_splits), 1 + tail_splits
    p_ptrs = partial + (row * G + heads)[:, None] * D + dims[None, :]
    result = tl.load(p_ptrs, mask=real[:, None] & columns[None, :], other=0.0, cache_modifier=".cg")
    picked = tl.load(mass + row * G + heads, mask=real, other=0.0, cache_modifier=".cg")
    if HAS_LOWER:
        times = tl.load(grown + row * G + heads, mask=real, other=1.0, cache_modifier=".cg")
    if RANK > 0:
        weighs = read_held(held, origin, 0, total, G, G2, STEP)
        share = read_shares(shares, origin, 0, 0, total, G, G2, RANK, RP, RANK_STEP, STEP)
        rows = read_directions(basis, 0, D, BLOCK_D, RANK, RANK_STEP)
        base_row = tl.load(base + dims, mask=columns, other=0.0)
        tl.debug_barrier()  # else the assembler asks for them one after the other
    if RENORMALISE:
        result = result / tl.maximum(picked, 1.0e-37)[:, None]
    result += (picked * 0.0)[:, None]
    if RANK > 0:
        rest = tl.sum(weighs, 0)
        for first in tl.range(STEP, total, STEP, num_stages=1):
            rest += tl.sum(read_held(held, origin, first, total, G, G2, STEP), 0)
        if HAS_LOWER:
            rest = rest / times
        result += rest[:, None] * base_row[None, :]
        for lowest in tl.range(0, RANK, RANK_STEP, num_stages=1):
            along = tl.sum(share, 0)
            for first in tl.range(STEP, total, STEP, num_stages=1):
                more = read_shares(shares, origin, first, lowest, total, G, G2, RANK, RP, RANK_STEP, STEP)
                along += tl.sum(more, 0)
            if HAS_LOWER:
                along = along / times[None, :]
            # Summed over the first axis: over the middle one the compiler would make it a product in tf32.
            result += tl.sum(along[:, :, None] * rows[:, None, :], 0)
            share = read_shares(shares, origin, 0, lowest + RANK_STEP, total, G, G2, RANK, RP, RANK_STEP, STEP)
            rows = read_directions(basis, lowest + RANK_STEP, D, BLOCK_D, RANK, RANK_STEP)
    o_ptrs = out + (head * G + heads)[:, None] * stride_oh + dims[None, :]
    tl.store(o_ptrs, result.to(out.dtype.element_ty), mask=real[:, None] & columns[None, :])


@triton.jit
def finish(
    tickets, done, partial, shares, held, base, basis, out, mass, grown, row, batch, head, kv_row, tail_splits,
    programs, stride_ob, stride_oh,
    G: tl.constexpr, G2: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr,
    RANK_STEP: tl.constexpr, STEP: tl.constexpr, RENORMALISE: tl.constexpr, HAS_LOWER: tl.constexpr,
):  # fmt: skip
    """Take a ticket for the sums that this program has stored; who takes the last of ``programs`` writes the output.

    That one also sets the row's counters back for the next step.
    """
    # All of a program's stores are ordered before its ticket, and the last ticket's loads after all others'.
    tl.debug_barrier()
    ticket = tl.atomic_add(tickets + row, 1, sem="acq_rel", scope="gpu")
    if ticket == programs - 1:
        tl.debug_barrier()
        finish_row(
            partial, shares, held, base + kv_row * D, basis + kv_row * RANK * D, out + batch * stride_ob, mass, grown,
            row, head, tail_splits, stride_oh, G, G2, D, BLOCK_D, RANK, RP, RANK_STEP, STEP, RENORMALISE, HAS_LOWER,
        )  # fmt: skip
        tl.store(tickets + row, 0)
        tl.store(done + row, 0)

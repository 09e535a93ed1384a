"""The kernels of a tiered layer's decode step.

``step_kernel`` is all of it in one launch. Programs score pieces of K, row of work by row of work, those that pick most
first (:mod:`.hot`); whoever finishes a row's last piece selects its rows, fetches and combines them, while others go on
scoring: the link works while K is read. Other programs sum shares of the tail, those of a row of work some rows after
those that score it, late enough not to wait; the last of them keep the device's memory busy while the last rows are
fetched. ``fetch_kernel`` selects and fetches in a launch of its own, for selections that take more registers than
scoring has to spare.

A program that waits (for scores, before its share of the tail) comes after all those it waits for, and programs start
in order: what it waits for has begun and waits for nothing.

How rows are picked is a parameter, ``PICK``: a function with the signature of :func:`~.above.pick_above`. ``source``
and ``source_at`` are for functions that pick by something else than scores; the ones here do not look at them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kcache.backends.triton.gather import fetch_row, finish, weigh_picks
from kcache.backends.triton.hot import hot_rank
from kcache.backends.triton.refine import refine_picks
from kcache.backends.triton.score import score_piece
from kcache.backends.triton.tail import tail_share


@triton.jit
def wait_for(counter, target):
    """Return once ``target`` programs have counted themselves, with all they have stored before in sight."""
    while tl.atomic_add(counter, 0, sem="acquire", scope="gpu") < target:
        pass
    tl.debug_barrier()


@triton.jit
def duty(pid, rows, ahead, splits, shares):
    """Whether program ``pid`` scores, its row of work, and which of its row's pieces or shares of the tail is its own.

    Scoring is ``ahead`` rows of work before the tail. Of ``rows`` each has ``splits`` pieces and ``shares`` shares.
    """
    alone, both = ahead * splits, (rows - ahead) * (splits + shares)
    scores, row, nth = pid < alone, pid // splits, pid % splits
    if pid >= alone + both:
        row, nth = rows - ahead + (pid - alone - both) // shares, (pid - alone - both) % shares
    elif pid >= alone:
        row, nth = (pid - alone) // (splits + shares), (pid - alone) % (splits + shares)
        scores = nth < splits
        row, nth = row + tl.where(scores, ahead, 0), tl.where(scores, nth, nth - splits)
    return scores, row, nth


@triton.jit
def fetch_picked(
    query, keys, key_lower, key_scales, key_centre, values, value_scales, coefficients, base, basis, sinks, threshold,
    scores, block_top, part_max, part_sum, lse, listed, found, done, partial, shares, held, tickets, picks,
    pick_weights, weights, out, mass, grown, tally, hot_store, hot_tags, hot_stamps, hot_clock, hot_claims, hot_counts,
    hot_order, hot_slots, hot_hits, source, source_at, length, row, rows, stride_qb, stride_qh, stride_kb, stride_kh,
    stride_kl, stride_sb, stride_sh, stride_vb, stride_vh, stride_vl, stride_wb, stride_wh, stride_cb, stride_ch,
    stride_cr, stride_ob, stride_oh, capacity, blocks, scaling, softcap, splits, tail_splits, programs,
    PICK: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, GP: tl.constexpr,
    SP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
    TILE: tl.constexpr, MP: tl.constexpr, BP: tl.constexpr, GS: tl.constexpr, REFINED: tl.constexpr,
    WEIGHED: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, RANK: tl.constexpr,
    RQ: tl.constexpr, RP: tl.constexpr, STEP: tl.constexpr, RANK_STEP: tl.constexpr, HOT_SETS: tl.constexpr,
    HOT_WAYS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_TALLY: tl.constexpr, HAS_SCALES: tl.constexpr, RENORMALISE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Select, fetch and combine one row of work whose scores are complete."""
    batch = (row // HEADS).to(tl.int64)
    head = row % HEADS
    kv_head = head // REPEAT
    kept = PICK(
        scores, block_top, part_max, part_sum, sinks, threshold, lse, listed, found, picks, tally, hot_clock, source,
        source_at, length, row, capacity, blocks, splits, HEADS, G, G2, SP, BLOCK, MOST, TILE, MP, BP, GS, HAS_SINKS,
        HAS_TALLY,
    )  # fmt: skip
    if HOT_WAYS > 0:
        tl.store(hot_counts + (1 - length % 2) * rows + row, kept)
    tl.debug_barrier()
    norm = tl.load(lse + row * G + tl.arange(0, G2), mask=tl.arange(0, G2) < G, other=0.0)
    exact_norm = norm
    if HAS_LOWER:
        k_head = batch * stride_kb + kv_head.to(tl.int64) * stride_kh
        refine_picks(
            query + batch * stride_qb + head * G * stride_qh, keys + k_head, key_lower + k_head,
            key_scales + batch * stride_sb + kv_head.to(tl.int64) * stride_sh,
            key_centre + (batch * (HEADS // REPEAT) + kv_head) * D, scores, lse, grown, picks, weights, row, kept,
            stride_qh, stride_kl, capacity, scaling, softcap, G, G2, MOST, REFINED, D, BLOCK_D, HAS_SOFTCAP,
        )  # fmt: skip
        tl.debug_barrier()
        exact_norm = tl.load(lse + row * G + tl.arange(0, G2), mask=tl.arange(0, G2) < G, other=0.0)
    own = (row * (1 + tail_splits) + tail_splits) * G
    weigh_picks(
        scores, norm, exact_norm, coefficients + batch * stride_cb + kv_head.to(tl.int64) * stride_ch, picks,
        pick_weights, weights, mass, hot_tags, hot_stamps, hot_clock, hot_claims, hot_slots, hot_hits,
        shares + own * RP, held + own, row, kept, stride_cr, capacity,
        G, G2, MOST, WEIGHED, RANK, RQ, RP, HOT_SETS, HOT_WAYS, HAS_LOWER,
    )  # fmt: skip
    tl.debug_barrier()
    v_rows = values + batch * stride_vb + kv_head.to(tl.int64) * stride_vh
    store = hot_store + row.to(tl.int64) * (HOT_SETS * HOT_WAYS * DV)
    fetch_row(
        v_rows, value_scales + batch * stride_wb + kv_head.to(tl.int64) * stride_wh, picks, weights,
        partial + row.to(tl.int64) * G * DV, store, hot_slots, row, kept, stride_vl,
        G, GP, MOST, ROWS, DV, BLOCK_DV, HOT_WAYS, HAS_SCALES, UPCAST,
    )  # fmt: skip
    finish(
        tickets, done, partial, shares, held, base, basis, out, mass, grown, row, batch, head,
        batch * (HEADS // REPEAT) + kv_head, tail_splits, programs, stride_ob, stride_oh,
        G, G2, DV, BLOCK_DV, RANK, RP, RANK_STEP, STEP, RENORMALISE, HAS_LOWER,
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "stride_mb", "splits", "tail_splits", "programs", "rows", "ahead", "tail_programs", "source_at",
    ]
)  # fmt: skip
def step_kernel(
    mask, length_ptr, query, keys, key_lower, key_scales, key_centre, values, value_scales, coefficients, base, basis,
    sinks, threshold, scores, block_top, part_max, part_sum, lse, listed, found, done, partial, shares, held, tickets,
    picks, pick_weights, weights, out, mass, grown, tally, hot_store, hot_tags, hot_stamps, hot_clock, hot_claims,
    hot_counts, hot_order, hot_slots, hot_hits, source, source_at, stride_mb, stride_qb, stride_qh, stride_kb,
    stride_kh, stride_kl, stride_sb, stride_sh, stride_vb, stride_vh, stride_vl, stride_wb, stride_wh, stride_cb,
    stride_ch, stride_cr, stride_ob, stride_oh, capacity, blocks, scaling, softcap, splits, tail_splits, programs, rows,
    ahead, tail_programs, PICK: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr, G: tl.constexpr,
    G2: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr,
    STAGES: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, TILE: tl.constexpr, MP: tl.constexpr,
    BP: tl.constexpr, GS: tl.constexpr, REFINED: tl.constexpr, WEIGHED: tl.constexpr, ROWS: tl.constexpr,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, RANK: tl.constexpr, RQ: tl.constexpr, RP: tl.constexpr,
    AT_ONCE: tl.constexpr, BLOCK_T: tl.constexpr, TAIL_STAGES: tl.constexpr, STEP: tl.constexpr,
    RANK_STEP: tl.constexpr, HOT_SETS: tl.constexpr, HOT_WAYS: tl.constexpr, HAS_MASK: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr, IS_NARROW: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_TALLY: tl.constexpr, HAS_SCALES: tl.constexpr, RENORMALISE: tl.constexpr, ALIGNED: tl.constexpr,
    UPCAST: tl.constexpr, FETCHES: tl.constexpr,
):  # fmt: skip
    """Score; with ``FETCHES`` select, fetch and combine; sum the tail.

    ``programs`` finish a row. For the others see :func:`duty`.
    """
    scoring, row, nth = duty(tl.program_id(0), rows, ahead, splits, tail_programs)
    length = tl.load(length_ptr)
    if HOT_WAYS > 0:
        # Both are asked for at once: which it is, the length tells, and that is still on its way.
        even, odd = tl.load(hot_order + row), tl.load(hot_order + rows + row)
        row = tl.where(length % 2 == 0, even, odd)
    if scoring:
        # Within this branch: with the same in front of it, Triton 3.6 copies the tail's numbers one by one.
        if HOT_WAYS > 0:  # noqa: SIM102 - a constant
            if nth == 0:
                place = hot_rank(hot_counts + length % 2 * rows, row, rows, TILE)
                tl.store(hot_order + (1 - length % 2) * rows + place, row)
        score_piece(
            query, keys, key_scales, key_centre, mask, scores, block_top, part_max, part_sum, length, row, nth, splits,
            stride_qb, stride_qh, stride_kb, stride_kh, stride_kl, stride_sb, stride_sh, stride_mb,
            capacity, blocks, scaling, softcap, HEADS, REPEAT, G, G2, GP, D, BLOCK_D, BLOCK_L, BLOCK, STAGES,
            HAS_MASK, HAS_SOFTCAP, IS_NARROW, UPCAST,
        )  # fmt: skip
        # All of a program's stores are ordered before its count, and a reader's loads after all counts.
        tl.debug_barrier()
        scored = tl.atomic_add(done + row, 1, sem="acq_rel", scope="gpu")
        if FETCHES:  # noqa: SIM102 - a constant, which in one condition with what is not would be none any more
            if scored == splits - 1:
                tl.debug_barrier()
                fetch_picked(
                    query, keys, key_lower, key_scales, key_centre, values, value_scales, coefficients, base, basis,
                    sinks, threshold, scores, block_top, part_max, part_sum, lse, listed, found, done, partial, shares,
                    held, tickets, picks, pick_weights, weights, out, mass, grown, tally, hot_store, hot_tags,
                    hot_stamps, hot_clock, hot_claims, hot_counts, hot_order, hot_slots, hot_hits, source, source_at,
                    length, row, rows, stride_qb, stride_qh, stride_kb, stride_kh, stride_kl, stride_sb, stride_sh,
                    stride_vb, stride_vh, stride_vl, stride_wb, stride_wh, stride_cb, stride_ch, stride_cr, stride_ob,
                    stride_oh, capacity, blocks, scaling, softcap, splits, tail_splits, programs, PICK, HEADS, REPEAT,
                    G, G2, GP, SP, D, BLOCK_D, BLOCK, MOST, TILE, MP, BP, GS, REFINED, WEIGHED, ROWS, DV, BLOCK_DV,
                    RANK, RQ, RP, STEP, RANK_STEP, HOT_SETS, HOT_WAYS, HAS_SOFTCAP, HAS_LOWER, HAS_SINKS, HAS_TALLY,
                    HAS_SCALES, RENORMALISE, UPCAST,
                )  # fmt: skip
    else:
        if RANK > 0:
            GROUPS: tl.constexpr = (RANK + AT_ONCE - 1) // AT_ONCE
            batch = (row // HEADS).to(tl.int64)
            head = row % HEADS
            kv_head = head // REPEAT
            wait_for(done + row, splits)
            tail_share(
                scores, part_max, part_sum, sinks,
                coefficients + batch * stride_cb + kv_head.to(tl.int64) * stride_ch, shares, held, length, row, head,
                nth // GROUPS, nth % GROUPS * AT_ONCE, stride_cr, capacity, splits, tail_splits,
                G, G2, SP, RANK, RP, AT_ONCE, BLOCK_T, TAIL_STAGES, HAS_SINKS, ALIGNED,
            )  # fmt: skip
            finish(
                tickets, done, partial, shares, held, base, basis, out, mass, grown, row, batch, head,
                batch * (HEADS // REPEAT) + kv_head, tail_splits, programs, stride_ob, stride_oh,
                G, G2, DV, BLOCK_DV, RANK, RP, RANK_STEP, STEP, RENORMALISE, HAS_LOWER,
            )  # fmt: skip


@triton.jit(do_not_specialize=["splits", "tail_splits", "programs", "source_at"])
def fetch_kernel(
    length_ptr, query, keys, key_lower, key_scales, key_centre, values, value_scales, coefficients, base, basis, sinks,
    threshold, scores, block_top, part_max, part_sum, lse, listed, found, done, partial, shares, held, tickets, picks,
    pick_weights, weights, out, mass, grown, tally, hot_store, hot_tags, hot_stamps, hot_clock, hot_claims, hot_counts,
    hot_order, hot_slots, hot_hits, source, source_at, stride_qb, stride_qh, stride_kb, stride_kh, stride_kl,
    stride_sb, stride_sh, stride_vb, stride_vh, stride_vl, stride_wb, stride_wh, stride_cb, stride_ch, stride_cr,
    stride_ob, stride_oh, capacity, blocks, scaling, softcap, splits, tail_splits, programs,
    PICK: tl.constexpr, HEADS: tl.constexpr, REPEAT: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, GP: tl.constexpr,
    SP: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
    TILE: tl.constexpr, MP: tl.constexpr, BP: tl.constexpr, GS: tl.constexpr, REFINED: tl.constexpr,
    WEIGHED: tl.constexpr, ROWS: tl.constexpr, DV: tl.constexpr, BLOCK_DV: tl.constexpr, RANK: tl.constexpr,
    RQ: tl.constexpr, RP: tl.constexpr, STEP: tl.constexpr, RANK_STEP: tl.constexpr, HOT_SETS: tl.constexpr,
    HOT_WAYS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_LOWER: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_TALLY: tl.constexpr, HAS_SCALES: tl.constexpr, RENORMALISE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Select, fetch and combine after a ``step_kernel`` that does not; one program per row of work."""
    fetch_picked(
        query, keys, key_lower, key_scales, key_centre, values, value_scales, coefficients, base, basis, sinks,
        threshold, scores, block_top, part_max, part_sum, lse, listed, found, done, partial, shares, held, tickets,
        picks, pick_weights, weights, out, mass, grown, tally, hot_store, hot_tags, hot_stamps, hot_clock, hot_claims,
        hot_counts, hot_order, hot_slots, hot_hits, source, source_at, tl.load(length_ptr), tl.program_id(0),
        tl.num_programs(0), stride_qb, stride_qh, stride_kb, stride_kh, stride_kl, stride_sb, stride_sh, stride_vb,
        stride_vh, stride_vl, stride_wb, stride_wh, stride_cb, stride_ch, stride_cr, stride_ob, stride_oh, capacity,
        blocks, scaling, softcap, splits, tail_splits, programs, PICK, HEADS, REPEAT, G, G2, GP, SP, D, BLOCK_D, BLOCK,
        MOST, TILE, MP, BP, GS, REFINED, WEIGHED, ROWS, DV, BLOCK_DV, RANK, RQ, RP, STEP, RANK_STEP, HOT_SETS, HOT_WAYS,
        HAS_SOFTCAP, HAS_LOWER, HAS_SINKS, HAS_TALLY, HAS_SCALES, RENORMALISE, UPCAST,
    )  # fmt: skip

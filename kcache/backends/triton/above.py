"""Above: the rows whose weight exceeds a threshold (``spread="need"``), at most M of a row of work, the largest.

Two kernels. ``list_kernel`` takes the place of the weight kernel: it turns the scores into probabilities and lists,
chunk by chunk, the rows in which the largest of the group's is above the sequence's threshold. ``above_kernel``, one
program per row of work, joins the lists of the chunks. A row is listed as one integer, its weight's bits above its
position, so that no two are equal: where more than M are listed, the M-th largest is found by searching the integers
four ways at a time, and exactly M lie at or above it.

Shapes: R rows of work, G heads of each, C chunks, M picks at most.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kcache.backends.triton.hot import hot_lookup
from kcache.backends.triton.score import log_sum_exp
from kcache.backends.triton.select import count_three


@triton.jit(do_not_specialize=["splits", "chunks"])
def list_kernel(
    scores, part_max, part_sum, sinks, threshold, lse, found, found_count, length_ptr, capacity, chunks, splits,
    HEADS: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, CHUNK: tl.constexpr,
    HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """One program: ``CHUNK`` rows of one row of work; programs past the length leave at once."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    length = tl.load(length_ptr)
    if chunk * CHUNK < length:
        heads = tl.arange(0, GP)
        pos = chunk * CHUNK + tl.arange(0, CHUNK)
        s_ptrs = scores + (row.to(tl.int64) * G + heads)[:, None] * capacity + pos[None, :]
        # The scratch holds whole chunks, so no position needs a mask, which would split 16-byte loads.
        score = tl.load(s_ptrs, mask=(heads < G)[:, None], other=float("-inf"))
        norm = log_sum_exp(part_max, part_sum, sinks, row, row % HEADS, splits, G, GP, SP, HAS_SINKS)
        if chunk == 0:
            tl.store(lse + row * G + heads, norm, mask=heads < G)
        weight = tl.max(tl.where((pos < length)[None, :], tl.exp2(score - norm[:, None]), 0.0), 0)
        above = (weight > tl.load(threshold + row // HEADS)) & (pos < length)
        place = tl.cumsum(above.to(tl.int32), 0) - 1
        key = (weight.to(tl.int32, bitcast=True).to(tl.int64) << 32) | pos.to(tl.int64)
        tl.store(found + row.to(tl.int64) * capacity + chunk * CHUNK + place, key, mask=above)
        tl.store(found_count + row * chunks + chunk, tl.sum(above.to(tl.int32), 0))


@triton.jit
def join_lists(found, ends, picks, row, total, CP: tl.constexpr, LEVELS: tl.constexpr, CHUNK: tl.constexpr,
               MOST: tl.constexpr, TILE: tl.constexpr):  # fmt: skip
    """Move a row's ``total`` entries to the front of ``found`` and write the positions of the first M."""
    lane = tl.arange(0, TILE)
    for first in range(0, total, TILE):
        nth = first + lane
        live = nth < total
        chunk = tl.zeros([TILE], tl.int32)  # the first chunk that ends past the nth entry
        half = total * 0 + CP
        for _level in tl.static_range(LEVELS):
            half = half // 2
            end = tl.load(ends + row * CP + chunk + half - 1, mask=live, other=0, cache_modifier=".cg")
            chunk += tl.where(end <= nth, half, 0)
        start = tl.load(ends + row * CP + chunk - 1, mask=live & (chunk > 0), other=0, cache_modifier=".cg")
        key = tl.load(found + chunk * CHUNK + nth - start, mask=live, other=0, cache_modifier=".cg")
        # No entry stands before its place in the joined list, so what is overwritten has been read.
        tl.debug_barrier()
        tl.store(found + nth, key, mask=live)
        tl.store(picks + row * MOST + nth, (key & 0x7FFFFFFF).to(tl.int32), mask=live & (nth < MOST))
        tl.debug_barrier()


@triton.jit
def count_listed(found, total, first, step, TILE: tl.constexpr):
    """:func:`count_three` over a list in memory."""
    lane = tl.arange(0, TILE)
    one, two, three = total * 0, total * 0, total * 0
    for begin in range(0, total, TILE):
        key = tl.load(found + begin + lane, mask=begin + lane < total, other=-1, cache_modifier=".cg")
        a, b, c = count_three(key, first, step)
        one += a
        two += b
        three += c
    return one, two, three


@triton.jit
def keep_largest(found, picks, row, total, least, MOST: tl.constexpr, TILE: tl.constexpr):
    """Write the positions of the M largest of a row's ``total`` > M entries, none of which is below ``least``."""
    low = least
    high = low * 0 + (1 << 62)  # a probability's bits are less than those of 2.0
    at_low = total
    while at_low != MOST:
        step = tl.maximum((high - low) // 4, 1)
        first, second, third = count_listed(found, total, low + step, step, TILE)
        new_high = tl.where(third < MOST, low + 3 * step, high)
        new_high = tl.where(second < MOST, low + 2 * step, new_high)
        new_high = tl.where(first < MOST, low + step, new_high)
        at_low = tl.where(first >= MOST, first, at_low)
        at_low = tl.where(second >= MOST, second, at_low)
        at_low = tl.where(third >= MOST, third, at_low)
        low = low + step * ((first >= MOST).to(tl.int64) + (second >= MOST).to(tl.int64) + (third >= MOST).to(tl.int64))
        high = new_high
    lane = tl.arange(0, TILE)
    kept = total * 0
    for begin in range(0, total, TILE):
        key = tl.load(found + begin + lane, mask=begin + lane < total, other=-1, cache_modifier=".cg")
        over = key >= low
        place = kept + tl.cumsum(over.to(tl.int32), 0) - 1
        tl.store(picks + row * MOST + place, (key & 0x7FFFFFFF).to(tl.int32), mask=over)
        kept += tl.sum(over.to(tl.int32), 0)


@triton.jit(do_not_specialize=["chunks"])
def above_kernel(
    threshold, found, found_count, ends, picks, counts, tally, length_ptr,
    hot_tags, hot_stamps, hot_clock, hot_claims, hot_slots, hot_inserts, hot_hits,
    capacity, chunks,
    HEADS: tl.constexpr, CP: tl.constexpr, LEVELS: tl.constexpr, CHUNK: tl.constexpr, MOST: tl.constexpr,
    TILE: tl.constexpr, HAS_TALLY: tl.constexpr, HOT_SETS: tl.constexpr, HOT_WAYS: tl.constexpr,
    HOT_TILE: tl.constexpr,
):  # fmt: skip
    """One program per row of work. ``CP``: power of two holding all chunks, ``LEVELS`` its exponent."""
    row = tl.program_id(0)
    live_chunks = tl.cdiv(tl.load(length_ptr), CHUNK)
    every = tl.arange(0, CP)
    listed = tl.load(found_count + row * chunks + every, mask=every < live_chunks, other=0)
    tl.store(ends + row * CP + every, tl.cumsum(listed, 0))
    total = tl.sum(listed, 0)
    tl.debug_barrier()
    own = found + row.to(tl.int64) * capacity
    join_lists(own, ends, picks, row, total, CP, LEVELS, CHUNK, MOST, TILE)
    if total > MOST:
        bits = tl.load(threshold + row // HEADS).to(tl.int32, bitcast=True)
        keep_largest(own, picks, row, total, tl.maximum(bits, 0).to(tl.int64) << 32, MOST, TILE)
    kept = tl.minimum(total, MOST)
    lane = tl.arange(0, TILE)
    for first in range(0, MOST, TILE):
        tl.store(picks + row * MOST + first + lane, -1, mask=(first + lane >= kept) & (first + lane < MOST))
    tl.store(counts + row, kept)
    if HAS_TALLY:
        tl.atomic_add(tally + row // HEADS, kept.to(tl.int64))
    if HOT_WAYS > 0:
        tl.debug_barrier()
        hot_lookup(
            picks, hot_tags, hot_stamps, hot_clock, hot_claims, hot_slots, hot_inserts, hot_hits, row, kept,
            MOST, HOT_TILE, HOT_SETS, HOT_WAYS,
        )  # fmt: skip

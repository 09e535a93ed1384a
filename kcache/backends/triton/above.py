"""Above: the rows whose weight exceeds a threshold (``spread="need"``), at most M of a row of work, the largest.

One program per row of work, in two rounds. Round one lists the blocks whose largest score comes to a weight above the
threshold, round two the rows above it among theirs: of the scores it reads only what lies beside a pick. What a round
reads is asked for ahead, since under load a round trip takes longer than what is done with its answer. A row is
listed as one integer, its weight's bits above its position, so that no two are equal: where more than M are listed, the
M-th largest is found by searching the integers four ways at a time, and exactly M lie at or above it.

Shapes: R rows of work, G heads of each, M picks at most.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kcache.backends.triton.score import log_sum_exp
from kcache.backends.triton.select import count_three


@triton.jit
def read_tops(block_top, row, first, live_blocks, blocks, G: tl.constexpr, GP: tl.constexpr, TILE: tl.constexpr):
    """The largest scores ``[GP, TILE]`` of a row's blocks from number ``first`` on; anything from the last on.

    There is room for a multiple of 16 blocks, so that a mask of whole fours need not split wide loads.
    """
    heads = tl.arange(0, GP)
    block = first + tl.arange(0, TILE)
    t_ptrs = block_top + (row.to(tl.int64) * G + heads)[:, None] * blocks + block[None, :]
    readable = tl.cdiv(live_blocks, 4) * 4
    return tl.load(t_ptrs, mask=(heads < G)[:, None] & (block < readable)[None, :], other=float("-inf"))


@triton.jit
def list_blocks(
    block_top, listed, tops, norm, least, row, live_blocks, blocks,
    G: tl.constexpr, GP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """List a row's blocks with a weight above ``least``, in order; returns how many there are.

    ``tops`` are those of the first blocks; the next ones are asked for before those at hand are looked at.
    """
    lane = tl.arange(0, TILE)
    own = listed + row.to(tl.int64) * blocks
    count = live_blocks * 0
    for first in range(0, live_blocks, TILE):
        next_tops = read_tops(block_top, row, first + TILE, live_blocks, blocks, G, GP, TILE)
        over = (tl.max(tl.exp2(tops - norm[:, None]), 0) > least) & (first + lane < live_blocks)
        running = tl.cumsum(over.to(tl.int32), 0)
        tl.store(own + count + running - 1, first + lane, mask=over)
        count += tl.max(running, 0)
        tops = next_tops
    return count


@triton.jit
def read_listed(listed, row, first, count, blocks, BLOCK: tl.constexpr, TILE: tl.constexpr):
    """Positions ``[TILE]`` of the rows of a row's listed blocks, from the ``first``-th on."""
    lane = first + tl.arange(0, TILE)
    nth = lane // BLOCK
    return tl.load(listed + row.to(tl.int64) * blocks + nth, mask=nth < count, other=0) * BLOCK + lane % BLOCK


@triton.jit
def read_scores(
    scores, pos, row, first, count, capacity, G: tl.constexpr, GP: tl.constexpr, BLOCK: tl.constexpr, TILE: tl.constexpr
):
    """Scores ``[GP, TILE]`` of those rows; -inf past the last of ``count`` blocks."""
    heads = tl.arange(0, GP)
    there = (first + tl.arange(0, TILE)) // BLOCK < count
    # The scratch holds whole blocks, so no position needs a mask.
    s_ptrs = scores + (row.to(tl.int64) * G + heads)[:, None] * capacity + pos[None, :]
    return tl.load(s_ptrs, mask=(heads < G)[:, None] & there[None, :], other=float("-inf"))


@triton.jit
def list_rows(
    scores, listed, found, picks, norm, least, row, count, length, capacity, blocks,
    G: tl.constexpr, GP: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """List the rows above ``least`` of the ``count`` listed blocks, in order, the first M as picks; returns how many.

    A step takes TILE rows; the scores of the next step's and the positions of those after are on their way meanwhile.
    """
    lane = tl.arange(0, TILE)
    total = count * 0
    pos = read_listed(listed, row, 0, count, blocks, BLOCK, TILE)
    next_pos = read_listed(listed, row, TILE, count, blocks, BLOCK, TILE)
    score = read_scores(scores, pos, row, 0, count, capacity, G, GP, BLOCK, TILE)
    for first in range(0, count * BLOCK, TILE):
        last_pos = read_listed(listed, row, first + 2 * TILE, count, blocks, BLOCK, TILE)
        next_score = read_scores(scores, next_pos, row, first + TILE, count, capacity, G, GP, BLOCK, TILE)
        weight = tl.max(tl.exp2(score - norm[:, None]), 0)
        over = (weight > least) & ((first + lane) // BLOCK < count) & (pos < length)
        running = tl.cumsum(over.to(tl.int32), 0)
        place = total + running - 1
        key = (weight.to(tl.int32, bitcast=True).to(tl.int64) << 32) | pos.to(tl.int64)
        tl.store(found + row.to(tl.int64) * capacity + place, key, mask=over)
        tl.store(picks + row * MOST + place, pos, mask=over & (place < MOST))
        total += tl.max(running, 0)
        pos, next_pos, score = next_pos, last_pos, next_score
    return total


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


@triton.jit
def pick_above(
    scores, block_top, part_max, part_sum, sinks, threshold, lse, listed, found, picks, tally, clock, source, source_at,
    length, row, capacity, blocks, splits,
    HEADS: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, SP: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
    TILE: tl.constexpr, MP: tl.constexpr, BP: tl.constexpr, GS: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_TALLY: tl.constexpr,
):  # fmt: skip
    """Write a row's picks, filled up with -1, and its heads' log-sum-exps; returns how many rows were picked."""
    least = tl.load(threshold + row // HEADS)
    heads = tl.arange(0, G2)
    live_blocks = tl.cdiv(length, BLOCK)
    tops = read_tops(block_top, row, 0, live_blocks, blocks, G, G2, TILE)
    tl.debug_barrier()  # else the assembler asks for them after what the log-sum-exp waits for
    norm = log_sum_exp(part_max, part_sum, sinks, row, row % HEADS, splits, G, G2, SP, HAS_SINKS)
    tl.store(lse + row * G + heads, norm, mask=heads < G)
    count = list_blocks(block_top, listed, tops, norm, least, row, live_blocks, blocks, G, G2, TILE)
    tl.debug_barrier()
    total = list_rows(
        scores, listed, found, picks, norm, least, row, count, length, capacity, blocks, G, G2, BLOCK, MOST, TILE
    )
    if total > MOST:
        tl.debug_barrier()
        bits = tl.maximum(least.to(tl.int32, bitcast=True), 0)
        keep_largest(found + row.to(tl.int64) * capacity, picks, row, total, bits.to(tl.int64) << 32, MOST, TILE)
    kept = tl.minimum(total, MOST)
    lane = tl.arange(0, TILE)
    for first in range(0, MOST, TILE):
        tl.store(picks + row * MOST + first + lane, -1, mask=(first + lane >= kept) & (first + lane < MOST))
    if HAS_TALLY:
        tl.atomic_add(tally + row // HEADS, kept.to(tl.int64), sem="relaxed")
    return kept

"""Select: the exact TopN positions of a row (``spread="even"``).

One program per row of work, in two rounds, neither of which sorts or reads the whole row. The N largest rows lie in
the N blocks with the largest maxima (with ties, in any N such blocks that hold all larger ones), so round one takes N
blocks by their maxima and round two N rows among those blocks'. A round finds the N-th largest value by searching the
integers that order like the fp32 values, four ways at a time, and stops as soon as exactly N values lie above;
ties at the threshold are taken in order of position.

Shapes: R rows of work, G heads of each, N picks.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kcache.backends.triton.score import log_sum_exp


@triton.jit
def count_three(keys, first, step):
    """How many keys are at least ``first``, ``first + step`` and ``first + 2 step``, in one reduction."""
    ones = (keys >= first).to(tl.int64)
    ones += (keys >= first + step).to(tl.int64) << 21
    ones += (keys >= first + 2 * step).to(tl.int64) << 42
    packed = tl.sum(ones, 0)
    field = (1 << 21) - 1
    return (packed & field).to(tl.int32), ((packed >> 21) & field).to(tl.int32), (packed >> 42).to(tl.int32)


@triton.jit
def find_threshold(keys, target, least):
    """Bounds ``low < high`` such that the TopN are all keys >= high and the first ``target - above`` in [low, high).

    Parameters
    ----------
    keys : int32 tile
        Order like the values; -1 for what must not be taken. At least ``target`` keys are 0 or more.
    target : int32
        How many to take, at least 1.
    least : int32
        A guess of a value with ``target`` keys at or above it; 0 is always right.

    Returns
    -------
    low, high, above : int32
        ``above`` is the number of keys >= high, less than ``target``.
    """
    reached, valid, _unused = count_three(keys, least, -least)
    low = tl.where(reached >= target, least, 0)
    at_low = tl.where(reached >= target, reached, valid)
    high = tl.max(keys, 0) + 1
    above = high * 0
    while (high - low > 1) & (at_low != target):
        step = tl.maximum((high - low) // 4, 1)
        first, second, third = count_three(keys, low + step, step)
        new_high = tl.where(third < target, low + 3 * step, high)
        new_above = tl.where(third < target, third, above)
        new_high = tl.where(second < target, low + 2 * step, new_high)
        new_above = tl.where(second < target, second, new_above)
        new_high = tl.where(first < target, low + step, new_high)
        new_above = tl.where(first < target, first, new_above)
        at_low = tl.where(first >= target, first, at_low)
        at_low = tl.where(second >= target, second, at_low)
        at_low = tl.where(third >= target, third, at_low)
        low = low + step * (
            (first >= target).to(tl.int32) + (second >= target).to(tl.int32) + (third >= target).to(tl.int32)
        )
        high = new_high
        above = new_above
    return low, high, above


@triton.jit
def take(keys, low, high, above, target):
    """Which keys are taken, and at which place in the list: those above the threshold first, then the first ties."""
    over = keys >= high
    tie = (keys >= low) & (keys < high)
    # Both running counts in one scan; tiles hold 2**15 keys at most, so many ties reach the sign.
    running = tl.cumsum(over.to(tl.int32) + (tie.to(tl.int32) << 16), 0)
    place = tl.where(over, (running & 0xFFFF) - 1, above + ((running >> 16) & 0xFFFF) - 1)
    return (over | tie) & (place < target), place


@triton.jit
def larger(one, other):
    """The larger of two numbers, ``one`` where ``other`` is none; the interpreter's maximum would be none, too."""
    return tl.where(other > one, other, one)


@triton.jit
def pick_most(
    scores, block_top, part_max, part_sum, sinks, threshold, lse, listed, found, picks, tally, clock, source, source_at,
    length, row, capacity, blocks, splits,
    HEADS: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, SP: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
    TILE: tl.constexpr, MP: tl.constexpr, BP: tl.constexpr, GS: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_TALLY: tl.constexpr,
):  # fmt: skip
    """Write a row's N = ``MOST`` picks, filled up with -1, and its heads' log-sum-exps; returns how many were picked.

    ``G2``, ``SP``, ``MP``, ``BP``: powers of two that hold the heads, the pieces, N picks, all blocks; ``GS``: heads at
    once.
    """
    CANDIDATES: tl.constexpr = MP * BLOCK
    live_blocks = tl.cdiv(length, BLOCK)
    n_blocks = tl.minimum(live_blocks, MOST)
    n_rows = tl.minimum(length, MOST)

    heads = tl.arange(0, G2)
    norms = log_sum_exp(part_max, part_sum, sinks, row, row % HEADS, splits, G, G2, SP, HAS_SINKS)
    tl.store(lse + row * G + heads, norms, mask=heads < G)
    all_blocks = tl.arange(0, BP)
    t_ptrs = block_top + row.to(tl.int64) * G * blocks + all_blocks
    live = all_blocks < live_blocks
    best = tl.zeros([BP], tl.float32)
    for head in range(G):
        tops = tl.load(t_ptrs + head * blocks, mask=live, other=float("-inf"))
        best = larger(best, tl.exp2(tops - tl.sum(tl.where(heads == head, norms, 0.0), 0)))
    block_keys = tl.where(live, best.to(tl.int32, bitcast=True), -1)
    low, high, above = find_threshold(block_keys, n_blocks, 0)
    taken, place = take(block_keys, low, high, above, n_blocks)
    own = listed + row.to(tl.int64) * blocks
    tl.store(own + place, all_blocks, mask=taken)
    tl.debug_barrier()

    lane = tl.arange(0, CANDIDATES)
    nth = lane // BLOCK
    block = tl.load(own + nth, mask=nth < n_blocks, other=0, cache_modifier=".cg")
    pos = block * BLOCK + lane % BLOCK
    inside = (nth < n_blocks) & (pos < length)
    few = tl.arange(0, GS)
    s_ptrs = scores + row.to(tl.int64) * G * capacity + few[:, None] * capacity + pos[None, :]
    weight = tl.zeros([CANDIDATES], tl.float32)
    for first in range(0, G, GS):
        there = (first + few < G)[:, None]
        score = tl.load(s_ptrs + first * capacity, mask=there & inside[None, :], other=float("-inf"))
        norm = tl.load(lse + row * G + first + few, mask=first + few < G, other=0.0)
        weight = larger(weight, tl.max(tl.exp2(score - norm[:, None]), 0))
    keys = tl.where(inside, weight.to(tl.int32, bitcast=True), -1)
    # N blocks reach down to `low`, so N rows do as well, but for rounding between the two kernels.
    low, high, above = find_threshold(keys, n_rows, tl.maximum(low - 64, 0))
    taken, place = take(keys, low, high, above, n_rows)
    slot = tl.arange(0, MP)
    tl.store(picks + row * MOST + slot, -1, mask=(slot >= n_rows) & (slot < MOST))
    tl.store(picks + row * MOST + place, pos, mask=taken)
    return n_rows

"""Refine: with K in two planes of 8 bits, what is picked is scored again, by both.

All rows were scored by the upper plane. Between select and fetch, ``refine_picks`` reads both planes of a row of work's
picks, a few hundred bytes of each, and makes their scores as near to exact as K is kept. The sum of all exponentials
changes with them: what it grew to is kept for the tail, which was summed with the old one.

Shapes: G heads of a row of work, M picks at most, D head size.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kcache.backends.triton.common import LOWER
from kcache.backends.triton.score import digits_of, log2_score, whole_product


@triton.jit
def read_plane(plane, places, columns, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows ``[TILE, BLOCK_D]`` of one plane; of those that no pick needs, anything."""
    if D == BLOCK_D:
        return tl.load(plane + places)
    return tl.load(plane + places, mask=columns[None, :], other=0)


@triton.jit
def refine_picks(
    query, upper, lower, scales, centre, scores, lse, grown, picks, refined, row, count, stride_qh, stride_kl, capacity,
    scaling, softcap,
    G: tl.constexpr, G2: tl.constexpr, WIDTH: tl.constexpr, TILE: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Write the scores of a row of work's picks by both planes, ``refined`` ``[G, M]`` (log2 units).

    ``query`` is that of its first head, both planes, ``scales`` and ``centre`` are its KV head's. Its log-sum-exps
    ``lse`` are brought up to date, and ``grown`` ``[G]`` tells by how many times the sum of exponentials grew: without
    end where nothing is left beside the picks.
    """
    COLUMNS: tl.constexpr = max(16, 4 * G2)
    heads = tl.arange(0, G2)
    dims = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, TILE)
    digits, unit, shift = digits_of(query, stride_qh, centre, dims, G, G2, COLUMNS, D)
    norm = tl.load(lse + row * G + heads, mask=heads < G, other=0.0)
    # Running maxima stay per lane of the tile. They begin with the old sum, to which all here is relative.
    top = tl.zeros([TILE, G2], tl.float32)
    total, taken = top, top
    for first in tl.range(0, count, TILE, num_stages=1):
        nth = first + lanes
        live = nth < count
        # What is past the last pick reads row 0: of loads under a mask the assembler makes one after the other.
        pick = tl.maximum(tl.load(picks + row * WIDTH + tl.minimum(nth, WIDTH - 1)), 0)
        places = pick[:, None] * stride_kl + dims[None, :]
        high = read_plane(upper, places, dims < D, D, BLOCK_D)
        low = read_plane(lower, places, dims < D, D, BLOCK_D)
        scale = tl.load(scales + pick)
        own = live[:, None] & (heads < G)[None, :]
        s_ptrs = scores + (row.to(tl.int64) * G + heads)[None, :] * capacity + pick[:, None]
        before = tl.load(s_ptrs, mask=own, other=float("-inf"))
        product = whole_product(high, digits, unit, G2, COLUMNS, TILE)
        product += whole_product(low, digits, unit, G2, COLUMNS, TILE) * (1.0 / LOWER)
        score = log2_score(product * scale[:, None] + shift[None, :], scaling, softcap, HAS_SOFTCAP)
        score = tl.where(before == float("-inf"), before, score)  # of masked rows
        tl.store(refined + (row * G + heads)[None, :] * WIDTH + nth[:, None], score, mask=own)
        taken += tl.exp2(before - norm[None, :])
        higher = tl.maximum(top, score - norm[None, :])
        total = total * tl.exp2(top - higher) + tl.exp2(score - norm[None, :] - higher)
        top = higher
    peak = tl.max(top, 0)
    # What is not picked; nothing where that is no more than rounding, which a sum that shrinks as far would consist of.
    left = 1.0 - tl.sum(taken, 0)
    left = tl.where(left > 1.0e-7 * (tl.abs(norm) + 8.0), left, 0.0)
    new = left * tl.exp2(-peak) + tl.sum(total * tl.exp2(top - peak[None, :]), 0)
    tl.debug_barrier()  # all have read the old log-sum-exp
    change = peak + tl.log2(tl.maximum(new, 1.0e-37))
    tl.store(grown + row * G + heads, tl.where(left > 0.0, tl.exp2(change), float("inf")), mask=heads < G)
    tl.store(lse + row * G + heads, norm + change, mask=heads < G)

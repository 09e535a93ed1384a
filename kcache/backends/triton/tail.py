"""The tail: what all rows hold along the low-rank directions of V, out of device memory alone.

It needs the scores and nothing of what is picked, so it runs beside select and fetch. A program streams scores and the
tail's coefficients of a share of a row of work's rows and sums ``p c`` and ``p``; fetch takes the picks' part away
again. The sums stay apart lane by lane until the end: a matrix product of so few columns would wait more than it
multiplies.

Shapes: R rows of work, G heads of each, r directions, of which a program takes up to ``AT_ONCE``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kcache.backends.triton.score import log_sum_exp

DIRECTIONS = 8
"""Directions of a program: with G heads, it holds so many times G sums in every lane."""


@triton.jit
def along_directions(
    scores, norm, coefficients, row, share, shares, length, capacity, stride_cr, first_direction,
    G: tl.constexpr, GP: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """``sum_i p_i c_i`` ``[GP, RP]`` and ``sum_i p_i`` ``[GP]`` over one share of all rows.

    Rows lie side by side here, so a mask that ends between them would split wide loads: the scratch of the scores holds
    whole tiles and needs none, and with ``ALIGNED`` there is room for the coefficients of 16 rows wherever one is.
    """
    heads = tl.arange(0, GP)
    directions = first_direction + tl.arange(0, RP)
    lanes = tl.arange(0, BLOCK_T)
    s_base = scores + (row.to(tl.int64) * G + heads)[:, None] * capacity
    rows = tl.cdiv(tl.cdiv(length, BLOCK_T), shares) * BLOCK_T
    start = share * rows
    end = tl.minimum(start + rows, length)
    readable = end
    if ALIGNED:
        readable = tl.cdiv(end, 16) * 16
    c_base = coefficients + directions[:, None] * stride_cr
    along = tl.zeros([GP, RP, BLOCK_T], tl.float32)
    held = tl.zeros([GP, BLOCK_T], tl.float32)
    for first in tl.range(start, end, BLOCK_T, num_stages=STAGES):
        pos = first + lanes
        inside = pos < end
        score = tl.load(s_base + pos[None, :], mask=(heads < G)[:, None], other=float("-inf"))
        prob = tl.where(inside[None, :], tl.exp2(score - norm[:, None]), 0.0)
        c_mask = (directions < RANK)[:, None] & (pos < readable)[None, :]
        part = tl.load(c_base + pos[None, :], mask=c_mask, other=0.0).to(tl.float32)
        along += prob[:, None, :] * tl.where(inside[None, :], part, 0.0)[None, :, :]
        held += prob
    return tl.sum(along, 2), tl.sum(held, 1)


@triton.jit
def tail_share(
    scores, part_max, part_sum, sinks, coefficients, shares, held, length, row, head, share, first_direction,
    stride_cr, capacity, splits, tail_splits,
    G: tl.constexpr, G2: tl.constexpr, SP: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, AT_ONCE: tl.constexpr,
    BLOCK_T: tl.constexpr, STAGES: tl.constexpr, HAS_SINKS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One share of one row of work along ``AT_ONCE`` of its ``RANK`` directions; ``coefficients`` are its head's.

    ``RP``: room for directions in a sum.
    """
    heads = tl.arange(0, G2)
    directions = first_direction + tl.arange(0, AT_ONCE)
    norm = log_sum_exp(part_max, part_sum, sinks, row, head, splits, G, G2, SP, HAS_SINKS)
    along, total = along_directions(
        scores, norm, coefficients, row, share, tail_splits, length, capacity, stride_cr, first_direction,
        G, G2, RANK, AT_ONCE, BLOCK_T, STAGES, ALIGNED,
    )  # fmt: skip
    place = row * (1 + tail_splits) + share
    s_ptrs = shares + (place * G + heads)[:, None] * RP + directions[None, :]
    tl.store(s_ptrs, along, mask=(heads < G)[:, None] & (directions < RANK)[None, :])
    if first_direction == 0:
        tl.store(held + place * G + heads, total, mask=heads < G)

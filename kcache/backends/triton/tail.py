"""The tail: what all rows hold along the low-rank directions of V, out of device memory alone.

It needs the scores and nothing of what is picked, so it runs beside select. Each program streams scores and the tail's
coefficients of a share of a row of work's rows and sums ``p c`` and ``p``; gather takes the picks' part away again.
The sums stay apart lane by lane until the end: a matrix product of so few columns would wait more than it multiplies.

Shapes: R rows of work, G heads of each, r directions, of which a program takes up to ``AT_ONCE``.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kcache.backends.triton.gather import finish
from kcache.backends.triton.score import log_sum_exp

DIRECTIONS = 8
"""Directions of a program: with G heads, it holds so many times G sums in every lane."""


@triton.jit
def along_directions(
    scores, norm, coefficients, row, share, shares, length, capacity, stride_cr, first_direction,
    G: tl.constexpr, GP: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, BLOCK_T: tl.constexpr,
    ALIGNED: tl.constexpr,
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
    for first in range(start, end, BLOCK_T):
        pos = first + lanes
        inside = pos < end
        score = tl.load(s_base + pos[None, :], mask=(heads < G)[:, None], other=float("-inf"))
        prob = tl.where(inside[None, :], tl.exp2(score - norm[:, None]), 0.0)
        c_mask = (directions < RANK)[:, None] & (pos < readable)[None, :]
        part = tl.load(c_base + pos[None, :], mask=c_mask, other=0.0).to(tl.float32)
        along += prob[:, None, :] * tl.where(inside[None, :], part, 0.0)[None, :, :]
        held += prob
    return tl.sum(along, 2), tl.sum(held, 1)


@triton.jit(do_not_specialize=["splits", "tail_splits", "tickets"])
def tail_kernel(
    scores, part_max, part_sum, sinks, coefficients, base, basis, partial, shares, held, counters, counts, out,
    mass, length_ptr, stride_cb, stride_ch, stride_cr, stride_ob, stride_oh, capacity, splits, tail_splits, tickets,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, SP: tl.constexpr,
    ROWS: tl.constexpr, PARTS: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, RANK: tl.constexpr,
    RP: tl.constexpr, AT_ONCE: tl.constexpr, BLOCK_T: tl.constexpr, STEP: tl.constexpr, RANK_STEP: tl.constexpr,
    RENORMALISE: tl.constexpr, HAS_SINKS: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """One program: one share of one row of work along ``AT_ONCE`` of its ``RANK`` directions.

    ``RP``: room for directions in a sum.
    """
    pid = tl.program_id(0)
    first_direction = tl.program_id(1) * AT_ONCE
    row = pid // tail_splits
    share = pid % tail_splits
    batch = (row // HEADS).to(tl.int64)
    head = row % HEADS
    kv_head = head // REPEAT
    heads = tl.arange(0, G2)
    directions = first_direction + tl.arange(0, AT_ONCE)
    norm = log_sum_exp(part_max, part_sum, sinks, row, head, splits, G, G2, SP, HAS_SINKS)
    along, total = along_directions(
        scores, norm, coefficients + batch * stride_cb + kv_head.to(tl.int64) * stride_ch, row, share, tail_splits,
        tl.load(length_ptr), capacity, stride_cr, first_direction, G, G2, RANK, AT_ONCE, BLOCK_T, ALIGNED,
    )  # fmt: skip
    place = row * (PARTS + tail_splits) + share
    s_ptrs = shares + (place * G + heads)[:, None] * RP + directions[None, :]
    tl.store(s_ptrs, along, mask=(heads < G)[:, None] & (directions < RANK)[None, :])
    if first_direction == 0:
        tl.store(held + place * G + heads, total, mask=heads < G)
    finish(
        counters, counts, partial, shares, held, base, basis, out, mass, row, batch, head,
        batch * (HEADS // REPEAT) + kv_head, tail_splits, tickets, stride_ob, stride_oh,
        G, G2, ROWS, PARTS, D, BLOCK_D, RANK, RP, STEP, RANK_STEP, RENORMALISE,
    )  # fmt: skip

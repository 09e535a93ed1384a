"""The tail: what all rows hold along the low-rank directions of V, out of device memory alone.

It needs the scores and nothing of what is picked, so it runs beside select. Each program streams scores and the tail's
coefficients of a share of a row of work's rows and sums ``p c`` and ``p``; gather takes the picks' part away again.

Shapes: R rows of work, G heads of each, r directions.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kcache.backends.triton.common import weighted_rows
from kcache.backends.triton.score import log_sum_exp


@triton.jit
def along_directions(
    scores, norm, coefficients, row, part, parts, batch, head, length, capacity, stride_cb, stride_ch, stride_cr,
    G: tl.constexpr, GP: tl.constexpr, RANK: tl.constexpr, RP: tl.constexpr, BLOCK_T: tl.constexpr,
    STAGES: tl.constexpr, ALIGNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """``sum_i p_i c_i`` ``[GP, RP]`` and ``sum_i p_i`` ``[GP]`` over this program's share of all rows.

    Rows lie side by side here, so a mask that ends between them would split wide loads: the scratch of the scores holds
    whole tiles and needs none, and with ``ALIGNED`` there is room for the coefficients of 16 rows wherever one is.
    """
    heads = tl.arange(0, GP)
    directions = tl.arange(0, RP)
    lanes = tl.arange(0, BLOCK_T)
    s_base = scores + (row.to(tl.int64) * G + heads)[:, None] * capacity
    share = tl.cdiv(tl.cdiv(length, BLOCK_T), parts) * BLOCK_T
    start = part * share
    end = tl.minimum(start + share, length)
    readable = end
    if ALIGNED:
        readable = tl.cdiv(end, 16) * 16
    base = coefficients + batch * stride_cb + head.to(tl.int64) * stride_ch + directions[:, None] * stride_cr
    along = tl.zeros([GP, RP], tl.float32)
    held = tl.zeros([GP], tl.float32)
    for first in tl.range(start, end, BLOCK_T, num_stages=STAGES):
        pos = first + lanes
        inside = pos < end
        score = tl.load(s_base + pos[None, :], mask=(heads < G)[:, None], other=float("-inf"))
        prob = tl.where(inside[None, :], tl.exp2(score - norm[:, None]), 0.0)
        c_mask = (directions < RANK)[:, None] & (pos < readable)[None, :]
        rows = tl.where(inside[None, :], tl.load(base + pos[None, :], mask=c_mask, other=0.0), 0.0)
        along += weighted_rows(prob, tl.trans(rows), UPCAST)
        held += tl.sum(prob, 1)
    return along, held


@triton.jit(do_not_specialize=["splits", "tail_splits", "pick_splits"])
def tail_kernel(
    scores, part_max, part_sum, sinks, coefficients, shares, held, length_ptr, stride_cb, stride_ch, stride_cr,
    capacity, splits, tail_splits, pick_splits,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, G: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr,
    RANK: tl.constexpr, RP: tl.constexpr, BLOCK_T: tl.constexpr, STAGES: tl.constexpr, HAS_SINKS: tl.constexpr,
    ALIGNED: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One program: one share of one row of work. ``RP``: a power of two, at least 16, that holds the directions."""
    pid = tl.program_id(0)
    row = pid // tail_splits
    part = pid % tail_splits
    head = row % HEADS
    heads = tl.arange(0, GP)
    real = heads < G
    norm = log_sum_exp(part_max, part_sum, sinks, row, head, splits, G, GP, SP, HAS_SINKS)
    along, sums = along_directions(
        scores, norm, coefficients, row, part, tail_splits, (row // HEADS).to(tl.int64), head // REPEAT,
        tl.load(length_ptr), capacity, stride_cb, stride_ch, stride_cr, G, GP, RANK, RP, BLOCK_T, STAGES, ALIGNED,
        UPCAST,
    )  # fmt: skip
    place = row * (pick_splits + tail_splits) + part
    s_ptrs = shares + (place * G + heads)[:, None] * RP + tl.arange(0, RP)[None, :]
    tl.store(s_ptrs, along, mask=real[:, None])
    tl.store(held + place * G + heads, sums, mask=real)

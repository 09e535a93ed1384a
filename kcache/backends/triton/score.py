"""Score: one read of K per KV group.

``score_piece`` streams a piece of K once. It writes the scores ``[R, G, capacity]`` (fp32, log2 units, masked rows
-inf), the largest score of every head in each block of rows ``[R, G, blocks]``, and the piece's maximum and sum of
exponentials of every head. Select makes the log-sum-exp of those (:func:`log_sum_exp`), turns the blocks' maxima to
probabilities, and reads the scores of no block that cannot hold a pick.

Shapes: R = B * selection heads, G query heads of each, D head size, S pieces the length is cut into.
"""

from __future__ import annotations

import triton
import triton.language as tl

from kcache.backends.triton.common import LOG2E, LOWEST, dot, largest_size


@triton.jit
def log2_score(product, scaling, softcap, HAS_SOFTCAP: tl.constexpr):
    """Scale and soft-cap q·k and turn it to log2 units."""
    if HAS_SOFTCAP:  # the hyperbolic tangent by one exponent of 2, which needs no care at its ends
        grown = tl.exp2(product * (2.0 * LOG2E * scaling / softcap))
        return softcap * LOG2E - 2.0 * LOG2E * softcap / (grown + 1.0)
    return product * scaling * LOG2E


@triton.jit
def digits_of(
    q_base, stride_qh, centre, dims, G: tl.constexpr, G2: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr
):  # fmt: skip
    """Queries as whole numbers: int8 ``[BLOCK_D, COLUMNS]``, and what a column counts, fp32 ``[COLUMNS]``.

    And the product of each head's query with the centre of K, fp32 ``[G2]``.

    Column ``c`` is digit ``c // G2`` of head ``c % G2``. Three digits to the base of 254 say a number to within
    1e-7 of the head's largest, nearer than 16 bits do.
    """
    column = tl.arange(0, COLUMNS)
    head, place = column % G2, column // G2
    real = (head < G) & (place < 3)
    q_ptrs = q_base + head[None, :] * stride_qh + dims[:, None]
    q = tl.load(q_ptrs, mask=real[None, :] & (dims < D)[:, None], other=0.0).to(tl.float32)
    size = largest_size(q, 0)
    unit = tl.where(size < 1.0e-30, 1.0e-30, size) / 127.0
    rest = q / unit[None, :]
    first = tl.floor(rest + 0.5)
    rest = (rest - first) * 254.0
    second = tl.floor(rest + 0.5)
    third = tl.floor((rest - second) * 254.0 + 0.5)
    digit = tl.where((place == 0)[None, :], first, tl.where((place == 1)[None, :], second, third))
    unit = tl.where(place == 0, unit, tl.where(place == 1, unit / 254.0, unit / (254.0 * 254.0)))
    middle = tl.load(centre + dims, mask=dims < D, other=0.0)
    shift = tl.where(real & (place == 0), tl.sum(q * middle[:, None], 0), 0.0)
    shift = tl.sum(tl.reshape(shift, [COLUMNS // G2, G2]), 0)
    return digit.to(tl.int8), tl.where(real, unit, 0.0), shift


@triton.jit
def whole_product(k, digits, unit, G2: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_L: tl.constexpr):
    """``k @ q`` ``[BLOCK_L, G2]`` of rows and queries in whole numbers: exact but for the sum of three digits."""
    product = tl.dot(k, digits, out_dtype=tl.int32).to(tl.float32) * unit[None, :]
    return tl.sum(tl.reshape(product, [BLOCK_L, COLUMNS // G2, G2]), 1)


@triton.jit
def score_piece(
    query, keys, scales, centres, mask, scores, block_top, part_max, part_sum, length, row, part, splits,
    stride_qb, stride_qh, stride_kb, stride_kh, stride_kl, stride_sb, stride_sh, stride_mb,
    capacity, blocks, scaling, softcap,
    HEADS: tl.constexpr, REPEAT: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, GP: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    HAS_MASK: tl.constexpr, HAS_SOFTCAP: tl.constexpr, IS_NARROW: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """Piece ``part`` of the length of one row. Pieces are equal whatever the length, so no program idles."""
    batch = (row // HEADS).to(tl.int64)
    head = row % HEADS
    tiles = tl.cdiv(tl.cdiv(length, BLOCK_L), splits)
    start = part * tiles * BLOCK_L
    end = tl.minimum(start + tiles * BLOCK_L, length)

    dims = tl.arange(0, BLOCK_D)
    lanes = tl.arange(0, BLOCK_L)
    q_base = query + batch * stride_qb + head * G * stride_qh
    # Heads of a tile of scores: what the product of floats has columns for, or those there are.
    WIDE: tl.constexpr = G2 if IS_NARROW else GP
    COLUMNS: tl.constexpr = max(16, 4 * G2)
    heads = tl.arange(0, WIDE)
    if IS_NARROW:
        centre = centres + (batch * (HEADS // REPEAT) + head // REPEAT) * D
        digits, unit, shift = digits_of(q_base, stride_qh, centre, dims, G, G2, COLUMNS, D)
    else:
        q_ptrs = q_base + heads[None, :] * stride_qh + dims[:, None]
        q = tl.load(q_ptrs, mask=(heads < G)[None, :] & (dims < D)[:, None], other=0.0)
    k_base = keys + batch * stride_kb + (head // REPEAT).to(tl.int64) * stride_kh
    f_base = scales + batch * stride_sb + (head // REPEAT).to(tl.int64) * stride_sh
    s_base = scores + row.to(tl.int64) * G * capacity
    t_base = block_top + row.to(tl.int64) * G * blocks
    block = tl.arange(0, BLOCK_L // BLOCK)
    m_base = mask + batch * stride_mb

    top = tl.full([BLOCK_L, WIDE], LOWEST, tl.float32)
    total = tl.zeros([BLOCK_L, WIDE], tl.float32)
    for first in tl.range(start, end, BLOCK_L, num_stages=STAGES):
        pos = first + lanes
        inside = pos < end
        if D == BLOCK_D:
            seen = inside[:, None]
        else:
            seen = inside[:, None] & (dims < D)[None, :]
        k_ptrs = k_base + pos[:, None] * stride_kl + dims[None, :]
        if IS_NARROW:
            k = tl.load(k_ptrs, mask=seen, other=0, eviction_policy="evict_first")
            scale = tl.load(f_base + pos, mask=inside, other=0.0)
            product = whole_product(k, digits, unit, G2, COLUMNS, BLOCK_L) * scale[:, None] + shift[None, :]
        else:
            k = tl.load(k_ptrs, mask=seen, other=0.0, eviction_policy="evict_first")
            product = dot(k, q.to(k.dtype), UPCAST)
        score = log2_score(product, scaling, softcap, HAS_SOFTCAP)
        if HAS_MASK:
            allowed = tl.load(m_base + pos, mask=inside, other=0) != 0
            score = tl.where(allowed[:, None], score, float("-inf"))
        score = tl.where(inside[:, None], score, float("-inf"))
        s_ptrs = s_base + heads.to(tl.int64)[None, :] * capacity + pos[:, None]
        tl.store(s_ptrs, score, mask=(heads < G)[None, :])  # whole tiles, for wide stores
        tops = tl.max(tl.reshape(score, [BLOCK_L // BLOCK, BLOCK, WIDE]), 1)
        t_ptrs = t_base + heads[None, :] * blocks + (first // BLOCK + block)[:, None]
        tl.store(t_ptrs, tops, mask=(first + block * BLOCK < end)[:, None] & (heads < G)[None, :])
        # Running maxima stay per lane of the tile: one reduction per program instead of one per tile.
        higher = tl.maximum(top, score)
        total = total * tl.exp2(top - higher) + tl.exp2(score - higher)
        top = higher
    peak = tl.max(top, 0)
    weight = tl.sum(total * tl.exp2(top - peak[None, :]), 0)
    at = (row * splits + part) * G + heads
    tl.store(part_max + at, peak, mask=heads < G)
    tl.store(part_sum + at, weight, mask=heads < G)


@triton.jit
def log_sum_exp(
    part_max, part_sum, sinks, row, head, splits,
    G: tl.constexpr, GP: tl.constexpr, SP: tl.constexpr, HAS_SINKS: tl.constexpr,
):  # fmt: skip
    """The log-sum-exp (log2 units) of each of a row's heads ``[GP]``, sinks included; 0 where nothing is allowed.

    NaN stays NaN, so that no probability exceeds 1, which select relies on.
    """
    heads = tl.arange(0, GP)
    parts = tl.arange(0, SP)
    at = (row * splits + parts)[None, :] * G + heads[:, None]
    live = (parts < splits)[None, :] & (heads < G)[:, None]
    peaks = tl.load(part_max + at, mask=live, other=LOWEST)
    sums = tl.load(part_sum + at, mask=live, other=0.0)
    peak = tl.max(peaks, 1)
    if HAS_SINKS:
        sink = tl.load(sinks + head * G + heads, mask=heads < G, other=LOWEST).to(tl.float32) * LOG2E
        peak = tl.maximum(peak, sink)
    total = tl.sum(sums * tl.exp2(peaks - peak[:, None]), 1)
    if HAS_SINKS:
        total += tl.exp2(sink - peak)
    return tl.where(total == 0.0, 0.0, peak + tl.log2(tl.where(total == 0.0, 1.0, total)))

"""Products with rows of K and V, widened to fp32 in registers.

A row is read in two halves that are both contiguous in registers: of bf16, stored as 32-bit words, the even and the
odd places; of fp32 the first and the second half. Queries and outputs are laid out to match, ``[G, 2, D / 2]``, while
a region works on them. Which of the two it is follows from the type of the rows.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba import types
from numba.extending import overload

from kcache.backends.jit.bits import even_half, kernel, odd_half, widened
from kcache.backends.jit.lanes import (
    HEADS,
    LANES,
    ROWS,
    score_four_heads,
    score_one_head,
    score_three_heads,
    score_two_heads,
    weigh_in_four,
    weigh_in_one,
    weigh_in_three,
    weigh_in_two,
)

ZERO = np.float32(0.0)
_NEAR = 64
"""Rows that are weighed block by block before the next ones are."""


def first(rows: Any, row: Any, at: Any, half: Any) -> Any:
    """Value ``at`` of the first half of a row."""


def second(rows: Any, row: Any, at: Any, half: Any) -> Any:
    """Value ``at`` of the second half of a row."""


def place(rows: Any, part: Any, at: Any, half: Any) -> Any:
    """Where value ``at`` of half ``part`` is in a row."""


def value(values: Any, at: Any) -> Any:
    """Value ``at`` of an array of single values; bf16 as 16-bit words."""


@overload(first)
def _first(rows: Any, row: Any, at: Any, half: Any) -> Any:
    def of_words(rows: Any, row: Any, at: Any, half: Any) -> Any:
        return even_half(rows[row, at])

    def of_floats(rows: Any, row: Any, at: Any, half: Any) -> Any:
        return rows[row, at]

    return of_words if rows.dtype == types.uint32 else of_floats


@overload(second)
def _second(rows: Any, row: Any, at: Any, half: Any) -> Any:
    def of_words(rows: Any, row: Any, at: Any, half: Any) -> Any:
        return odd_half(rows[row, at])

    def of_floats(rows: Any, row: Any, at: Any, half: Any) -> Any:
        return rows[row, half + at]

    return of_words if rows.dtype == types.uint32 else of_floats


@overload(place)
def _place(rows: Any, part: Any, at: Any, half: Any) -> Any:
    def of_words(rows: Any, part: Any, at: Any, half: Any) -> Any:
        return 2 * at + part

    def of_floats(rows: Any, part: Any, at: Any, half: Any) -> Any:
        return part * half + at

    return of_words if rows.dtype == types.uint32 else of_floats


@overload(value)
def _value(values: Any, at: Any) -> Any:
    def of_words(values: Any, at: Any) -> Any:
        return widened(values[at])

    def of_floats(values: Any, at: Any) -> Any:
        return values[at]

    return of_words if values.dtype == types.uint16 else of_floats


@kernel
def split(vectors: Any, rows: Any, halves: Any) -> None:
    """``vectors [G, D]`` in the halves that ``rows`` are read in, ``[G, 2, D / 2]``."""
    half = halves.shape[2]
    for g in range(halves.shape[0]):
        for part in range(2):
            for d in range(half):
                halves[g, part, d] = vectors[g, place(rows, part, d, half)]


@kernel
def join(halves: Any, rows: Any, vectors: Any) -> None:
    """The opposite of :func:`split`."""
    half = halves.shape[2]
    for g in range(halves.shape[0]):
        for part in range(2):
            for d in range(half):
                vectors[g, place(rows, part, d, half)] = halves[g, part, d]


@kernel
def _product(q: Any, keys: Any, g: Any, row: Any) -> Any:
    half, total = q.shape[2], ZERO
    for d in range(half):
        total += q[g, 0, d] * first(keys, row, d, half) + q[g, 1, d] * second(keys, row, d, half)
    return total


@kernel
def products(q: Any, keys: Any, scores: Any) -> None:
    """``q · k`` of each row of ``keys``: query ``[G, 2, D/2]``, scores ``[G, >= rows]``."""
    group, count = q.shape[0], keys.shape[0]
    whole = count // ROWS * ROWS if q.shape[2] % LANES == 0 else 0
    for quarter in range(whole // ROWS):
        row = quarter * ROWS
        for four in range(group // HEADS):
            score_four_heads(q, keys, scores, four * HEADS, row)
        g, left = group // HEADS * HEADS, group % HEADS
        if left == 3:
            score_three_heads(q, keys, scores, g, row)
        elif left == 2:
            score_two_heads(q, keys, scores, g, row)
        elif left == 1:
            score_one_head(q, keys, scores, g, row)
    for g in range(group):
        for row in range(whole, count):
            scores[g, row] = _product(q, keys, g, row)


@kernel
def _weigh_in(weights: Any, values: Any, out: Any, at: Any, start: Any, stop: Any) -> None:
    group = out.shape[0]
    for four in range(group // HEADS):
        weigh_in_four(weights, values, out, four * HEADS, at, start, stop)
    g, left = group // HEADS * HEADS, group % HEADS
    if left == 3:
        weigh_in_three(weights, values, out, g, at, start, stop)
    elif left == 2:
        weigh_in_two(weights, values, out, g, at, start, stop)
    elif left == 1:
        weigh_in_one(weights, values, out, g, at, start, stop)


@kernel
def accumulate(weights: Any, values: Any, out: Any) -> None:
    """``out += weights · v`` over the rows of ``values``: weights ``[G, >= rows]``, out ``[G, 2, D/2]``.

    Some rows at a time, block by block: a block of the output stays in registers while the rows come from L1.
    """
    half, count = out.shape[2], values.shape[0]
    whole = half // LANES * LANES
    for start in range(0, count, _NEAR):
        stop = min(start + _NEAR, count)
        for at in range(0, whole, LANES):
            _weigh_in(weights, values, out, at, start, stop)
        for g in range(out.shape[0]):
            for row in range(start, stop):
                for d in range(whole, half):
                    out[g, 0, d] += weights[g, row] * first(values, row, d, half)
                    out[g, 1, d] += weights[g, row] * second(values, row, d, half)

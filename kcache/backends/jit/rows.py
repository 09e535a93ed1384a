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

ZERO = np.float32(0.0)


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
def _one(q: Any, keys: Any, scores: Any, g: Any) -> None:
    half = q.shape[2]
    for row in range(keys.shape[0]):
        a = ZERO
        for d in range(half):
            a += q[g, 0, d] * first(keys, row, d, half) + q[g, 1, d] * second(keys, row, d, half)
        scores[g, row] = a


@kernel
def _two(q: Any, keys: Any, scores: Any, g: Any) -> None:
    half = q.shape[2]
    for row in range(keys.shape[0]):
        a = b = ZERO
        for d in range(half):
            x, y = first(keys, row, d, half), second(keys, row, d, half)
            a += q[g, 0, d] * x + q[g, 1, d] * y
            b += q[g + 1, 0, d] * x + q[g + 1, 1, d] * y
        scores[g, row] = a
        scores[g + 1, row] = b


@kernel
def _three(q: Any, keys: Any, scores: Any, g: Any) -> None:
    half = q.shape[2]
    for row in range(keys.shape[0]):
        a = b = c = ZERO
        for d in range(half):
            x, y = first(keys, row, d, half), second(keys, row, d, half)
            a += q[g, 0, d] * x + q[g, 1, d] * y
            b += q[g + 1, 0, d] * x + q[g + 1, 1, d] * y
            c += q[g + 2, 0, d] * x + q[g + 2, 1, d] * y
        scores[g, row] = a
        scores[g + 1, row] = b
        scores[g + 2, row] = c


@kernel
def _four(q: Any, keys: Any, scores: Any, g: Any) -> None:
    half = q.shape[2]
    for row in range(keys.shape[0]):
        a = b = c = e = ZERO
        for d in range(half):
            x, y = first(keys, row, d, half), second(keys, row, d, half)
            a += q[g, 0, d] * x + q[g, 1, d] * y
            b += q[g + 1, 0, d] * x + q[g + 1, 1, d] * y
            c += q[g + 2, 0, d] * x + q[g + 2, 1, d] * y
            e += q[g + 3, 0, d] * x + q[g + 3, 1, d] * y
        scores[g, row] = a
        scores[g + 1, row] = b
        scores[g + 2, row] = c
        scores[g + 3, row] = e


@kernel
def products(q: Any, keys: Any, scores: Any) -> None:
    """``q · k`` of each row of ``keys``: query ``[G, 2, D/2]``, scores ``[G, >= rows]``.

    Up to four query heads are taken at a time, so a row is widened once for them and their sums stay in registers.
    """
    group = q.shape[0]
    whole = group // 4 * 4
    for g in range(0, whole, 4):
        _four(q, keys, scores, g)
    if group - whole == 3:
        _three(q, keys, scores, whole)
    elif group - whole == 2:
        _two(q, keys, scores, whole)
    elif group - whole == 1:
        _one(q, keys, scores, whole)


@kernel
def accumulate(weights: Any, values: Any, out: Any) -> None:
    """``out += weights · v`` over the rows of ``values``: weights ``[G, >= rows]``, out ``[G, 2, D/2]``.

    Four rows are taken at a time: the output is loaded and stored once for all of them.
    """
    half, count = out.shape[2], values.shape[0]
    for quarter in range(count // 4):
        row = 4 * quarter
        for g in range(out.shape[0]):
            a, b, c, e = weights[g, row], weights[g, row + 1], weights[g, row + 2], weights[g, row + 3]
            for d in range(half):
                out[g, 0, d] += (
                    a * first(values, row, d, half)
                    + b * first(values, row + 1, d, half)
                    + c * first(values, row + 2, d, half)
                    + e * first(values, row + 3, d, half)
                )
                out[g, 1, d] += (
                    a * second(values, row, d, half)
                    + b * second(values, row + 1, d, half)
                    + c * second(values, row + 2, d, half)
                    + e * second(values, row + 3, d, half)
                )
    for left in range(count % 4):
        row = count // 4 * 4 + left
        for g in range(out.shape[0]):
            for d in range(half):
                out[g, 0, d] += weights[g, row] * first(values, row, d, half)
                out[g, 1, d] += weights[g, row] * second(values, row, d, half)

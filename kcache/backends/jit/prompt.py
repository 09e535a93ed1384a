"""A prompt's attention as a region that all threads enter: a tile of queries of a head at a time, the longest first.

Rows of K are looked at a stretch at a time with a running softmax (Milakov & Gimelshein, 2018): scores, their
exponentials in bf16, and the weighted sum of V, all of which stay in the cache of a core. Stretches that none of the
tile's queries may attend are left out.

What a region works on is one array of 64-bit integers, sizes and addresses; its places are named here, and the first
are those of a decode step's.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from kcache.backends.jit.bits import kernel, pointer
from kcache.backends.jit.regions import thread_number
from kcache.backends.jit.tiles import (
    COLUMNS,
    QUERIES,
    largest_of_row,
    score_tile,
    value_four,
    value_one,
    value_three,
    value_two,
    weigh_row,
)

_NAMES = (
    "threads number size items heads group count length past blocks half dim_v mask_batch mask_row "
    "query keys values mask sinks scale out"
)
FIELDS = _NAMES.split()
(
    _THREADS, _NUMBER, _SIZE, _ITEMS, _HEADS, _GROUP, _COUNT, _LENGTH, _PAST, _BLOCKS, _HALF, _DIM_V, _MASK_BATCH,
    _MASK_ROW, _QUERY, _KEYS, _VALUES, _MASK, _SINKS, _SCALE, _OUT,
) = range(len(FIELDS))  # fmt: skip

ROWS = 8 * QUERIES
"""Queries of a tile."""
_STRETCH = 4 * COLUMNS
_LOWEST = np.float32(-1e30)
_NONE = np.float32(-np.inf)
_LOG2E = np.float32(1.4426950408889634)


@kernel
def is_wanted(mask: Any, begin: Any, stride: Any, rows: Any, width: Any) -> Any:
    """Whether any of ``rows`` queries may attend any of the ``width`` rows of K from ``begin`` in the mask on."""
    for row in range(rows):
        for at in range(begin + row * stride, begin + row * stride + width):
            if mask[at] != 0:
                return True
    return False


@kernel
def leave_out(scores: Any, mask: Any, begin: Any, stride: Any, rows: Any, width: Any) -> None:
    """Take away the scores of what the mask excludes."""
    for row in range(rows):
        for column in range(width):
            if mask[begin + row * stride + column] == 0:
                scores[row, column] = _NONE


@kernel
def add_values(weights: Any, values: Any, sums: Any, fade: Any, pair: Any, pairs: Any) -> None:
    """Fade the sums of a tile, and add a stretch of V."""
    width = values.shape[1]
    for row in range(0, ROWS, QUERIES):
        column = 0
        while width - column >= 64:
            value_four(weights, values, sums, fade, row, pair, pairs, column)
            column += 64
        if width - column == 48:
            value_three(weights, values, sums, fade, row, pair, pairs, column)
        elif width - column == 32:
            value_two(weights, values, sums, fade, row, pair, pairs, column)
        elif width - column == 16:
            value_one(weights, values, sums, fade, row, pair, pairs, column)


@kernel
def prompt(at: Any) -> None:
    """Attention of every query of a prompt."""
    thread = thread_number(at)
    items, heads, group, count, length = at[_ITEMS], at[_HEADS], at[_GROUP], at[_COUNT], at[_LENGTH]
    blocks, half, dim_v = at[_BLOCKS], at[_HALF], at[_DIM_V]
    tiles = (count + ROWS - 1) // ROWS
    queries = carray(pointer(at[_QUERY]), (items, tiles * ROWS, half), np.uint32)
    keys = carray(pointer(at[_KEYS]), (items // group, blocks, half, COLUMNS), np.uint32)
    values = carray(pointer(at[_VALUES]), (items // group, blocks * (COLUMNS // 2), dim_v), np.uint32)
    mask = carray(pointer(at[_MASK]), (items * count * length,), np.uint8)
    sinks = carray(pointer(at[_SINKS]), (heads,), np.float32)
    scale = carray(pointer(at[_SCALE]), (1,), np.float32)[0]
    out = carray(pointer(at[_OUT]), (items, count, dim_v), np.float32)
    scores = np.empty((ROWS, _STRETCH), np.float32)
    halves = np.empty((ROWS, _STRETCH), np.uint16)
    weights = halves.view(np.uint32)
    sums = np.empty((ROWS, dim_v), np.float32)
    peaks, totals, fade = np.empty(ROWS, np.float32), np.empty(ROWS, np.float32), np.empty(ROWS, np.float32)
    for turn in range(thread, items * tiles, at[_THREADS]):
        item, begin = turn % items, (tiles - 1 - turn // items) * ROWS
        own = item // group
        rows = min(ROWS, count - begin)
        masked = (item // heads) * at[_MASK_BATCH] + begin * at[_MASK_ROW]
        sums[:] = np.float32(0.0)
        totals[:] = np.float32(0.0)
        peaks[:] = _LOWEST
        last = length if at[_MASK] != 0 else min(length, at[_PAST] + begin + rows)
        for first in range(0, last, _STRETCH):
            width = min(_STRETCH, last - first)
            if at[_MASK] != 0 and not is_wanted(mask, masked + first, at[_MASK_ROW], rows, width):
                continue
            whole = (width + COLUMNS - 1) // COLUMNS * COLUMNS
            for block in range(whole // COLUMNS):
                for row in range(0, ROWS, QUERIES):
                    score_tile(queries[item, begin:], keys[own], scores, row, first // COLUMNS + block, block * COLUMNS)
            if at[_MASK] != 0:
                leave_out(scores, mask, masked + first, at[_MASK_ROW], rows, width)
            for row in range(rows):
                seen = width
                if at[_MASK] == 0:
                    seen = max(0, min(width, at[_PAST] + begin + row + 1 - first))
                for column in range(seen, whole):
                    scores[row, column] = _NONE
            for row in range(ROWS):
                peak = max(peaks[row], largest_of_row(scores, row, whole) * scale)
                fade[row] = np.exp2(peaks[row] - peak)
                totals[row] = totals[row] * fade[row] + weigh_row(scores, halves, row, whole, scale, peak)
                peaks[row] = peak
            add_values(weights, values[own], sums, fade, first // 2, whole // 2)
        for row in range(rows):
            total = totals[row]
            if at[_SINKS] != 0:
                total += np.exp2(sinks[item % heads] * _LOG2E - peaks[row])
            if total == 0:
                total = np.float32(1.0)
            for column in range(dim_v):
                out[item, begin + row, column] = sums[row, column] / total

"""Decode steps as regions that all threads enter: pieces of heads are shared out, with a barrier between the passes.

What a region works on is one array of 64-bit integers, sizes and addresses; its places are named here.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numba.np.numpy_support import carray

from kcache.backends.jit.bits import call_number, call_void, kernel, pointer
from kcache.backends.jit.rows import accumulate, join, products, split
from kcache.backends.jit.verbs import (
    LOWEST,
    add_picked,
    mask_out,
    normaliser,
    pick_above,
    share_of,
    sum_along,
    sum_up,
    take_from,
    weigh,
)

_NAMES = (
    "threads number size barrier items kv_heads length piece group rank most passes renormalises "
    "k_words v_words half half_v k_capacity v_capacity c_capacity mask_stride "
    "query keys values mask sinks scores peaks totals weights threshold lists counts picks found "
    "coefficients base basis along mass each out"
)
FIELDS = _NAMES.split()
SCORE, COMBINE = 1, 2
"""Bits of ``passes``."""

(
    _THREADS, _NUMBER, _SIZE, _BARRIER, _ITEMS, _KV_HEADS, _LENGTH, _PIECE, _GROUP, _RANK, _MOST, _PASSES,
    _RENORMALISES, _K_WORDS, _V_WORDS, _HALF, _HALF_V, _K_CAPACITY, _V_CAPACITY, _C_CAPACITY, _MASK_STRIDE,
    _QUERY, _KEYS, _VALUES, _MASK, _SINKS, _SCORES, _PEAKS, _TOTALS, _WEIGHTS, _THRESHOLD, _LISTS, _COUNTS, _PICKS,
    _FOUND, _COEFFICIENTS, _BASE, _BASIS, _ALONG, _MASS, _EACH, _OUT,
) = range(len(FIELDS))  # fmt: skip


@kernel
def thread_number(at: Any) -> Any:
    """Number of the calling thread in its team, of which there may be fewer threads than were asked for."""
    if at[_THREADS] == 1:
        return np.int32(0)
    at[_THREADS] = call_number(at[_SIZE])
    return call_number(at[_NUMBER])


@kernel
def share_of_work(at: Any, thread: Any, work: Any) -> Any:
    """Where a thread begins and ends in so much work: pieces next to each other, so that it reads memory in order."""
    return work * thread // at[_THREADS], work * (thread + 1) // at[_THREADS]


@kernel
def wait_for_all(at: Any) -> None:
    """Go on when every thread has come here."""
    if at[_THREADS] > 1:
        call_void(at[_BARRIER])


@kernel
def pieces_of(at: Any) -> Any:
    """How many pieces the rows of a head are cut into."""
    return (at[_LENGTH] + at[_PIECE] - 1) // at[_PIECE]


@kernel
def piece_of(at: Any, turn: Any) -> Any:
    """A piece by its number among those of all heads: which head, which of its pieces, where its rows begin and end."""
    item, nth = turn // pieces_of(at), turn % pieces_of(at)
    start = nth * at[_PIECE]
    return item, nth, start, min(start + at[_PIECE], at[_LENGTH])


@kernel
def scores_of(at: Any) -> Any:
    """Scores ``[items, pieces, group, piece]``, and ``[items, pieces, group]`` what the normalisers are made of."""
    items, pieces, group = at[_ITEMS], pieces_of(at), at[_GROUP]
    scores = carray(pointer(at[_SCORES]), (items, pieces, group, at[_PIECE]), np.float32)
    peaks = carray(pointer(at[_PEAKS]), (items, pieces, group), np.float32)
    totals = carray(pointer(at[_TOTALS]), (items, pieces, group), np.float32)
    return scores, peaks, totals


@kernel
def score_piece(at: Any, turn: Any, query: Any, words: Any) -> None:
    """Scores of a piece, and what its normaliser is made of; ``query`` is scratch."""
    items, group = at[_ITEMS], at[_GROUP]
    queries = carray(pointer(at[_QUERY]), (items, group, 2 * at[_HALF]), np.float32)
    keys = carray(pointer(at[_KEYS]), (items, at[_K_CAPACITY], at[_K_WORDS]), words)
    scores, peaks, totals = scores_of(at)
    item, nth, start, stop = piece_of(at, turn)
    split(queries[item], keys[item], query)
    products(query, keys[item][start:stop], scores[item, nth])
    if at[_MASK] != 0:
        mask = carray(pointer(at[_MASK]), (items // at[_KV_HEADS], at[_MASK_STRIDE]), np.uint8)
        mask_out(scores[item, nth], mask[item // at[_KV_HEADS]][start:stop])
    sum_up(scores[item, nth], stop - start, peaks[item, nth], totals[item, nth])


@kernel
def score_all(at: Any, thread: Any, words: Any) -> None:
    """Scores of every piece, and what the normalisers are made of."""
    query = np.empty((at[_GROUP], 2, at[_HALF]), np.float32)
    begin, end = share_of_work(at, thread, at[_ITEMS] * pieces_of(at))
    for turn in range(begin, end):
        score_piece(at, turn, query, words)


@kernel
def weigh_all(at: Any, thread: Any, single: Any) -> None:
    """Probabilities, what they hold per direction, and the rows above the threshold."""
    items, piece, group, kv_heads = at[_ITEMS], at[_PIECE], at[_GROUP], at[_KV_HEADS]
    pieces, rank = pieces_of(at), at[_RANK]
    scores, peaks, totals = scores_of(at)
    weights = carray(pointer(at[_WEIGHTS]), (items, pieces * piece), np.float32)
    lists = carray(pointer(at[_LISTS]), (items, pieces, piece), np.int32)
    counts = carray(pointer(at[_COUNTS]), (items, pieces), np.int64)
    along = carray(pointer(at[_ALONG]), (items, pieces, group, rank + 1), np.float32)
    sinks = carray(pointer(at[_SINKS]), (kv_heads, group), np.float32)
    thresholds = carray(pointer(at[_THRESHOLD]), (items // kv_heads,), np.float32)
    coefficients = carray(pointer(at[_COEFFICIENTS]), (items, rank, at[_C_CAPACITY]), single)
    norms, shares = np.empty(group, np.float32), np.empty(group, np.float32)
    last = -1
    begin, end = share_of_work(at, thread, items * pieces)
    for turn in range(begin, end):
        item, nth, start, stop = piece_of(at, turn)
        if item != last:
            for g in range(group):
                sink = sinks[item % kv_heads, g] if at[_SINKS] != 0 else LOWEST
                norms[g] = normaliser(peaks[item], totals[item], g, sink)
            last = item
        for g in range(group):
            shares[g] = share_of(peaks[item, nth, g], norms[g])
        weigh(scores[item, nth], shares, weights[item][start:stop])
        if rank > 0:
            sum_along(scores[item, nth], coefficients[item], start, stop - start, along[item, nth])
        if at[_THRESHOLD] != 0:
            least = thresholds[item // kv_heads]
            counts[item, nth] = pick_above(weights[item][start:stop], least, start, lists[item, nth])


@kernel
def gather_picks(at: Any, item: Any) -> Any:
    """One list of the pieces' picks, filled up with -1; how many there are, all of them even if they did not fit."""
    pieces, most = pieces_of(at), at[_MOST]
    lists = carray(pointer(at[_LISTS]), (at[_ITEMS], pieces, at[_PIECE]), np.int32)
    counts = carray(pointer(at[_COUNTS]), (at[_ITEMS], pieces), np.int64)
    picks = carray(pointer(at[_PICKS]), (at[_ITEMS], most), np.int64)
    total = 0
    for nth in range(pieces):
        for index in range(counts[item, nth]):
            if total < most:
                picks[item, total] = lists[item, nth, index]
            total += 1
    for index in range(total, most):
        picks[item, index] = -1
    return total


@kernel
def combine_all(at: Any, thread: Any, words: Any, single: Any) -> None:
    """Picked rows, and the tail of the others, item by item."""
    items, piece, group, kv_heads = at[_ITEMS], at[_PIECE], at[_GROUP], at[_KV_HEADS]
    pieces, rank, most, half_v = pieces_of(at), at[_RANK], at[_MOST], at[_HALF_V]
    values = carray(pointer(at[_VALUES]), (items, at[_V_CAPACITY], at[_V_WORDS]), words)
    scores, peaks, totals = scores_of(at)
    picks = carray(pointer(at[_PICKS]), (items, most), np.int64)
    found = carray(pointer(at[_FOUND]), (items,), np.int64)
    mass = carray(pointer(at[_MASS]), (items, group), np.float32)
    each = carray(pointer(at[_EACH]), (items, most), np.float32)
    out = carray(pointer(at[_OUT]), (items, group, 2 * half_v), np.float32)
    parts = carray(pointer(at[_ALONG]), (items, pieces, group, rank + 1), np.float32)
    coefficients = carray(pointer(at[_COEFFICIENTS]), (items, rank, at[_C_CAPACITY]), single)
    base = carray(pointer(at[_BASE]), (items, 2 * half_v), np.float32)
    basis = carray(pointer(at[_BASIS]), (items, rank, 2 * half_v), np.float32)
    along = np.empty((group, rank + 1), np.float32)
    halves = np.empty((group, 2, half_v), np.float32)
    scale = np.empty(group, np.float32)
    sinks = carray(pointer(at[_SINKS]), (kv_heads, group), np.float32)
    for item in range(thread, items, at[_THREADS]):
        if at[_THRESHOLD] != 0:
            found[item] = gather_picks(at, item)
        count = min(found[item], most)
        mass[item] = np.float32(0.0)
        for nth in range(count):
            row, total = picks[item, nth], np.float32(0.0)
            for g in range(group):
                weight = scores[item, row // piece, g, row % piece]
                mass[item, g] += weight
                total += weight
            each[item, nth] = total / np.float32(group)
        for g in range(group):
            held, scale[g] = mass[item, g], np.float32(1.0)
            if at[_RENORMALISES] != 0 and held > 0:
                whole = np.float32(1.0)
                if at[_SINKS] != 0:  # what a sink takes stays with it
                    sink = sinks[item % kv_heads, g]
                    whole -= share_of(sink, normaliser(peaks[item], totals[item], g, sink))
                scale[g] = whole / held
        halves[:] = np.float32(0.0)
        add_picked(scores[item], values[item], picks[item], count, scale, halves)
        join(halves, values[item], out[item])
        if rank > 0:
            for g in range(group):
                for j in range(rank + 1):
                    along[g, j] = np.float32(0.0)
                    for nth in range(pieces):
                        along[g, j] += parts[item, nth, g, j]
            take_from(scores[item], coefficients[item], picks[item], count, along)
            for g in range(group):
                for d in range(2 * half_v):
                    out[item, g, d] += along[g, rank] * base[item, d]
                for j in range(rank):
                    for d in range(2 * half_v):
                        out[item, g, d] += along[g, j] * basis[item, j, d]


@kernel
def decode(at: Any, words: Any, single: Any) -> None:
    """The TopN decode step of one layer; ``items`` are sequences times KV heads."""
    thread = thread_number(at)
    if at[_PASSES] & SCORE:
        score_all(at, thread, words)
        wait_for_all(at)
        weigh_all(at, thread, single)
        wait_for_all(at)
    if at[_PASSES] & COMBINE:
        combine_all(at, thread, words, single)


@kernel
def attend_pieces(at: Any, thread: Any, words: Any) -> None:
    """Each piece attended by itself, its output not yet normalised."""
    items, group, pieces, half_v = at[_ITEMS], at[_GROUP], pieces_of(at), at[_HALF_V]
    values = carray(pointer(at[_VALUES]), (items, at[_V_CAPACITY], at[_V_WORDS]), words)
    scores, _, _ = scores_of(at)
    parts = carray(pointer(at[_ALONG]), (items, pieces, group, 2, half_v), np.float32)
    query = np.empty((group, 2, at[_HALF]), np.float32)
    begin, end = share_of_work(at, thread, items * pieces)
    for turn in range(begin, end):
        score_piece(at, turn, query, words)
        item, nth, start, stop = piece_of(at, turn)
        parts[item, nth] = np.float32(0.0)
        accumulate(scores[item, nth], values[item][start:stop], parts[item, nth])


@kernel
def merge(at: Any, thread: Any, words: Any) -> None:
    """The pieces put together by their log-sum-exp."""
    items, group, kv_heads, pieces, half_v = at[_ITEMS], at[_GROUP], at[_KV_HEADS], pieces_of(at), at[_HALF_V]
    _, peaks, totals = scores_of(at)
    parts = carray(pointer(at[_ALONG]), (items, pieces, group, 2, half_v), np.float32)
    sinks = carray(pointer(at[_SINKS]), (kv_heads, group), np.float32)
    values = carray(pointer(at[_VALUES]), (items, at[_V_CAPACITY], at[_V_WORDS]), words)
    out = carray(pointer(at[_OUT]), (items, group, 2 * half_v), np.float32)
    halves = np.empty((group, 2, half_v), np.float32)
    for item in range(thread, items, at[_THREADS]):
        halves[:] = np.float32(0.0)
        for g in range(group):
            sink = sinks[item % kv_heads, g] if at[_SINKS] != 0 else LOWEST
            norm = normaliser(peaks[item], totals[item], g, sink)
            for nth in range(pieces):
                share = share_of(peaks[item, nth, g], norm)
                if share != 0:
                    for part in range(2):
                        for d in range(half_v):
                            halves[g, part, d] += share * parts[item, nth, g, part, d]
        join(halves, values[item], out[item])


@kernel
def dense(at: Any, words: Any) -> None:
    """Exact attention of one token: each piece of a head by itself, then the pieces merged."""
    thread = thread_number(at)
    attend_pieces(at, thread, words)
    wait_for_all(at)
    merge(at, thread, words)

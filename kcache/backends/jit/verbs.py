"""The verbs over one piece of one KV head, all query heads of the group.

Loops count from 0 and arrays come cut to size: an index that might be negative would keep a loop from vectorising.

Shapes: scores, and the probabilities they become in place, ``[G, piece]`` fp32, peaks and totals ``[G]``, coefficients
of the low-rank tail ``[r, L']``.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kcache.backends.jit.bits import exponential, kernel, kernel_of_numbers
from kcache.backends.jit.lanes import LANES, largest_of_blocks
from kcache.backends.jit.rows import first, second, value

LOWEST = np.float32(-np.inf)
HIGHEST = np.float32(np.inf)
ZERO = np.float32(0.0)


@kernel
def mask_out(scores: Any, mask: Any) -> None:
    """Scores of rows that may not be attended become ``-inf``; mask ``[rows]`` uint8."""
    for g in range(scores.shape[0]):
        for row in range(mask.shape[0]):
            scores[g, row] = scores[g, row] if mask[row] != 0 else LOWEST


@kernel
def largest(values: Any, count: Any) -> Any:
    """The largest of the first ``count`` values; NaN is passed over."""
    whole = count // LANES * LANES
    peak = largest_of_blocks(values, whole)
    for at in range(whole, count):
        peak = values[at] if values[at] > peak else peak
    return peak


@kernel_of_numbers
def raise_to(weights: Any, probs: Any) -> None:
    """Each weight becomes the larger of itself and its probability."""
    for row in range(weights.shape[0]):
        weights[row] = probs[row] if probs[row] > weights[row] else weights[row]


@kernel
def raise_all(scores: Any, peak: Any) -> Any:
    """Turn scores into ``exp(score - peak)`` in place; returns their sum."""
    total = ZERO
    for row in range(scores.shape[0]):
        scores[row] = exponential(scores[row] - peak)
        total += scores[row]
    return total


@kernel
def sum_up(scores: Any, count: Any, peaks: Any, totals: Any) -> None:
    """Turn ``count`` scores of each head into ``exp(score - largest)``; the largest, and the sum of them."""
    for g in range(scores.shape[0]):
        peak = largest(scores[g], count)
        if peak > LOWEST:
            totals[g] = raise_all(scores[g][:count], peak)
        else:  # every row is masked, or none is a number
            totals[g] = ZERO
            for row in range(count):
                if scores[g, row] != scores[g, row]:
                    peak, totals[g] = ZERO, scores[g, row]
                else:
                    scores[g, row] = ZERO
        peaks[g] = peak


@kernel
def normaliser(peaks: Any, totals: Any, g: Any, sink: Any) -> Any:
    """Log-sum-exp of a query head's scores over all pieces ``[pieces, G]`` and its sink; ``inf`` if all are masked."""
    peak = sink
    for piece in range(peaks.shape[0]):
        peak = peaks[piece, g] if peaks[piece, g] > peak else peak
    if not peak > LOWEST:
        return HIGHEST
    total = np.exp(sink - peak)
    for piece in range(peaks.shape[0]):
        total += totals[piece, g] * np.exp(peaks[piece, g] - peak)
    return peak + np.float32(np.log(total))


@kernel
def share_of(peak: Any, norm: Any) -> Any:
    """What a piece's ``exp(score - peak)`` are to be multiplied by: 0 if all of it is masked."""
    return np.float32(np.exp(peak - norm)) if peak > LOWEST else ZERO


@kernel
def weigh(probs: Any, shares: Any, weights: Any) -> None:
    """Multiply each head's part of a distribution by its share; ``weights`` ``[rows]`` get the largest of the group."""
    for g in range(probs.shape[0]):
        for row in range(weights.shape[0]):
            probs[g, row] *= shares[g]
    for row in range(weights.shape[0]):
        weights[row] = probs[0, row]
    for g in range(1, probs.shape[0]):
        raise_to(weights, probs[g])


@kernel
def pick_above(weights: Any, threshold: Any, first_row: Any, picks: Any) -> Any:
    """Write the rows above the threshold to ``picks``, counted from ``first_row``; returns how many there are."""
    count = 0
    for row in range(weights.shape[0]):
        if weights[row] > threshold:
            picks[count] = first_row + row
            count += 1
    return count


@kernel
def sum_along(probs: Any, coefficients: Any, start: Any, count: Any, along: Any) -> None:
    """What ``count`` rows hold per direction, ``along [G, r + 1]``; the last place is their probability."""
    rank = coefficients.shape[0]
    for g in range(probs.shape[0]):
        total = ZERO
        for row in range(count):
            total += probs[g, row]
        along[g, rank] = total
    for j in range(rank):
        direction = coefficients[j][start : start + count]
        for g in range(probs.shape[0]):
            total = ZERO
            for row in range(count):
                total += probs[g, row] * value(direction, row)
            along[g, j] = total


@kernel
def add_picked(probs: Any, values: Any, picks: Any, count: Any, scale: Any, out: Any) -> None:
    """Add the picked rows, weighed, to ``out [G, 2, D/2]``; probs ``[pieces, G, piece]``, ``scale [G]``."""
    half, piece = out.shape[2], probs.shape[2]
    for nth in range(count):
        row = picks[nth]
        for g in range(out.shape[0]):
            weight = probs[row // piece, g, row % piece] * scale[g]
            for d in range(half):
                out[g, 0, d] += weight * first(values, row, d, half)
                out[g, 1, d] += weight * second(values, row, d, half)


@kernel
def take_from(probs: Any, coefficients: Any, picks: Any, count: Any, along: Any) -> None:
    """Take the picked rows out of ``along [G, r + 1]``: what is left is of the unpicked."""
    rank, piece = coefficients.shape[0], probs.shape[2]
    for nth in range(count):
        row = picks[nth]
        for g in range(along.shape[0]):
            weight = probs[row // piece, g, row % piece]
            along[g, rank] -= weight
            for j in range(rank):
                along[g, j] -= weight * value(coefficients[j], row)

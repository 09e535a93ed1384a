"""From what the engine handed over to the columns of a frame: histograms, overlap, shares. In the publisher's thread.

All layers are computed together, as one array of row and position in one number, a row being what one head of one
sequence picked: a Python loop over layers would hold the interpreter that the engine needs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import numpy as np

from kcache.machine.arriving import Arriving
from kcache.watch.codec import Message
from kcache.watch.columns import NO_SHARE, PARTS, PHASES, ROLES, ROOTS, STATS
from kcache.watch.frame import MOST_BUCKETS, Memory, Phase, SequenceFrame, Speed, bucket_tokens
from kcache.watch.moment import Captured
from kcache.watch.tokens import Tokens

Shapes = tuple[tuple[int, ...], ...]
_ROW = 32
_POSITION = (1 << _ROW) - 1
_MEMORY, _SPEED, _SEQUENCE = ([item.name for item in fields(kind)] for kind in (Memory, Speed, SequenceFrame))


def build(
    captured: Captured,
    tokens: Tokens,
    memory: Memory,
    phase: Phase,
    number: int,
    job: tuple[int, int] | None = None,
) -> Message:
    """Make the columns of a frame; see :mod:`kcache.watch.columns`."""
    layers = len(captured.counts)
    counts = np.array(captured.counts, np.int64).reshape(layers, len(STATS)).T
    length = int(counts[STATS.index("tokens")].max(initial=0))
    same = captured.run == tokens.run
    speed = tokens.speed()
    message: Message = {
        "kind": "frame",
        "number": number,
        "time": captured.time_s,
        "run": captured.run,
        "phase": PHASES.index(phase),
        "batch": max(0, captured.batch),
        "observed": 0 if captured.picks is None else captured.picks.observed,
        "tokens": length,
        "kinds": captured.kinds,
        "modes": captured.modes,
        "counts": counts,
        "histogram": np.zeros((layers, MOST_BUCKETS), np.uint32),
        "held": np.zeros((layers, MOST_BUCKETS), np.uint8),
        "overlap": np.full(layers, NO_SHARE, np.uint8),
        "heads": np.zeros(layers, np.uint16),
        "mass": np.zeros(0, np.uint8),
        "memory": [getattr(memory, name) for name in _MEMORY],
        "speed": [getattr(speed, name) for name in _SPEED],
        "marks": [[mark.start, ROLES.index(mark.role)] for mark in tokens.marks] if same else [],
        "sequences": [[int(getattr(item, name)) for name in _SEQUENCE] for item in tokens.sequences()] if same else [],
        "job": None if job is None else list(job),
    }
    if captured.picks is not None:
        _add_picks(message, captured, bucket_tokens(length))
    return message


def _add_picks(message: Message, captured: Captured, width: int) -> None:
    picks = captured.picks
    assert picks is not None
    layers = len(picks.shapes)
    plan = _plan(tuple(shape[:-1] for shape in picks.shapes), 3)
    now, order = _sorted(_values(captured.positions), picks.shapes, plan)
    of = plan.layer_of[now >> _ROW]
    total = np.bincount(of, minlength=layers)
    buckets = (now & _POSITION) // width + of * MOST_BUCKETS
    message["histogram"] = np.bincount(buckets, minlength=layers * MOST_BUCKETS).reshape(layers, MOST_BUCKETS)
    weights = _values(captured.weights)
    rows = np.maximum(np.bincount(plan.layer_of, minlength=layers), 1)
    held = np.bincount(buckets, weights[order] / rows[of], layers * MOST_BUCKETS)
    message["held"] = _roots(held).reshape(layers, MOST_BUCKETS)
    if captured.before:
        before, _ = _sorted(_values(captured.before), captured.shapes_before, plan)
        both = np.concatenate([now, before])
        both.sort(kind="stable")  # which merges two runs that are sorted
        again = np.bincount(plan.layer_of[both[1:][both[1:] == both[:-1]] >> _ROW], minlength=layers)
        shares = np.rint(again / np.maximum(total, 1) * PARTS)
        message["overlap"] = np.where(total > 0, shares, NO_SHARE).astype(np.uint8)
    if any(len(shape) == 4 for shape in picks.shapes):  # those of a group's query heads together
        plan = _plan(tuple(shape[:-1] for shape in picks.shapes), 2)
        now, order = _sorted(_values(captured.positions), picks.shapes, plan)
        heads_of = np.array([shape[2] if len(shape) == 4 else 1 for shape in picks.shapes])
        weights = weights / np.repeat(heads_of, [math.prod(shape) if shape else 0 for shape in picks.shapes])
    row = now >> _ROW
    position = now & _POSITION
    differences = position.copy()
    np.subtract(position[1:], position[:-1], out=differences[1:], where=row[1:] == row[:-1])
    heads = np.array(picks.heads)
    message["mass"] = _shares(_values(captured.mass), heads, picks.observed)
    message["heads"] = heads.astype(np.uint16)
    message["shapes"] = np.array([shape[:2] or (0, 0) for shape in picks.shapes], np.uint32)
    message["rows"] = np.bincount(row, minlength=len(plan.layer_of))
    message["picks"] = differences
    message["weights"] = _roots(weights[order])


@dataclass(frozen=True, slots=True)
class _Plan:
    """Rows of picks: how many of each layer that picks, and the layer of each."""

    rows: np.ndarray
    layer_of: np.ndarray


@lru_cache(maxsize=8)
def _plan(shapes: Shapes, depth: int) -> _Plan:
    """A row for each of the first ``depth`` dimensions of picks, the last of which is not among ``shapes``.

    The same step for step, which the number of picks is not.
    """
    each = np.array([math.prod(shape[: min(depth, len(shape))]) if shape else 0 for shape in shapes])
    return _Plan(each[each > 0], np.repeat(np.arange(len(shapes)), each))


def _sorted(flat: np.ndarray, shapes: Shapes, plan: _Plan) -> tuple[np.ndarray, np.ndarray]:
    """Picks as one ascending array of row and position, and where each stood; -1, which fills up rows, is left out."""
    sizes = np.array([math.prod(shape) for shape in shapes if shape])
    row = np.repeat(np.arange(len(plan.layer_of)), np.repeat(sizes // plan.rows, plan.rows))
    picked = np.flatnonzero(flat >= 0)
    keys: np.ndarray = (row[picked] << _ROW) | flat[picked]
    if (keys[1:] >= keys[:-1]).all():
        return keys, picked
    order = keys.argsort()
    return keys[order], picked[order]


def _values(parts: Sequence[Arriving]) -> np.ndarray:
    arrays = [part.numpy() for part in parts]
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _roots(shares: np.ndarray) -> np.ndarray:
    """Shares as :data:`~kcache.watch.columns.ROOTS` has them."""
    roots: np.ndarray = np.rint(np.sqrt(np.clip(shares, 0, 1)) * ROOTS).astype(np.uint8)
    return roots


def _shares(mass: np.ndarray, heads: np.ndarray, observed: int) -> np.ndarray:
    """Mean over sequences of each layer's ``[S, Hq]``, in :data:`~kcache.watch.columns.PARTS`, layer after layer."""
    given = heads[heads > 0]
    if len(set(given.tolist())) == 1:
        mean = mass.reshape(len(given), observed, -1).mean(1).reshape(-1)
    else:
        parts = np.split(mass, np.cumsum(given * observed)[:-1])
        mean = np.concatenate([part.reshape(observed, -1).mean(0) for part in parts])
    return np.rint(np.clip(mean, 0, 1) * PARTS).astype(np.uint8)

"""The heat map as numbers: which part of the context each layer, or each KV head of one, looks at.

A cell stands for a range of positions in one layer. Its *density* is the share of it that was picked: picks over
tokens times rows of picks (KV heads times sequences); 1 means every head took all of it.

Shapes: R rows (layers or KV heads), C columns, L layers, W buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np

from kcache.watch.frame import Frame
from kcache_cli.tui.model.moment import Moment

GAMMA = 0.4
"""Densities are shown to this power: most cells hold a percent or two, a needle most of its tokens."""
OLDEST_STEPS = 256


class Mode(StrEnum):
    """What a cell's colour means."""

    LAST = "last step"
    HISTORY = "history"
    HEADS = "heads"
    AGE = "age"


@dataclass(frozen=True, slots=True)
class Window:
    """What the map shows of the context, ``start:end``; the whole of it while ``end`` is None."""

    start: int = 0
    end: int | None = None

    def within(self, tokens: int) -> tuple[int, int]:
        """The range, for a context of so many tokens."""
        end = tokens if self.end is None else min(self.end, tokens)
        start = min(self.start, max(0, end - 1))
        return start, max(end, start + 1)

    def zoomed(self, tokens: int, centre: int, factor: float, least: int) -> Window:
        """A range ``factor`` times as long around a position, at least ``least`` tokens; all where it reaches all."""
        start, end = self.within(tokens)
        length = max(least, round((end - start) * factor))
        if length >= tokens:
            return Window()
        share = (centre - start) / max(1, end - start)
        begin = min(max(0, round(centre - share * length)), tokens - length)
        return Window(begin, begin + length)

    def moved(self, tokens: int, by: int) -> Window:
        """The range moved along the context."""
        if self.end is None:
            return self
        start, end = self.within(tokens)
        begin = min(max(0, start + by), max(0, tokens - (end - start)))
        return Window(begin, begin + end - start)


@dataclass(frozen=True, slots=True, eq=False)
class Grid:
    """What the map draws.

    Attributes
    ----------
    values : ndarray ``[R, C]``
        0 to 1, a place on the colour scale.
    rows : tuple of int
        Number of each row's layer, or KV head.
    start, end : int
        Positions it covers.
    note : str or None
        What there is to say about it.
    """

    values: np.ndarray
    rows: tuple[int, ...]
    start: int
    end: int
    note: str | None = None

    def positions(self, column: int) -> range:
        """The positions of a column, at least one."""
        columns = max(1, self.values.shape[1])
        start = self.start + column * (self.end - self.start) // columns
        end = self.start + (column + 1) * (self.end - self.start) // columns
        return range(start, max(end, start + 1))

    def column(self, position: int) -> int:
        """The column that a position is in."""
        columns = self.values.shape[1]
        at = (position - self.start) * columns // max(1, self.end - self.start)
        while at + 1 < columns and position >= self.positions(at).stop:
            at += 1
        return min(max(0, at), max(0, columns - 1))


def grid(moment: Moment, mode: Mode, columns: int, window: Window, layer: int) -> Grid:
    """Make the map of a moment; ``layer`` is the one that ``Mode.HEADS`` shows."""
    frame, past = moment.frame, moment.past
    assert frame is not None
    start, end = window.within(max(1, frame.tokens))
    layers = tuple(range(len(frame.layers)))
    if mode is Mode.HEADS:
        return _heads(moment, columns, start, end, layer)
    if mode is Mode.AGE:
        ages = np.where(past.last_step < 0, OLDEST_STEPS, frame.step - past.last_step)
        values = 1 - np.log2(1 + np.clip(ages, 0, OLDEST_STEPS)) / np.log2(1 + OLDEST_STEPS)
        return Grid(_nearest(values, frame, start, end, columns), layers, start, end, _note(frame))
    seen = seen_in(moment)
    if mode is Mode.LAST:
        counts = _exact(seen, start, end, columns)
        if counts is None:
            counts = rebin(seen.heat, seen.bucket_tokens, start, end, columns)
    else:
        counts = rebin(past.decayed, frame.bucket_tokens, start, end, columns)
    return Grid(scaled(counts, start, end, past.heads), layers, start, end, _note(seen))


def seen_in(moment: Moment) -> Frame:
    """The frame whose picks are shown: an earlier one, where a run came to rest at a step not asked for any."""
    frame, before = moment.frame, moment.past.picked
    assert frame is not None
    rests = frame.phase == "idle" and not frame.heat.any()
    return before if rests and before is not None and len(before.layers) == len(frame.layers) else frame


def scaled(counts: np.ndarray, start: int, end: int, heads: int) -> np.ndarray:
    """Counts ``[R, C]`` over ``start:end`` as places on the colour scale."""
    tokens = max((end - start) / max(1, counts.shape[1]), 1e-9)
    scale: np.ndarray = np.clip(counts / (max(1.0, tokens) * max(1, heads)), 0, 1) ** GAMMA
    return scale


def rebin(histogram: np.ndarray, width: int, start: int, end: int, columns: int) -> np.ndarray:
    """Spread histograms ``[L, W]`` of buckets of ``width`` positions over ``columns`` parts of ``start:end``.

    A bucket counts as evenly filled.
    """
    edges = np.arange(histogram.shape[1] + 1) * width
    wanted = np.linspace(start, end, columns + 1)
    sums = np.concatenate([np.zeros((len(histogram), 1)), np.cumsum(histogram, 1)], 1)
    if not len(histogram):
        return np.zeros((0, columns))
    at = np.stack([np.interp(wanted, edges, row) for row in sums])
    return np.diff(at, axis=1)


def _exact(frame: Frame, start: int, end: int, columns: int) -> np.ndarray | None:
    """Counts ``[L, C]`` from exact picks; None where the frame has none."""
    if all(layer.picks is None for layer in frame.layers):
        return None
    return np.stack([_count(layer.picks, start, end, columns) for layer in frame.layers])


def _count(picks: np.ndarray | None, start: int, end: int, columns: int) -> np.ndarray:
    """Picks per column; a position is in the column that :meth:`Grid.positions` says."""
    counts = np.zeros(columns)
    if picks is None:
        return counts
    inside = picks[(picks >= start) & (picks < end)].astype(np.int64)
    length = end - start
    if length >= columns:
        edges = start + np.arange(columns + 1) * length // columns
        return np.diff(np.searchsorted(np.sort(inside), edges)).astype(float)
    tokens = np.bincount(inside - start, minlength=length).astype(float)
    return tokens[np.arange(columns) * length // columns]


def _nearest(values: np.ndarray, frame: Frame, start: int, end: int, columns: int) -> np.ndarray:
    """Values per bucket ``[L, W]``, of the bucket in the middle of each column."""
    if not values.size:
        return np.zeros((len(values), columns))
    middle = (start + (np.arange(columns) + 0.5) * (end - start) / columns).astype(int)
    return values[:, np.clip(middle // frame.bucket_tokens, 0, values.shape[1] - 1)]


def _heads(moment: Moment, columns: int, start: int, end: int, layer: int) -> Grid:
    """A row for each KV head of one layer, from the latest frame with exact picks."""
    frame, seen = moment.frame, moment.past.picked
    assert frame is not None
    picks = seen.layers[layer].picks if seen is not None and layer < len(seen.layers) else None
    if seen is None or picks is None:
        return Grid(np.zeros((0, columns)), (), start, end, f"layer {layer}: no exact picks here")
    counts = np.stack([_count(picks[:, head], start, end, columns) for head in range(picks.shape[1])])
    note = None if seen.step == frame.step else f"picks of step {seen.step:,}"
    return Grid(scaled(counts, start, end, picks.shape[0]), tuple(range(len(counts))), start, end, note)


def _note(frame: Frame) -> str | None:
    modes = {layer.mode for layer in frame.layers}
    if frame.phase == "prefill" or modes == {"prefill"}:
        return f"reading the prompt{_reached(frame)}; attention is exact, nothing is picked"
    if "topn" not in modes and "dense" in modes:
        heat = frame.heat.any()
        return "dense, exact: shown is what would be picked" if heat else "dense: attention is exact"
    return None


def _reached(frame: Frame) -> str:
    """How far a piece of the prompt has come, while it is on its way through the layers."""
    lengths = [layer.stats.tokens for layer in frame.layers if layer.kind != "stock"]
    done = sum(length == frame.tokens for length in lengths)
    return f", layer {done} of {len(lengths)}" if done < len(lengths) else ""

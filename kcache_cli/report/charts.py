"""Charts as plain paths, in a box of 1000 × 100 that a page stretches to its own size.

Lines, areas and tick marks are numbers made here; words and colours belong to the template.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

WIDTH, HEIGHT = 1000.0, 100.0
MOST_POINTS = 600


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: where, in percent from the left or the bottom, and what it says."""

    at: float
    text: str


@dataclass(frozen=True)
class Band:
    """A stretch of the horizontal axis, in percent."""

    at: float
    width: float


@dataclass(frozen=True)
class Shape:
    """A line or an area: its style's name, what the legend calls it, its path, and its values for the readout."""

    style: str
    label: str
    path: str
    values: list[str]
    area: bool = False


@dataclass(frozen=True)
class Chart:
    """A chart to put on a page."""

    name: str
    title: str
    note: str
    shapes: list[Shape]
    y_ticks: list[Tick]


Form = Callable[[float], str]


class Axis:
    """The horizontal axis that all charts share: samples, one after the other, several to a point of a long run.

    Parameters
    ----------
    count : int
        Samples.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._starts = np.unique(np.linspace(0, count, min(count, MOST_POINTS), endpoint=False).astype(int))

    @property
    def points(self) -> int:
        """How many points there are."""
        return len(self._starts)

    def last(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """The last sample of each point."""
        ends = np.append(self._starts[1:], self.count) - 1
        return np.asarray(values, np.float64)[ends]

    def total(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """The sum of each point's samples, NaN counted as nothing."""
        return np.add.reduceat(np.nan_to_num(np.asarray(values, np.float64)), self._starts)

    def mean(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """The mean of each point's samples that are known; NaN where none is."""
        known = np.isfinite(np.asarray(values, np.float64)).astype(np.float64)
        count = np.add.reduceat(known, self._starts)
        return np.divide(self.total(values), count, out=np.full(len(count), np.nan), where=count > 0)

    def x(self, point: float) -> float:
        """Where a point is, in the box."""
        return WIDTH * (point + 0.5) / max(1, self.points)

    def bands(self, chosen: Sequence[bool]) -> list[Band]:
        """The stretches of samples that are chosen."""
        flags = np.concatenate([[False], np.asarray(chosen, bool), [False]])
        edges = np.flatnonzero(flags[1:] != flags[:-1]).reshape(-1, 2)
        return [Band(100 * left / self.count, 100 * (right - left) / self.count) for left, right in edges.tolist()]

    def at(self, sample: int) -> float:
        """Where a sample is, in percent."""
        return 100 * (sample + 0.5) / max(1, self.count)


def line(axis: Axis, values: np.ndarray, top: float) -> str:
    """A path through values that are known; it breaks where they are not."""
    parts, pen_down = [], False
    for point, value in enumerate(values):
        if not math.isfinite(value):
            pen_down = False
            continue
        parts.append(f"{'L' if pen_down else 'M'}{axis.x(point):.1f} {_y(value, top):.1f}")
        if not pen_down:
            parts.append("h0.1")  # a point between two gaps is a dot
        pen_down = True
    return "".join(parts)


def area(axis: Axis, upper: np.ndarray, lower: np.ndarray, top: float) -> str:
    """The area between two curves, in steps as wide as a point."""
    if not len(upper):
        return ""
    edge = WIDTH / axis.points
    there = "".join(f"V{_y(value, top):.1f}H{(at + 1) * edge:.1f}" for at, value in enumerate(upper))
    back = "".join(f"V{_y(value, top):.1f}H{at * edge:.1f}" for at, value in reversed(list(enumerate(lower))))
    return f"M0 {_y(lower[0], top):.1f}{there}{back}Z"


def _y(value: float, top: float) -> float:
    return HEIGHT * (1 - min(max(value, 0.0), top) / (top or 1.0))


def nice(largest: float, base: float = 1000.0) -> float:
    """The end of a scale that holds ``largest``: 1, 1.5, 2, 3, 4, 5, 6 or 8 times a power."""
    if not largest > 0 or not math.isfinite(largest):
        return 1.0
    unit = base ** math.floor(math.log(largest, base))
    while largest > unit * 8:
        unit *= 10 if base == 1000.0 or unit * 10 < largest else 2
    return next((unit * step for step in (1, 1.5, 2, 3, 4, 5, 6, 8) if unit * step >= largest), unit * 10)


def y_ticks(top: float, form: Form) -> list[Tick]:
    """Marks at the bottom, in the middle and at the top."""
    return [Tick(100 * at / 2, form(top * at / 2)) for at in range(3)]

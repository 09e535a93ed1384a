"""How rows of a map go onto lines of the screen, and marks onto its axis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kcache.watch.frame import Mark
from kcache_cli.tui.model.heat import Grid
from kcache_cli.tui.model.words import position


@dataclass(frozen=True, slots=True, eq=False)
class Slots:
    """Rows of a map in the slots of the screen, one or two to a line.

    Attributes
    ----------
    values : ndarray ``[slots, C]``
        Of several rows in one slot the largest.
    first, stop : ndarray ``[slots]``
        The rows in each slot.
    per_line : int
    """

    values: np.ndarray
    first: np.ndarray
    stop: np.ndarray
    per_line: int

    @property
    def lines(self) -> int:
        """Lines that are used."""
        return -(-len(self.values) // self.per_line)

    def slot(self, row: int) -> int:
        """The first slot that has a row."""
        return int(np.argmax(self.stop > row)) if len(self.stop) else 0

    def row(self, line: int, lower: bool = False) -> int:
        """The first row of a line, or of its lower half."""
        at = min(line * self.per_line + (1 if lower and self.per_line == 2 else 0), len(self.first) - 1)
        return int(self.first[max(0, at)]) if len(self.first) else 0


def slots(grid: Grid, lines: int, per_line: int) -> Slots:
    """Spread the rows of a map over at most ``lines`` lines: as large as they fit, or several in one."""
    rows, room = len(grid.values), max(1, lines * per_line)
    if rows == 0:
        empty = np.zeros(0, int)
        return Slots(grid.values, empty, empty, per_line)
    if rows <= room:
        each = room // rows
        first = np.repeat(np.arange(rows), each)
        return Slots(grid.values[first], first, first + 1, per_line)
    edges = np.arange(room + 1) * rows // room
    return Slots(np.maximum.reduceat(grid.values, edges[:-1], axis=0), edges[:-1], edges[1:], per_line)


@dataclass(frozen=True, slots=True)
class Tick:
    """A word on the axis: where it begins, and what kind it is."""

    column: int
    text: str
    kind: str


def ticks(grid: Grid, columns: int, marks: tuple[Mark, ...], sign: str) -> list[Tick]:
    """Turn marks first, then as many round positions as there is room for; none overlap."""
    taken = [False] * columns
    found: list[Tick] = []

    def place(column: int, text: str, kind: str) -> bool:
        stop = column + len(text)
        if stop > columns or any(taken[max(0, column - 1) : stop + 1]):
            return False
        taken[column:stop] = [True] * len(text)
        found.append(Tick(column, text, kind))
        return True

    for mark in marks:
        if grid.start <= mark.start < grid.end:
            column = grid.column(mark.start)
            place(column, f"{sign}{mark.role}", mark.role) or place(column, sign, mark.role)
    length = grid.end - grid.start
    step = 1
    while step * columns < length * 10:
        step *= 2
    for at in range(-(-grid.start // step) * step, grid.end, step):
        place(grid.column(at), position(at), "position")
    return sorted(found, key=lambda tick: tick.column)

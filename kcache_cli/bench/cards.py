"""Rows of ``kcache bench`` for a terminal: a card per context and batch, engines side by side, a line per figure.

A Markdown table of all figures is some 180 columns wide. A card is as wide as its engines; those that do not fit beside
the others come below.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from itertools import groupby

from kcache_cli.bench.table import COLUMNS, called, legend, note
from kcache_cli.rows.formats import Row

_GAP = 2
_LEAST = 20
_IN_THE_HEAD = ("engine", "ctx", "batch", "topn", "note")
_SPREAD = "  lowest–highest"

Line = tuple[str, list[str]]
"""What a line of a card says, and a cell for each engine."""


def cards(rows: Sequence[Row], width: int) -> str:
    """All cases, and a legend, in lines of at most ``width`` columns where that can be."""
    if not rows:
        return ""
    blocks = [_case(list(case), width) for _, case in groupby(rows, lambda row: (row["ctx"], row["batch"]))]
    return "\n".join([*blocks, *(_fill(line, width) for line in legend(rows)), ""])


def _case(rows: list[Row], width: int) -> str:
    measured = [row for row in rows if row["status"] == "ok"]
    heads, lines = [called(row) for row in measured], _lines(measured)
    first = max((len(label) for label, _ in lines), default=0)
    widths = [_GAP + max([len(head), *(len(cells[at]) for _, cells in lines)]) for at, head in enumerate(heads)]
    parts = [f"context {rows[0]['ctx']:,} · batch {rows[0]['batch']}"]
    for places in _side_by_side(widths, width - first):
        for label, cells in [("", heads), *lines]:
            if any(cells[at] for at in places):
                line = label.ljust(first) + "".join(cells[at].rjust(widths[at]) for at in places)
                parts.append(line.rstrip())
    return "\n".join([*parts, *(_fill(line, width) for line in _notes(rows)), ""])


def _notes(rows: list[Row]) -> list[str]:
    """What there is to say beside the figures, once where it is the same of all engines."""
    said = {note(row) for row in rows}
    if len(said) == 1:
        return [text for text in said if text]
    return [f"{called(row)}: {note(row)}" for row in rows if note(row)]


def _fill(line: str, width: int) -> str:
    return textwrap.fill(line, max(width, _LEAST), subsequent_indent="  ", break_on_hyphens=False)


def _lines(rows: list[Row]) -> list[Line]:
    """A line for each figure that any engine has; its spread, in brackets in a table, gets one of its own."""
    lines: list[Line] = []
    for head, cell_of in COLUMNS:
        cells = [cell_of(row) for row in rows]
        if head in _IN_THE_HEAD or not any(cells):
            continue
        lines.append((head, [cell.partition(" [")[0] for cell in cells]))
        spreads = [cell.partition(" [")[2].removesuffix("]") for cell in cells]
        if any(spreads):
            lines.append((_SPREAD, spreads))
    return lines


def _side_by_side(widths: list[int], room: int) -> list[list[int]]:
    """Groups of neighbours that fit in one line together; at least one each."""
    groups: list[list[int]] = []
    left = -1
    for at, width in enumerate(widths):
        if width > left:
            groups.append([])
            left = room
        groups[-1].append(at)
        left -= width
    return groups

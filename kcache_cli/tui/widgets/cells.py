"""Lines of the heat map: two values above each other in a cell, or one as a shade where there are no half blocks.

Equal neighbours are one stretch of one style: a map is mostly background, and the screen is drawn many times a second.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise

import numpy as np
from rich.style import Style
from rich.text import Span, Text

from kcache_cli.tui.look import Look
from kcache_cli.tui.palette import RAMP_STEPS, Palette
from kcache_cli.tui.widgets.paint import shade


def levels(values: np.ndarray) -> np.ndarray:
    """Places on the colour scale for values from 0 to 1."""
    return np.minimum((values * RAMP_STEPS).astype(int), RAMP_STEPS - 1)


def cell_line(upper: np.ndarray, lower: np.ndarray | None, look: Look, cursor: int | None, on_upper: bool) -> Text:
    """A line of cells.

    Parameters
    ----------
    upper, lower : ndarray ``[C]``
        Values from 0 to 1; ``lower`` is None where the line has one row.
    look : Look
    cursor : int or None
        The column of the cursor, if it is in this line, and
    on_upper : bool
        whether it is on the upper row.
    """
    if not look.halves:
        return _shaded(upper, look, cursor)
    none = RAMP_STEPS  # the background below the last row
    bottoms = np.full(len(upper), none) if lower is None else levels(lower)
    codes = levels(upper) * (RAMP_STEPS + 1) + bottoms
    edges = [0, *(np.flatnonzero(np.diff(codes)) + 1).tolist(), len(codes)]
    if cursor is not None:
        edges = sorted({*edges, cursor, cursor + 1})
    spans = []
    for start, end in pairwise(edges):
        code = int(codes[start])
        style = _style(look.palette, code // (none + 1), code % (none + 1), start == cursor, on_upper)
        spans.append(Span(start, end, style))
    return Text(look.signs.half * len(codes), spans=spans)


def _shaded(values: np.ndarray, look: Look, cursor: int | None) -> Text:
    text = Text("".join(shade(float(value), look) for value in values), look.palette.text)
    if cursor is not None:
        text.stylize("reverse bold", cursor, cursor + 1)
        if look.ascii:
            text.plain = f"{text.plain[:cursor]}X{text.plain[cursor + 1 :]}"
    return text


@lru_cache(maxsize=16384)
def _style(palette: Palette, top: int, bottom: int, is_cursor: bool, on_upper: bool) -> Style:
    """Of a cell with these places on the scale."""
    ramp = (*palette.ramp, palette.background)
    upper, lower = ramp[top], ramp[bottom]
    if is_cursor:
        upper, lower = (palette.cursor, lower) if on_upper else (upper, palette.cursor)
    return Style.parse(f"{upper} on {lower}")

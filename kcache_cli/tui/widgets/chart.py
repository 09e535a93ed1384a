"""Small pictures of numbers: areas over time, bars, sparklines."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from rich.text import Text

from kcache_cli.tui.look import Look

_DOTS_UP = ((0x40, 0x04, 0x02, 0x01), (0x80, 0x20, 0x10, 0x08))


def area(values: np.ndarray, width: int, height: int, most: float, colours: Sequence[str], look: Look) -> list[Text]:
    """An area over time, the newest on the right, in braille: two samples a cell, four steps a line.

    Parameters
    ----------
    values : ndarray ``[2 * width]``
    most : float
        The value that fills the height.
    colours : sequence of str
        Of the lines, from the bottom up; the last one goes on.
    """
    if look.ascii:
        return _blocks(values[1::2], width, height, most, colours, look)
    steps = np.ceil(np.clip(values / max(most, 1e-12), 0, 1) * height * 4 - 1e-9).astype(int)
    lines = []
    for line in range(height - 1, -1, -1):
        filled = np.clip(steps - line * 4, int(line == 0), 4)  # the lowest dots are the base line
        signs = "".join(_BRAILLE[code] for code in (filled[0::2] * 5 + filled[1::2]).tolist())
        lines.append(Text(signs, colours[min(line, len(colours) - 1)]))
    return lines


def _braille(left: int, right: int) -> str:
    dots = 0
    for column, filled in zip(_DOTS_UP, (left, right), strict=True):
        for dot in column[:filled]:
            dots |= dot
    return chr(0x2800 + dots) if dots else " "


_BRAILLE = [_braille(left, right) for left in range(5) for right in range(5)]


def _blocks(values: np.ndarray, width: int, height: int, most: float, colours: Sequence[str], look: Look) -> list[Text]:
    signs = look.signs.bars
    top = len(signs) - 1
    steps = np.ceil(np.clip(values / max(most, 1e-12), 0, 1) * height * top - 1e-9).astype(int)
    lines = []
    for line in range(height - 1, -1, -1):
        inside = np.clip(steps - line * top, 0, top)
        cells = "".join(signs[int(step)] for step in inside)
        lines.append(Text(cells.rjust(width), colours[min(line, len(colours) - 1)]))
    return lines


def bar(share: float | None, width: int, colour: str, back: str, look: Look) -> Text:
    """A bar for a share of 1, to an eighth of a cell."""
    filled = 0 if share is None else round(min(max(share, 0), 1) * width * 8)
    whole, rest = divmod(filled, 8)
    signs = look.signs.eighths
    plain = look.ascii or not look.colour
    text = Text.assemble((signs[-1] * whole, colour) if plain else (" " * whole, f"on {colour}"))
    if whole < width:
        end = signs[rest * (len(signs) - 1) // 8] if rest else " "
        text.append(end, colour if plain else f"{colour} on {back}")
        text.append((look.signs.dot if plain else " ") * (width - whole - 1), back if plain else f"on {back}")
    return text


def rule(share: float | None, width: int, colour: str, look: Look) -> Text:
    """A thin bar for a share of 1, to half a cell: for many of them below each other."""
    filled = 0 if share is None else round(min(max(share, 0), 1) * width * 2)
    whole, half = divmod(filled, 2)
    signs, faint = look.signs, look.palette.faint
    rest = signs.line if look.colour and not look.ascii else " "
    text = Text.assemble((signs.full * whole, colour))
    if half:
        text.append(signs.half_line, colour)
    return text.append(rest * (width - whole - half), faint)

"""A screen as SVG that needs no font for its blocks and lines, fetches nothing, and is a fraction of the size.

Cells are 12 × 24 and lie on whole numbers, so that neighbours meet. Everything of one colour is one path.
"""

from __future__ import annotations

from collections import defaultdict
from html import escape

from rich.cells import cell_len

from kcache_cli.pictures.glyphs import CELL_H, CELL_W, ROUND, SHADES, boxes
from kcache_cli.pictures.screen import Fill, Run, Screen, cells
from kcache_cli.text import one_line, printable

FONT_SIZE = 19.93
"""At which a character of DejaVu Sans Mono is as wide as a cell."""
FONTS = "'DejaVu Sans Mono', Menlo, Consolas, 'Liberation Mono', monospace"
_BASELINE = 18
_EDGE, _BAR = 14, 40
_BUTTONS = ("#ff5f57", "#febc2e", "#28c840")


def draw(screen: Screen, title: str, ground: str) -> str:
    """Write a screen as a window with a title.

    Parameters
    ----------
    screen : Screen
    title : str
    ground : str
        Colour of the window, ``#rrggbb``.
    """
    width, height = screen.columns * CELL_W + 2 * _EDGE, screen.lines * CELL_H + _BAR + _EDGE
    words, shapes = _apart(screen.runs)
    said = escape(one_line(title))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'font-family="{FONTS}" font-size="{FONT_SIZE}">',
        f'<rect width="{width}" height="{height}" rx="10" fill="{ground}"/>',
        f'<rect x=".5" y=".5" width="{width - 1}" height="{height - 1}" rx="9.5" fill="none" stroke="#808080" '
        'stroke-opacity=".35"/>',
        *(f'<circle cx="{24 + 22 * at}" cy="21" r="6.5" fill="{colour}"/>' for at, colour in enumerate(_BUTTONS)),
        f'<text x="{width / 2}" y="27" text-anchor="middle" font-size="16" fill="#808890">{said}</text>',
        f'<g transform="translate({_EDGE},{_BAR})">',
        '<g shape-rendering="crispEdges">',
        *_backgrounds(screen.fills, ground),
        *(_path(colour, opacity, path) for (colour, opacity), path in shapes.items()),
        "</g>",
        *_corners(screen.runs),
        *(_text(run) for run in words),
        "</g></svg>\n",
    ]
    return "\n".join(parts)


def _backgrounds(fills: list[Fill], ground: str) -> list[str]:
    paths: dict[str, str] = defaultdict(str)
    for fill in fills:
        if fill.colour != ground:
            paths[fill.colour] += _box(fill.column * CELL_W, fill.line * CELL_H, fill.width * CELL_W, CELL_H)
    return [_path(colour, 1.0, path) for colour, path in paths.items()]


def _apart(runs: list[Run]) -> tuple[list[Run], dict[tuple[str, float], str]]:
    """Words for a font, and shapes by colour and opacity."""
    words: list[Run] = []
    shapes: dict[tuple[str, float], str] = defaultdict(str)
    for run in runs:
        start, text = 0, ""
        for column, character in [*cells(printable(run.text)), (-1, " ")]:
            drawn = None if column < 0 else boxes(character)
            is_word = column >= 0 and drawn is None and character not in ROUND and character != " "
            for x, y, width, height in drawn or ():
                left, top = (run.column + column) * CELL_W, run.line * CELL_H
                shapes[run.colour, SHADES.get(character, 1.0)] += _box(left + x, top + y, width, height)
            is_gap = character == " " and column >= 0 and text and not text.endswith(" ")
            if is_word or is_gap:
                start, text = (start, text) if text else (column, "")
                text += character
            elif text:
                words.append(_part(run, start, text))
                text = ""
    return words, shapes


def _part(run: Run, start: int, text: str) -> Run:
    return Run(run.line, run.column + start, text.rstrip(), run.colour, run.bold, run.italic, run.underline)


def _corners(runs: list[Run]) -> list[str]:
    paths: dict[str, str] = defaultdict(str)
    for run in runs:
        for column, character in cells(run.text):
            if character in ROUND:
                across, down = ROUND[character]
                x, y = (run.column + column + 0.5) * CELL_W, (run.line + 0.5) * CELL_H
                rise, turn = -down * CELL_H / 4, across * CELL_W / 2
                paths[run.colour] += f"M{x:g} {y - 2 * rise:g}v{rise:g}q0 {rise:g} {turn:g} {rise:g}"
    return [f'<path fill="none" stroke="{colour}" stroke-width="2" d="{path}"/>' for colour, path in paths.items()]


def _box(x: float, y: float, width: float, height: float) -> str:
    return f"M{x:g} {y:g}h{width:g}v{height:g}h{-width:g}z"


def _path(colour: str, opacity: float, path: str) -> str:
    pale = "" if opacity == 1.0 else f' fill-opacity="{opacity}"'
    return f'<path fill="{colour}"{pale} d="{path}"/>'


def _text(run: Run) -> str:
    style = (
        (' font-weight="bold"' if run.bold else "")
        + (' font-style="italic"' if run.italic else "")
        + (' text-decoration="underline"' if run.underline else "")
    )
    columns = cell_len(run.text)
    said = escape(run.text).replace(" ", "\xa0")
    return (
        f'<text x="{run.column * CELL_W}" y="{run.line * CELL_H + _BASELINE}" textLength="{columns * CELL_W}" '
        f'fill="{run.colour}"{style}>{said}</text>'
    )

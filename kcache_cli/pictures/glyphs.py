"""Characters that terminals draw themselves, as rectangles in a cell: blocks, lines, braille.

Drawn by a font they leave seams between cells, or are missing. A rectangle is x, y, width, height in a cell of
:data:`CELL_W` × :data:`CELL_H`.
"""

from __future__ import annotations

from functools import cache

CELL_W, CELL_H = 12, 24
Box = tuple[float, float, float, float]

_QUADRANTS = {character: bits for bits, character in enumerate("▘▝▀▖▌▞▛▗▚▐▜▄▙▟█", start=1)}
# Left, up, right, down: 1 is a thin line, 2 a thick one.
_LINES = {
    "─": (1, 0, 1, 0), "│": (0, 1, 0, 1), "┌": (0, 0, 1, 1), "┐": (1, 0, 0, 1), "└": (0, 1, 1, 0), "┘": (1, 1, 0, 0),
    "├": (0, 1, 1, 1), "┤": (1, 1, 0, 1), "┬": (1, 0, 1, 1), "┴": (1, 1, 1, 0), "┼": (1, 1, 1, 1),
    "━": (2, 0, 2, 0), "┃": (0, 2, 0, 2), "┏": (0, 0, 2, 2), "┓": (2, 0, 0, 2), "┗": (0, 2, 2, 0), "┛": (2, 2, 0, 0),
    "╸": (2, 0, 0, 0), "╺": (0, 0, 2, 0), "╹": (0, 2, 0, 0), "╻": (0, 0, 0, 2), "╴": (1, 0, 0, 0), "╶": (0, 0, 1, 0),
    "╵": (0, 1, 0, 0), "╷": (0, 0, 0, 1), "╼": (1, 0, 2, 0), "╾": (2, 0, 1, 0), "┿": (2, 1, 2, 1), "╂": (1, 2, 1, 2),
    "╋": (2, 2, 2, 2), "┣": (0, 2, 2, 2), "┫": (2, 2, 0, 2), "┳": (2, 0, 2, 2), "┻": (2, 2, 2, 0),
}  # fmt: skip
ROUND = {"╭": (1, 1), "╮": (-1, 1), "╯": (-1, -1), "╰": (1, -1)}
"""Rounded corners, which are no rectangles: the way they go from the middle, in x and in y."""
SHADES = {"░": 0.25, "▒": 0.5, "▓": 0.75}
_THIN, _THICK = 2, 4


@cache
def boxes(character: str) -> tuple[Box, ...] | None:
    """The rectangles of a character; None if it is one for a font."""
    code = ord(character[0]) if len(character) == 1 else 0
    if character in _QUADRANTS:
        return tuple(_quadrants(_QUADRANTS[character]))
    if character in SHADES:
        return ((0, 0, CELL_W, CELL_H),)
    if 0x2581 <= code <= 0x2587:
        height = CELL_H * (code - 0x2580) / 8
        return ((0, CELL_H - height, CELL_W, height),)
    if 0x2589 <= code <= 0x258F:
        return ((0, 0, CELL_W * (0x2590 - code) / 8, CELL_H),)
    if character == "Ⅱ":  # stands for a pause, and few fonts of one width have it
        return ((3, 5, 2, 14), (7, 5, 2, 14))
    if character == "▔":
        return ((0, 0, CELL_W, CELL_H / 8),)
    if character == "▕":
        return ((CELL_W * 7 / 8, 0, CELL_W / 8, CELL_H),)
    if character in _LINES:
        return tuple(_lines(_LINES[character]))
    if 0x2800 <= code <= 0x28FF:
        return tuple(_dots(code - 0x2800))
    return None


def _quadrants(bits: int) -> list[Box]:
    half_w, half_h = CELL_W / 2, CELL_H / 2
    if bits == 15:
        return [(0, 0, CELL_W, CELL_H)]
    found: list[Box] = []
    for row in range(2):
        left, right = bits >> (2 * row) & 1, bits >> (2 * row + 1) & 1
        if left and right:
            found.append((0, row * half_h, CELL_W, half_h))
        elif left or right:
            found.append((0 if left else half_w, row * half_h, half_w, half_h))
    return found


def _lines(arms: tuple[int, int, int, int]) -> list[Box]:
    left, up, right, down = ((0, _THIN, _THICK)[arm] for arm in arms)
    middle_x, middle_y = CELL_W / 2, CELL_H / 2
    reach_x, reach_y = max(up, down) / 2, max(left, right) / 2
    found: list[Box] = []
    if left:
        found.append((0, middle_y - left / 2, middle_x + reach_x, left))
    if right:
        found.append((middle_x - reach_x, middle_y - right / 2, middle_x + reach_x, right))
    if up:
        found.append((middle_x - up / 2, 0, up, middle_y + reach_y))
    if down:
        found.append((middle_x - down / 2, middle_y - reach_y, down, middle_y + reach_y))
    return found


def _dots(bits: int) -> list[Box]:
    """Dots are numbered down the left column, down the right one, then the last row."""
    places = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (0, 3), (1, 3)]
    return [(1 + 6 * x, 1 + 6 * y, 4, 4) for bit, (x, y) in enumerate(places) if bits >> bit & 1]

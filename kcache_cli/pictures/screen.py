"""A screen as Textual exports it, taken apart into lines of styled text and backgrounds.

That export relies on a font fetched from the network for its blocks and lines to meet. Taken apart, it can be drawn
anew with shapes in their place (:mod:`kcache_cli.pictures.draw`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from xml.etree import ElementTree

from rich.cells import cell_len

_SVG = "{http://www.w3.org/2000/svg}"
_CELL_W, _CELL_H, _BASELINE = 12.2, 24.4, 20.0
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_RULE = re.compile(r"\.([\w-]+) \{ ([^}]*)\}")


@dataclass(frozen=True)
class Run:
    """Text in one style: its line and first column."""

    line: int
    column: int
    text: str
    colour: str
    bold: bool = False
    italic: bool = False
    underline: bool = False


@dataclass(frozen=True)
class Fill:
    """A background: a line, a column, how many columns, a colour."""

    line: int
    column: int
    width: int
    colour: str


@dataclass(frozen=True)
class Screen:
    """What a terminal shows."""

    columns: int
    lines: int
    fills: list[Fill]
    runs: list[Run]


def read_screen(svg: str, columns: int, lines: int) -> Screen:
    """Take apart what :meth:`textual.app.App.export_screenshot` returned for a terminal of this size."""
    root = ElementTree.fromstring(_NOT_XML.sub("", svg))
    styles = _styles("".join(element.text or "" for element in root.iter(f"{_SVG}style")))
    fills = [
        Fill(
            round((float(rect.get("y", 0)) - 1.5) / _CELL_H),
            round(float(rect.get("x", 0)) / _CELL_W),
            round(float(rect.get("width", 0)) / _CELL_W),
            str(rect.get("fill")),
        )
        for rect in root.iter(f"{_SVG}rect")
        if rect.get("shape-rendering") == "crispEdges"
    ]
    runs = []
    for text in root.iter(f"{_SVG}text"):
        style = styles.get(str(text.get("class")), {})
        said = (text.text or "").replace("\xa0", " ").rstrip("\n")
        if text.get("clip-path") is None or not said.strip():
            continue
        runs.append(
            Run(
                round((float(text.get("y", 0)) - _BASELINE) / _CELL_H),
                round(float(text.get("x", 0)) / _CELL_W),
                said,
                style.get("fill", "#ffffff"),
                style.get("font-weight") == "bold",
                style.get("font-style") == "italic",
                "underline" in style.get("text-decoration", ""),
            )
        )
    return Screen(columns, lines, fills, runs)


def _styles(css: str) -> dict[str, dict[str, str]]:
    found = {}
    for name, body in _RULE.findall(css):
        pairs = (part.split(":", 1) for part in body.split(";") if ":" in part)
        found[name] = {key.strip(): value.strip() for key, value in pairs}
    return found


def cells(text: str) -> list[tuple[int, str]]:
    """The characters of a text with the column each begins at; what takes no room goes with the one before."""
    found: list[tuple[int, str]] = []
    column = 0
    for character in text:
        width = cell_len(character)
        if width == 0 and found:
            found[-1] = found[-1][0], found[-1][1] + character
        else:
            found.append((column, character))
        column += width
    return found

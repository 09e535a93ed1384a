"""The screen as a file: its characters, then a code for the style of each, so that a difference can be read."""

from __future__ import annotations

import io
import string
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from rich.style import Style
from rich.text import Text

FOLDER = Path(__file__).parent / "screens"
_LETTERS = string.ascii_letters + string.digits


def words(app: Any) -> str:
    """The characters of the screen an app shows, without their styles."""
    return _printed(app).export_text()


def picture(app: Any) -> str:
    """Draw the screen an app shows."""
    width, height = app.size
    lines = [Text.from_ansi(line) for line in _printed(app).export_text(styles=True).split("\n")][:height]
    known: dict[str, str] = {}
    rows = [_styles(line, width, known) for line in lines]
    text = [line.plain.ljust(width).rstrip() for line in lines]
    names = [f"{code} {name}" for name, code in known.items()]
    return "\n".join([*text, "-" * width, *rows, "-" * width, *names]) + "\n"


def _printed(app: Any) -> Console:
    width, height = app.size
    console = Console(
        width=width,
        height=height,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
        record=True,
        legacy_windows=False,
    )
    console.print(app.screen._compositor.render_update(full=True, screen_stack=app._background_screens))
    return console


def _styles(line: Text, width: int, known: dict[str, str]) -> str:
    cells = [Style()] * width
    for span in line.spans:
        for at in range(span.start, min(span.end, width)):
            cells[at] = cells[at] + (Style.parse(span.style) if isinstance(span.style, str) else span.style)
    codes = []
    for style in cells:
        name = str(style)
        if name not in known:
            known[name] = _LETTERS[len(known) // len(_LETTERS)] + _LETTERS[len(known) % len(_LETTERS)]
        codes.append(known[name])
    return "".join(codes)


def check(app: Any, name: str, config: pytest.Config) -> None:
    """Compare the screen with the committed one; with ``--renew-screens`` write it anew."""
    found, path = picture(app), FOLDER / f"{name}.txt"
    if config.getoption("--renew-screens"):
        path.write_text(found, encoding="utf-8")
        return
    assert path.exists(), f"{path.name} is missing; run pytest tests/tui --renew-screens, and look at it"
    assert found == path.read_text(encoding="utf-8"), (
        f"{name} looks different; if that is meant, run pytest tests/tui --renew-screens, and look at the difference"
    )

"""A picture of what an app shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kcache_cli.pictures.draw import draw
from kcache_cli.pictures.screen import read_screen

if TYPE_CHECKING:
    from textual.app import App


def picture_of(app: App[Any], title: str) -> str:
    """What an app shows now, as SVG."""
    screen = read_screen(app.export_screenshot(), *app.size)
    return draw(screen, title, str(app.get_css_variables().get("background", "#101010")))

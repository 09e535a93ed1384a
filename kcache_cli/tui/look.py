"""How things are drawn at present: palette and signs, and whether colour may carry meaning."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, cast

from kcache_cli.tui.palette import ASCII, DARK, UNICODE, Palette, Signs

if TYPE_CHECKING:
    from textual.app import App


@dataclass(frozen=True, slots=True)
class Look:
    """A palette, the signs, and whether there is colour at all."""

    palette: Palette = DARK
    signs: Signs = UNICODE
    colour: bool = True

    @property
    def halves(self) -> bool:
        """Whether a cell of the terminal shows two values, one above the other."""
        return self.colour and bool(self.signs.half)

    @property
    def ascii(self) -> bool:
        """Whether only ASCII is drawn."""
        return self.signs is ASCII


class _HasLook(Protocol):
    look: Look


def look_of(app: App) -> Look:
    """The look of the app a widget is in."""
    return cast(_HasLook, app).look

"""The keys, and what the panels mean."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from kcache_cli.tui.keys import KEYS
from kcache_cli.tui.look import look_of

_PANELS = (
    ("memory", "what the device tier and the host tier hold, and what a full KV cache would take, to one scale"),
    ("link", "bytes that cross between the tiers: to the device above, to the host below"),
    ("heat map", "layers × context; the brighter, the larger a share of a cell's tokens the last step picked"),
    ("mass", "share of its attention that a layer's picks hold; what stands in for the rest is the tail"),
    ("again", "share of a layer's picks that the step before had picked as well"),
    ("hits", "share of the rows that were still on the device"),
)


class HelpScreen(ModalScreen[None]):
    """Any key that closes, closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,q,question_mark", "close", "close")]
    DEFAULT_CSS = """
    HelpScreen { align: center middle; background: $background 60%; }
    HelpScreen > VerticalScroll { width: 92; max-width: 96%; height: auto; max-height: 90%; border: round $accent;
        border-title-color: $accent; background: $surface; padding: 1 2; }
    HelpScreen Static { width: 1fr; height: auto; }
    """

    def compose(self) -> ComposeResult:
        """One text."""
        with VerticalScroll() as box:
            box.border_title = "keys"
            yield Static(self._text())

    def _text(self) -> Text:
        palette = look_of(self.app).palette
        text = Text()
        for key in KEYS:
            shown = key.display or " ".join(self.app.get_key_display(binding) for binding in self._bound(key.id))
            text.append(f"{shown:>12}  ", f"bold {palette.accent}")
            text.append(f"{key.long}\n", palette.text)
        text.append("\n")
        rest = (
            ("↑ ↓ a d", "move the heat map's cursor; the mouse reads a cell, a drag zooms"),
            ("z x ⌫", "zoom in, out, all the way out"),
            ("enter", "open the chosen layer"),
        )
        for shown, what in rest:
            text.append(f"{shown:>12}  ", f"bold {palette.accent}")
            text.append(f"{what}\n", palette.text)
        text.append("\n")
        for name, what in _PANELS:
            text.append(f"{name:>12}  ", f"bold {palette.warn}")
            text.append(f"{what}\n", palette.muted)
        return text

    def _bound(self, name: str) -> list[Binding]:
        return [
            active.binding for active in self.app.screen_stack[0].active_bindings.values() if active.binding.id == name
        ][:1]

    def action_close(self) -> None:
        """Close it."""
        self.dismiss(None)

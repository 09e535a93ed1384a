"""The keys, and what the panels mean."""

from __future__ import annotations

from typing import ClassVar

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from kcache_cli.tui.keys import KEYS
from kcache_cli.tui.look import look_of

_PANELS = (
    ("memory", "what the tiers hold, and what a full KV cache would take, to one scale"),
    ("link", "bytes between the tiers over time: to the device above, to the host below"),
    ("heat map", "layers × context; the brighter, the more of a cell's tokens were picked"),
    ("attn", "share of a layer's attention that its picks hold, mean over query heads"),
    ("reuse", "share of a layer's picks that the step before had picked as well"),
    ("hits", "share of the rows that were still on the device"),
    ("rows", "V rows a step fetches for the layer, lately; link: their bytes"),
)
_MORE = (
    ("1 - 6", "go to a panel"),
    ("↑ ↓ a d", "move the heat map's cursor; the mouse reads a cell, a drag zooms"),
    ("z x", "zoom in and out; backspace shows the whole context"),
    ("enter", "open the chosen layer"),
)
_APART = ("memory", "link", "heat", "layers", "speed", "text", "mode_back", "reverse", "previous_turn", "later")


class HelpScreen(ModalScreen[None]):
    """Any key that closes, closes it."""

    BINDINGS: ClassVar[list[BindingType]] = [("escape,q,question_mark", "close", "close")]
    DEFAULT_CSS = """
    HelpScreen { align: center middle; background: $background 60%; }
    HelpScreen > VerticalScroll { width: 96; max-width: 100%; height: auto; max-height: 100%; border: round $accent;
        border-title-color: $accent; background: $surface; padding: 0 1; scrollbar-size-vertical: 1; }
    HelpScreen Static { width: 1fr; height: auto; }
    """

    def compose(self) -> ComposeResult:
        """One table."""
        with VerticalScroll() as box:
            box.border_title = "keys"
            yield Static(self._table())

    def _table(self) -> Table:
        palette = look_of(self.app).palette
        table = Table.grid(padding=(0, 2))
        table.add_column(justify="right", min_width=10, no_wrap=True)
        table.add_column()

        def line(name: str, what: str, tone: str) -> None:
            table.add_row(Text(name, f"bold {tone}"), Text(what, palette.text))

        for key in KEYS:
            if key.id not in _APART:
                line(key.display or self._display(key.id), key.long, palette.accent)
        for shown, what in _MORE:
            line(shown, what, palette.accent)
        table.add_row()
        for name, what in _PANELS:
            line(name, what, palette.warn)
        return table

    def _display(self, name: str) -> str:
        return " ".join(self.app.get_key_display(binding) for binding in self._bound(name))

    def _bound(self, name: str) -> list[Binding]:
        return [
            active.binding for active in self.app.screen_stack[0].active_bindings.values() if active.binding.id == name
        ][:1]

    def action_close(self) -> None:
        """Close it."""
        self.dismiss(None)

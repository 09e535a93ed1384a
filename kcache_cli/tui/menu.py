"""A menu of the processes that publish, where there are several."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from rich.text import Text
from textual.app import App, ComposeResult
from textual.binding import BindingType
from textual.containers import Vertical
from textual.widgets import Footer, OptionList, Static
from textual.widgets.option_list import Option

from kcache.errors import KCacheError
from kcache.watch.frame import Info
from kcache_cli.text import one_line
from kcache_cli.tui.model.words import clock, size
from kcache_cli.tui.palette import DARK, theme_of

if TYPE_CHECKING:
    from kcache.watch.attach import Place


@dataclass(frozen=True)
class Candidate:
    """A process that could be watched."""

    place: Place
    info: Info


def candidates(places: Sequence[Place]) -> list[Candidate]:
    """Ask processes who they are; those that do not answer are left out."""
    from kcache.watch.attach import attach

    found = []
    for place in places:
        with contextlib.suppress(KCacheError):
            source = attach(place)
            found.append(Candidate(place, source.info))
            source.close()
    return found


class Menu(App["Candidate | None"]):
    """Asks which process to watch; None when the user leaves.

    Parameters
    ----------
    candidates : sequence of Candidate
    now_s : float, optional
        Unix time, to say how long they have run.
    """

    CSS = """
    Menu, Screen { background: $background; align: center middle; }
    Vertical { width: 84; max-width: 96%; height: auto; max-height: 80%; border: round $accent; padding: 1 2;
        border-title-color: $accent; }
    OptionList { background: $background; border: none; height: auto; max-height: 16; padding: 0; }
    Footer { background: $background; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [("q,escape", "leave", "leave")]
    ENABLE_COMMAND_PALETTE = False

    def __init__(self, candidates: Sequence[Candidate], now_s: float | None = None) -> None:
        super().__init__()
        self._candidates = list(candidates)
        self._now_s = time.time() if now_s is None else now_s
        self.register_theme(theme_of(DARK))
        self.theme = "kcache-dark"

    def compose(self) -> ComposeResult:
        """A box with a line for each process."""
        with Vertical() as box:
            box.border_title = "which process?"
            yield Static("Several processes publish. Enter opens one.\n", markup=False)
            yield OptionList(*(Option(self._line(each)) for each in self._candidates))
        yield Footer()

    def _line(self, each: Candidate) -> Text:
        info = each.info
        return Text.assemble(
            (f"{info.pid:>8}  ", DARK.muted),
            (f"{one_line(info.command):<9} ", f"bold {DARK.accent}"),
            (f"{one_line(info.model):<28.28} ", "bold"),
            (f"{size(info.weights_bytes):>10}  ", DARK.text),
            (clock(max(0.0, self._now_s - info.started_s)), DARK.muted),
        )

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """That one."""
        self.exit(self._candidates[event.option_index])

    def action_leave(self) -> None:
        """None of them."""
        self.exit(None)

"""What the dashboard's keys do."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import ClassVar

from textual import on
from textual.app import App, SystemCommand
from textual.reactive import reactive
from textual.screen import Screen
from textual.widgets import Input

from kcache.errors import InputError
from kcache_cli.pictures.of_app import picture_of
from kcache_cli.replace import replace
from kcache_cli.tui.feed import RATES_HZ, Feed
from kcache_cli.tui.keys import KEYS
from kcache_cli.tui.layout import PANELS
from kcache_cli.tui.model.layers import parse_filter
from kcache_cli.tui.model.moment import Moment
from kcache_cli.tui.screens.detail import DetailScreen
from kcache_cli.tui.screens.help import HelpScreen
from kcache_cli.tui.talk import Talk
from kcache_cli.tui.widgets.bars import Line, Timeline
from kcache_cli.tui.widgets.heat import HeatPanel
from kcache_cli.tui.widgets.layers import LayersPanel
from kcache_cli.tui.widgets.words import WordsPanel


class Actions(App[None]):
    """The actions of :class:`~kcache_cli.tui.app.Dashboard`, by their names in :mod:`kcache_cli.tui.keys`."""

    moment: reactive[Moment | None] = reactive(None, always_update=True, repaint=False)
    """What is shown."""
    chosen: reactive[str] = reactive("heat", repaint=False)
    """The panel that was asked for last."""
    maximised: reactive[str | None] = reactive(None, repaint=False)
    """The panel that has everything."""

    feed: Feed
    conversation: Talk | None
    stop_work: Callable[[], bool] | None
    folder: Path
    _PANELS: ClassVar[tuple[str, ...]] = PANELS

    @abstractmethod
    def show_words(self) -> None:
        """Fill the text panel; see the app."""

    @abstractmethod
    def place_panels(self) -> None:
        """Share the terminal anew; see the app."""

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Whether a key does something now: the filter's is a letter like any other while something is written."""
        return not (action == "filter" and isinstance(self.focused, Input))

    # -- panels ----------------------------------------------------------------------------------------------------

    def action_panel(self, name: str) -> None:
        """Go to a panel; a maximised one gives way to it."""
        self.chosen = name
        if self.maximised is not None:
            self.maximised = name
        self.query_one(f"#{name}").focus()

    def action_maximise(self) -> None:
        """Give the chosen panel everything, or take it back."""
        focused = self.focused.id if self.focused is not None else None
        self.maximised = None if self.maximised is not None else focused if focused in self._PANELS else self.chosen

    def action_mode(self, by: int) -> None:
        """The heat map's next mode."""
        self.query_one(HeatPanel).action_mode(by)

    def action_sort(self) -> None:
        """The layer table's next order."""
        self._show_layers()
        self.query_one(LayersPanel).next_sort()

    def action_reverse(self) -> None:
        """The layer table the other way round."""
        self._show_layers()
        panel = self.query_one(LayersPanel)
        panel.backwards = not panel.backwards

    def _show_layers(self) -> None:
        """Go to the layer table, where there is no room to show it all the time."""
        if not self.query_one(LayersPanel).display:
            self.action_panel("layers")

    def action_filter(self) -> None:
        """Ask what layers must meet."""
        self._show_layers()
        self.query_one("#filter", Input).add_class("open").focus()
        self.place_panels()

    @on(Input.Changed, "#filter")
    def _filter(self, event: Input.Changed) -> None:
        try:
            parse_filter(event.value)
        except InputError:
            event.input.add_class("-invalid")
            return
        event.input.remove_class("-invalid")
        self.query_one(LayersPanel).filter = event.value

    @on(Input.Submitted, "#filter")
    def _filtered(self, event: Input.Submitted) -> None:
        try:
            parse_filter(event.value)
        except InputError as error:
            self.notify(str(error), severity="warning", markup=False)
            return
        event.input.remove_class("open")
        self.place_panels()
        self.action_panel("layers")

    @on(HeatPanel.Looked)
    def _looked(self, event: HeatPanel.Looked) -> None:
        self.query_one(LayersPanel).at_layer = event.layer
        self.show_words()

    @on(LayersPanel.Chosen)
    def _chose(self, event: LayersPanel.Chosen) -> None:
        self.query_one(HeatPanel).at_layer = event.layer

    @on(HeatPanel.Opened)
    @on(LayersPanel.Opened)
    def _opened(self, event: HeatPanel.Opened | LayersPanel.Opened) -> None:
        if self.moment is not None and self.moment.frame is not None:
            screen = DetailScreen(event.layer)
            screen.moment = self.moment
            self.push_screen(screen)

    # -- time ------------------------------------------------------------------------------------------------------

    def action_pause(self) -> None:
        """Stop here, or go on."""
        paused = self.moment is not None and self.moment.place.paused
        self.feed.order(lambda head: head.pause(not paused))

    def action_faster(self, by: int) -> None:
        """Another speed of a replay, another rate of a live view."""
        if self.moment is not None and self.moment.place.replay:
            self.feed.order(lambda head: head.faster(by))
            return
        at = RATES_HZ.index(self.feed.rate_hz) + by
        self.feed.set_rate(RATES_HZ[min(max(at, 0), len(RATES_HZ) - 1)])
        for line in self.query(Line):
            line.rate_hz = self.feed.rate_hz

    def action_zoom(self, factor: float) -> None:
        """Look at less of the context, or at more."""
        self.query_one(HeatPanel).action_zoom(factor)

    def action_zoom_all(self) -> None:
        """Look at the whole context, or take the cursor away."""
        self.query_one(HeatPanel).action_zoom_all()

    def action_step(self, by: int) -> None:
        """A frame back or on; in a running live view the heat map's cursor instead."""
        place = None if self.moment is None else self.moment.place
        if place is not None and (place.paused or place.replay or not place.live):
            self.feed.order(lambda head: head.step(by))
        else:
            self.query_one(HeatPanel).action_column(by)

    def action_seek(self, share: int) -> None:
        """The first frame, or the last."""
        if self.moment is not None and self.moment.place.span:
            span = self.moment.place.span
            self._seek(span[-1] if share else span[0])

    def action_turn(self, by: int) -> None:
        """The next turn, or the one before."""
        if self.moment is None:
            return
        place = self.moment.place
        found = [at for at in place.turns if (at > place.index if by > 0 else at < place.index)]
        if found:
            self._seek(found[0] if by > 0 else found[-1])

    @on(Timeline.Sought)
    def _sought(self, event: Timeline.Sought) -> None:
        self._seek(event.index)

    def _seek(self, index: int) -> None:
        self.feed.order(lambda head: head.seek(index))

    def action_probe(self) -> None:
        """Have exact layers say what they would pick, or no longer."""
        if self.moment is not None and not self.moment.place.live:
            self.notify("what layers would pick can be asked of a live run alone", timeout=3)
            return
        self.feed.always_probe = not self.feed.always_probe
        word = "say what they would pick" if self.feed.always_probe else "only attend"
        self.notify(f"layers that attend exactly now {word}", timeout=3)

    # -- the rest --------------------------------------------------------------------------------------------------

    def action_help(self) -> None:
        """Show the keys."""
        if isinstance(self.screen, HelpScreen):
            self.pop_screen()
        else:
            self.push_screen(HelpScreen())

    def action_export(self) -> None:
        """Write a picture of the screen."""
        number = 1
        while (path := self.folder / f"kcache-{number}.svg").exists():
            number += 1
        try:
            replace(path, picture_of(self, "kcache").encode("utf-8", "replace"))
        except OSError as error:
            self.notify(f"{path}: {error.strerror or error}", severity="error", markup=False)
            return
        self.notify(f"written: {path.name}", markup=False)

    def action_escape(self) -> None:
        """Close what is open, step by step."""
        field = self.query_one("#filter", Input)
        heat = self.query_one(HeatPanel)
        if len(self.screen_stack) > 1:
            self.pop_screen()
        elif field.has_class("open"):
            field.remove_class("open")
            field.value = ""
            self.query_one(LayersPanel).filter = ""
            self.place_panels()
            self.action_panel("layers")
        elif isinstance(self.focused, Input):
            heat.focus()
        elif self.maximised is not None:
            self.maximised = None
        else:
            heat.action_zoom_all()

    def action_talk(self) -> None:
        """Write to the model."""
        if self.conversation is not None:
            self.query_one("#say", Input).focus()

    def action_stop(self) -> None:
        """Stop the reply, or the job."""
        stop = self.stop_work if self.conversation is None else self.conversation.stop
        if stop is None or not stop():
            leaves = "ctrl-d" if isinstance(self.focused, Input) else "q"  # which is a letter like any other there
            self.notify(f"there is nothing to stop; {leaves} leaves the dashboard", timeout=3)
        elif self.conversation is None:
            self.notify("stopping at the next token, or after this piece of the prompt…", timeout=10)

    @on(Input.Submitted, "#say")
    def _said(self, event: Input.Submitted) -> None:
        if self.conversation is not None and event.value.strip():
            self.conversation.say(event.value)
            event.input.value = ""
            self.query_one(WordsPanel).top = None

    def action_page(self, by: int) -> None:
        """Read back in the conversation, or on."""
        self.query_one(WordsPanel).action_page(by)

    def get_system_commands(self, screen: Screen) -> Iterable[SystemCommand]:
        """The command palette: what Textual offers, and every key."""
        for command in super().get_system_commands(screen):
            if command.title not in ("Maximize", "Minimize", "Keys", "Screenshot"):
                yield command
        for key in KEYS:
            yield SystemCommand(key.short.capitalize(), key.long, lambda action=key.action: self._run_later(action))

    def _run_later(self, action: str) -> None:
        self.call_later(self.run_action, action)

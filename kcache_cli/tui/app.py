"""The dashboard.

A reader thread (:mod:`kcache_cli.tui.feed`) hands over moments; each arrives as a message, becomes the reactive
``moment``, and its watcher gives it to the panels. Nothing here waits for the engine, and the engine for nothing here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import ClassVar

from rich.text import Text
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.message import Message
from textual.theme import Theme
from textual.widgets import Footer, Input

from kcache.watch.source import Source
from kcache_cli.tui.actions import Actions
from kcache_cli.tui.clock import Clock, SystemClock
from kcache_cli.tui.conversation import Said
from kcache_cli.tui.feed import Feed
from kcache_cli.tui.keys import bindings
from kcache_cli.tui.layout import PANELS, arrange
from kcache_cli.tui.look import Look
from kcache_cli.tui.model.moment import Moment
from kcache_cli.tui.model.passage import beginning, pieces_of, weights
from kcache_cli.tui.palette import ASCII, DARK, LIGHT, UNICODE, theme_of
from kcache_cli.tui.shelf import Shelf
from kcache_cli.tui.talk import Talk
from kcache_cli.tui.widgets.bars import Headline, Line, Notice, Timeline
from kcache_cli.tui.widgets.heat import HeatPanel
from kcache_cli.tui.widgets.layers import LayersPanel
from kcache_cli.tui.widgets.link import LinkPanel
from kcache_cli.tui.widgets.memory import MemoryPanel
from kcache_cli.tui.widgets.paint import flat, words
from kcache_cli.tui.widgets.panel import Panel
from kcache_cli.tui.widgets.say import Say
from kcache_cli.tui.widgets.speed import SpeedPanel
from kcache_cli.tui.widgets.words import WordsPanel

_USUAL_LAYERS = 30
"""What there is room for until it is known."""


class Dashboard(Actions):
    """Watch a source.

    Parameters
    ----------
    source : Source
        Live or recorded; the caller closes it.
    clock : Clock, optional
        What time it goes by.
    talk : Talk, optional
        A conversation of this process, for the input at the bottom.
    typed : callable, optional
        Returns what was typed before there was a dashboard: for a conversation lines to send and the beginning of one,
        else nothing that was meant for it.
    stop : callable, optional
        What Ctrl-C does to the work that is watched; returns whether there was any to stop.
    ascii : bool
        Draw with ASCII alone.
    theme : str, optional
        Name of a theme; ``kcache-dark`` unless given.
    keymap : mapping of str to str, optional
        Other keys, by the ids of :mod:`kcache_cli.tui.keys`.
    """

    CSS_PATH = "dashboard.tcss"
    TITLE = "kcache"
    BINDINGS: ClassVar[list[BindingType]] = [
        *bindings(),
        Binding("z", "zoom(0.5)", "zoom in", show=False, id="heat.zoom_in"),
        Binding("Z,x", "zoom(2)", "zoom out", show=False, id="heat.zoom_out"),
        Binding("backspace", "zoom_all", "whole context", show=False, id="heat.zoom_all"),
    ]
    ENABLE_COMMAND_PALETTE = True

    class Arrived(Message):
        """The reader has a newer moment."""

    class Ended(Message):
        """The work that is watched is over."""

        def __init__(self, failed: BaseException | None) -> None:
            super().__init__()
            self.failed = failed

    def __init__(
        self,
        source: Source,
        *,
        clock: Clock | None = None,
        talk: Talk | None = None,
        typed: Callable[[], str] | None = None,
        stop: Callable[[], bool] | None = None,
        ascii: bool = False,
        theme: str | None = None,
        keymap: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.shelf = Shelf(source)
        self.feed = Feed(self.shelf, clock or SystemClock(), self._tell_of_arrival)
        self.conversation, self.stop_work = talk, stop
        self._typed = typed
        self._lines: list[str] = []
        self._draft = ""
        self.folder = Path.cwd()
        self.look = Look(DARK, ASCII if ascii else UNICODE, colour=not self.no_color)
        for palette in (DARK, LIGHT):
            self.register_theme(theme_of(palette))
        self.theme = theme or "kcache-dark"
        if keymap:
            self.set_keymap(dict(keymap))

    def on_load(self) -> None:
        """Take what was typed, before the terminal's keys are keys of the dashboard."""
        if self._typed is not None:
            *self._lines, self._draft = self._typed().split("\n")

    def compose(self) -> ComposeResult:
        """The panels, in three rows."""
        yield Headline(id="headline")
        with Horizontal(id="top"):
            yield MemoryPanel(id="memory")
            yield LinkPanel(id="link")
        yield HeatPanel(id="heat")
        with Horizontal(id="low"):
            yield LayersPanel(id="layers")
            yield SpeedPanel(id="speed")
            yield WordsPanel(id="words")
        yield Notice(id="notice")
        yield Timeline(id="timeline")
        hint = "write to the model; /help lists commands"
        earlier = () if self.conversation is None else self.conversation.earlier
        say = Say(self._draft, earlier, placeholder=hint)
        say.border_subtitle = "esc: panels   ctrl-c: stop the reply   ctrl-d: leave"
        yield say
        yield Footer(show_command_palette=True)
        yield Input(placeholder="tiered   topn   attn<0.9   host>1m   layer>=20", id="filter")

    def on_mount(self) -> None:
        """Begin to read."""
        self.theme_changed_signal.subscribe(self, self._repaint)
        self._repaint(self.current_theme)
        self.set_class(self.look.ascii, "ascii")
        self.set_class(self.conversation is not None, "talking")
        self.screen.set_focus(self.query_one("#say" if self.conversation is not None else "#heat"))
        self.call_after_refresh(self.place_panels)
        if self.conversation is not None:
            self.conversation.begin(self)
            for line in filter(str.strip, self._lines):
                self.conversation.say(line)
        self.feed.start()

    def on_unmount(self) -> None:
        """Let the reader go."""
        self.feed.stop()
        if self.conversation is not None:
            self.conversation.close()

    # Messages come until the very end, when panels are gone and the app no longer runs.

    @on(Said)
    def _heard(self) -> None:
        if self.conversation is not None and self.is_running:
            self.query_one(WordsPanel).said = self.conversation.text(self.look)

    def _tell_of_arrival(self) -> None:
        """Said by the reader's thread."""
        self.post_message(self.Arrived())

    def work_ended(self, failed: BaseException | None) -> None:
        """Say that the work is over; from any thread, and also when the screen is gone."""
        self.post_message(self.Ended(failed))

    @on(Ended)
    def _ended(self, event: Ended) -> None:
        if not self.is_running:
            return
        self.clear_notifications()  # of what is being waited for
        stopped = isinstance(event.failed, KeyboardInterrupt)
        self.query_one(Headline).over = "done" if event.failed is None else "stopped" if stopped else "failed"

    # -- the way of the data ---------------------------------------------------------------------------------------

    def on_dashboard_arrived(self) -> None:
        """Take the newest moment."""
        moment = self.feed.take()
        if moment is not None and self.is_running:
            self.moment = moment

    def watch_moment(self, before: Moment | None, moment: Moment | None) -> None:
        """Give it to everything that shows it."""
        if moment is None:
            return
        self._note_state(before, moment)
        for panel in self.query(Panel):
            panel.moment = moment
        for line in self.query(Line):
            line.moment = moment
        self.show_words()
        for screen in self.screen_stack[1:]:
            if hasattr(screen, "moment"):
                screen.moment = moment

    def _note_state(self, before: Moment | None, moment: Moment) -> None:
        """Make room for the timeline and the notice when they have something to say."""
        place = moment.place
        self.set_class(place.replay or place.paused, "stepping")
        self.set_class(place.closed is not None, "closed")
        layers = 0 if moment.frame is None else len(moment.frame.layers)
        known = 0 if before is None or before.frame is None else len(before.frame.layers)
        if (
            before is None
            or layers != known
            or (before.place.paused, before.place.closed) != (place.paused, place.closed)
        ):
            self.place_panels()

    # -- layout and look -------------------------------------------------------------------------------------------

    def on_resize(self) -> None:
        """Share the terminal anew."""
        self.call_after_refresh(self.place_panels)

    def place_panels(self) -> None:
        """Give each row its height, and show what has one."""
        if not self.is_running or not self.screen_stack or not self.screen_stack[0].query("#heat"):
            return
        screen = self.screen_stack[0]
        width, height = self.size
        height -= 2 + self.has_class("stepping") + self.has_class("closed") + 3 * self.has_class("talking")
        height -= 3 * screen.query_one("#filter").has_class("open")
        known = 0 if self.moment is None or self.moment.frame is None else len(self.moment.frame.layers)
        layers = known or _USUAL_LAYERS
        plan = arrange(
            width,
            height,
            -(-layers // 2) if self.look.halves else layers,
            chosen=self.chosen,
            maximised=self.maximised,
            talking=self.has_class("talking"),
            writing=self._writes,
        )
        self.set_class(width < 100 or height < 30, "small")
        for name, share in (("#top", plan.top), ("#heat", plan.middle), ("#low", plan.low)):
            row = screen.query_one(name)
            row.display = share > 0
            row.styles.height = max(1, share)
        for name in PANELS:
            screen.query_one(f"#{name}").display = name in plan.shown
        self.call_after_refresh(self.show_words)  # as much text as the panel has room for now

    def watch_chosen(self) -> None:
        """Small terminals show it in the middle."""
        self.place_panels()

    def watch_maximised(self) -> None:
        """It has everything, or what it had before."""
        self.place_panels()

    def _repaint(self, theme: Theme) -> None:
        """Take the palette that goes with a theme."""
        self.look = replace(self.look, palette=DARK if theme.dark else LIGHT)
        for panel in self.query(Panel):
            panel.redraw()
        for line in self.query(Line):
            line.refresh()

    # -- text ------------------------------------------------------------------------------------------------------

    def show_words(self) -> None:
        """Give the text panel the passage under the cursor, or the end of the text."""
        moment = self.moment
        if moment is None or moment.frame is None or not self.is_running:
            return
        frame, panel, heat = moment.frame, self.query_one(WordsPanel), self.query_one(HeatPanel)
        room = max(64, panel.size.width * panel.size.height // 2)
        positions = None if self._writes else heat.positions()
        panel.passage = positions is not None
        if positions is None:
            start, end, layer = max(0, frame.tokens - room), frame.tokens, None
        else:
            layer = heat.at_layer
            start = beginning(frame, layer, positions, room // 3)  # tokens have some six signs with their space
            end = min(frame.tokens, start + room)
        title = "6 text" if positions is None else f"6 text from token {start:,}"
        if title != panel.border_title:  # setting it draws the panel once more
            panel.border_title = title
        texts = self.shelf.pieces(start, end, 0, moment.place.index)
        panel.names = self.shelf.names(moment.place.index)
        panel.pieces = tuple(
            pieces_of(frame, texts, start, None if positions is None else weights(frame, layer, start, end))
        )

    @property
    def _writes(self) -> bool:
        """Whether the user is writing to the model: what is said then goes before what is under the cursor."""
        return self.focused is not None and self.focused.id == "say"

    def on_descendant_focus(self) -> None:
        """Show the conversation, or what is under the cursor again."""
        if self.conversation is not None:
            self.place_panels()
            self.show_words()

    def quote(self, layer: int, positions: range, width: int) -> Text:
        """The words at positions, picked ones lit, the one that was picked most in the first third."""
        moment = self.moment
        if moment is None or moment.frame is None:
            return Text()
        frame = moment.frame
        start, end = positions.start, min(positions.stop, frame.tokens)
        texts = self.shelf.pieces(start, end, 0, moment.place.index)
        found = weights(frame, layer, start, end)
        pieces = flat(pieces_of(frame, texts, start, found))
        pieces = [piece for piece in pieces if not piece.special or piece.weight > 0]
        best = max(range(len(pieces)), key=lambda at: pieces[at].weight, default=0)
        while sum(len(piece.text) for piece in pieces[:best]) > width // 3:
            pieces.pop(0)
            best -= 1
        first, last = self.look.signs.quote
        muted = self.look.palette.muted
        return Text.assemble((first, muted), words(pieces, self.look, roles=False), (last, muted))

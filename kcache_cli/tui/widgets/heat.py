"""The heat map's keys and mouse: a cursor that reads cells, and zoom."""

from __future__ import annotations

from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message

from kcache_cli.tui.model.heat import Mode, Window
from kcache_cli.tui.widgets.heat_map import LABELS, MODES, HeatMap


class HeatPanel(HeatMap):
    """The map with its cursor."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "row(-1)", "layer up", show=False, id="heat.up"),
        Binding("down", "row(1)", "layer down", show=False, id="heat.down"),
        Binding("shift+left,a", "column(-1)", "cursor left", show=False, id="heat.left"),
        Binding("shift+right,d", "column(1)", "cursor right", show=False, id="heat.right"),
        Binding("enter", "open", "layer", show=False, id="heat.open"),
    ]

    class Opened(Message):
        """The user wants to see a layer's detail."""

        def __init__(self, layer: int) -> None:
            super().__init__()
            self.layer = layer

    @property
    def _tokens(self) -> int:
        return 0 if self.moment is None or self.moment.frame is None else self.moment.frame.tokens

    def action_row(self, by: int) -> None:
        """Move the cursor to another layer, or head; where there is none, put one."""
        count = len(self._grid.rows) if self._grid is not None else 0
        layers = 0 if self.moment is None or self.moment.frame is None else len(self.moment.frame.layers)
        if self.cursor is None:
            self.action_column(0)
            return
        if self.mode is Mode.HEADS and 0 <= self.head + by < count:
            self.head += by
            self._tell()
        elif 0 <= self.at_layer + by < layers:  # past the last head comes the next layer
            self.head = 0 if by > 0 else max(0, count - 1)
            self.at_layer += by

    def action_column(self, by: int) -> None:
        """Move the cursor along the context, by columns of the map."""
        if self._grid is None or not self._grid.values.shape[1]:
            return
        if self.cursor is None:
            self.go_where_picks_are()
        last = self._grid.values.shape[1] - 1
        at = last if self.cursor is None else self._column_of(self.cursor) + by
        if (at < 0 or at > last) and self.window.end is not None:
            self.window = self.window.moved(self._tokens, by * max(1, (self._grid.end - self._grid.start) // 8))
            self.cursor = self._grid.positions(min(max(at, 0), last)).start
            return
        self.cursor = self._grid.positions(min(max(at, 0), last)).start

    def action_mode(self, by: int = 1) -> None:
        """Go on to the next mode."""
        self.mode = MODES[(MODES.index(self.mode) + by) % len(MODES)]

    def action_zoom(self, factor: float) -> None:
        """Zoom about the cursor, or the end of the context."""
        if self._grid is None:
            return
        centre = self.cursor if self.cursor is not None else self._grid.end - 1
        self.window = self.window.zoomed(self._tokens, centre, factor, 16)

    def action_zoom_all(self) -> None:
        """Show the whole context, or, when it is shown, take the cursor away."""
        if self.window.end is None:
            self.cursor = None
        self.window = Window()

    def action_open(self) -> None:
        """Open the layer under the cursor."""
        self.post_message(self.Opened(self.at_layer))

    def _hit(self, x: int, y: int) -> tuple[int, int] | None:
        """Row and position of a place in the panel."""
        if self._grid is None or self._slots is None or not 1 <= y <= self._slots.lines:
            return None
        column = x - LABELS
        if not 0 <= column < self._grid.values.shape[1]:
            return None
        return self._slots.row(y - 1), self._grid.positions(column).start

    def on_mouse_down(self, event: events.MouseDown) -> None:
        """Put the cursor there, choose a mode, or begin to mark a range."""
        at = event.get_content_offset(self)
        if at is None:
            return
        for start, stop, mode in self._tabs:
            if at.y == 0 and start <= at.x < stop:
                self.mode = mode
                return
        hit = self._hit(at.x, at.y)
        if hit is not None:
            self._set(hit)
            self._drag = hit[1]
            self.capture_mouse()

    def on_mouse_move(self, event: events.MouseMove) -> None:
        """Read the cell under the mouse."""
        at = event.get_content_offset(self)
        hit = None if at is None else self._hit(at.x, at.y)
        if hit is not None:
            self._set(hit)

    def on_mouse_up(self, event: events.MouseUp) -> None:
        """A range that was marked is zoomed into."""
        start, self._drag = self._drag, None
        self.release_mouse()
        if start is None or self.cursor is None or self._grid is None:
            return
        first, last = sorted((start, self.cursor))
        if self._column_of(last) - self._column_of(first) >= 2:
            self.window = Window(first, max(self._grid.positions(self._column_of(last)).stop, first + 16))

    def on_click(self, event: events.Click) -> None:
        """Twice opens the layer."""
        if event.chain == 2:
            self.action_open()

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Zoom in."""
        self.action_zoom(0.5)
        event.stop()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Zoom out."""
        self.action_zoom(2)
        event.stop()

    def _set(self, hit: tuple[int, int]) -> None:
        row, position = hit
        if self.mode is Mode.HEADS:
            self.head = row
            self._tell()
        else:
            self.at_layer = row
        self.cursor = position

"""The heat map: where in the context each layer looks, a cursor that reads it, and zoom."""

from __future__ import annotations

from typing import Any, ClassVar

from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.reactive import reactive

from kcache_cli.tui.model.heat import Cell, Grid, Mode, Window, cell, grid
from kcache_cli.tui.model.moment import Moment
from kcache_cli.tui.model.scale import Slots, slots, ticks
from kcache_cli.tui.model.words import percent
from kcache_cli.tui.widgets.cells import cell_line
from kcache_cli.tui.widgets.paint import legend
from kcache_cli.tui.widgets.panel import Panel, columns, cut

_LABELS = 4
_MASS = 5
_WIDE = 96
_MODES = tuple(Mode)


class HeatPanel(Panel):
    """Layers from top to bottom, the context from left to right."""

    NUMBER = 3
    TITLE = "where attention looks"

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "row(-1)", "layer up", show=False, id="heat.up"),
        Binding("down", "row(1)", "layer down", show=False, id="heat.down"),
        Binding("shift+left,a", "column(-1)", "cursor left", show=False, id="heat.left"),
        Binding("shift+right,d", "column(1)", "cursor right", show=False, id="heat.right"),
        Binding("z", "zoom(0.5)", "zoom in", show=False, id="heat.zoom_in"),
        Binding("Z,x", "zoom(2)", "zoom out", show=False, id="heat.zoom_out"),
        Binding("backspace", "zoom_all", "whole context", show=False, id="heat.zoom_all"),
        Binding("enter", "open", "layer", show=False, id="heat.open"),
    ]

    mode: reactive[Mode] = reactive(Mode.LAST)
    """What colours mean."""
    at_layer: reactive[int] = reactive(0)
    """Of the cursor, and the one whose heads are shown."""
    cursor: reactive[int | None] = reactive(None)
    """Position of the cursor in the context; None while there is none."""
    window: reactive[Window] = reactive(Window())
    """What is shown of the context."""

    class Looked(Message):
        """The cursor is somewhere else."""

        def __init__(self, layer: int, positions: range | None) -> None:
            super().__init__()
            self.layer, self.positions = layer, positions

    class Opened(Message):
        """The user wants to see a layer's detail."""

        def __init__(self, layer: int) -> None:
            super().__init__()
            self.layer = layer

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self.head = 0
        self._grid: Grid | None = None
        self._slots: Slots | None = None
        self._tabs: list[tuple[int, int, Mode]] = []
        self._drag: int | None = None

    # -- drawing ---------------------------------------------------------------------------------------------------

    def draw(self, moment: Moment, width: int, height: int) -> list[Text]:
        """See :class:`~kcache_cli.tui.widgets.panel.Panel`."""
        assert moment.frame is not None
        info = self._info_lines(height)
        mass = _MASS if width >= _WIDE and self.mode is not Mode.HEADS else 0
        across = max(1, width - _LABELS - mass)
        self._grid = grid(moment, self.mode, across, self.window, self.at_layer)
        per_line = 2 if self.look.halves else 1
        self._slots = slots(self._grid, max(1, height - 2 - info), per_line)
        lines = [self._head(width)]
        body = [self._line(moment, line, mass) for line in range(self._slots.lines)]
        if not self._slots.lines or (self._grid.note and not self._grid.values.any()):
            body = self._noted(self._grid.note or "no layers yet", across, max(1, height - 2 - info))
        lines += body
        lines.append(self._axis(moment, across))
        lines += [Text()] * (height - info - len(lines))
        return [*lines, *self._info(moment, width, info)][:height]

    @staticmethod
    def _info_lines(height: int) -> int:
        return 2 if height >= 18 else 1 if height >= 6 else 0

    def _noted(self, note: str, width: int, height: int) -> list[Text]:
        lines = [Text(" " * _LABELS) for _ in range(height)]
        lines[height // 2].append(note.center(width), self.look.palette.muted)
        return lines

    def _head(self, width: int) -> Text:
        """The modes, which can be clicked, and the scale."""
        palette, look = self.look.palette, self.look
        left, self._tabs = Text(), []
        for mode in _MODES:
            start = left.cell_len
            name = f"layer {self.at_layer} by head" if mode is Mode.HEADS and mode is self.mode else mode.value
            left.append(f" {name} ", f"bold reverse {palette.accent}" if mode is self.mode else palette.muted)
            self._tabs.append((start, left.cell_len, mode))
        window = self.window
        if window.end is not None:
            left.append(f"  {window.start:,}–{window.end:,}", palette.warn)
        elif self._grid is not None and self._grid.note and width >= _WIDE:
            left.append(f"  {self._grid.note}", palette.warn)
        if self.mode is Mode.AGE:
            scale = legend(look, 12, "long ago", "just picked")
        else:
            scale = legend(look, 12, "0", "100 % of tokens" if width >= _WIDE else "100 %")
        return columns(left, scale, width)

    def _line(self, moment: Moment, line: int, mass: int) -> Text:
        """A line of cells: one row of the map, or two, one above the other."""
        assert self._slots is not None and self._grid is not None
        palette, place = self.look.palette, self._slots
        row, at, here = place.row(line), line * place.per_line, self._is_cursor_line(line)
        label = self._grid.rows[row] if row < len(self._grid.rows) else 0
        lower = place.values[at + 1] if place.per_line == 2 and at + 1 < len(place.values) else None
        column = self._column_of(self.cursor) if here and self.cursor is not None else None
        cells = cell_line(place.values[at], lower, self.look, column, place.slot(self._cursor_row()) == at)
        text = Text.assemble((self._label(line, label), f"bold {palette.accent}" if here else palette.muted), cells)
        if mass:
            text.append_text(self._mass_of(moment, line, mass))
        return text

    def _cursor_row(self) -> int:
        return self.head if self.mode is Mode.HEADS else self.at_layer

    def _is_cursor_line(self, line: int) -> bool:
        assert self._slots is not None
        if self.cursor is None and not self.has_focus:
            return False
        return self._slots.slot(self._cursor_row()) // self._slots.per_line == line

    def _label(self, line: int, row: int) -> str:
        """The row's number on its first line; the cursor's where it is."""
        assert self._slots is not None
        if self._is_cursor_line(line):
            return f"{self._cursor_row():>3} "
        is_first = line == 0 or self._slots.row(line) != self._slots.row(line - 1)
        return f"{row:>3} " if is_first else " " * _LABELS

    def _mass_of(self, moment: Moment, line: int, width: int) -> Text:
        """The share of attention that a line's layers have captured, mean over them."""
        assert self._slots is not None and moment.frame is not None
        place = self._slots
        first, last = line * place.per_line, min((line + 1) * place.per_line, len(place.stop)) - 1
        layers = moment.frame.layers[int(place.first[first]) : int(place.stop[last])]
        shares = [float(layer.mass.mean()) for layer in layers if layer.mass is not None]
        palette = self.look.palette
        if not shares:
            return Text(" " * width)
        share = sum(shares) / len(shares)
        tone = palette.good if share >= 0.9 else palette.text if share >= 0.75 else palette.warn
        return Text(f"{share:.0%}".rjust(width), tone)

    def _axis(self, moment: Moment, across: int) -> Text:
        """Positions and turn marks under the cells."""
        assert self._grid is not None and moment.frame is not None
        palette = self.look.palette
        text = Text(" " * _LABELS)
        for tick in ticks(self._grid, across, moment.frame.marks, self.look.signs.up):
            text.append(" " * (tick.column + _LABELS - text.cell_len))
            tone = {"prompt": palette.prompt, "answer": palette.good}.get(tick.kind, palette.muted)
            text.append(tick.text, tone)
        mass = "mass" if self.size.width >= _WIDE and self.mode is not Mode.HEADS else ""
        if mass:
            text.append(" " * max(0, across + _LABELS + 1 - text.cell_len))
            text.append(mass, palette.muted)
        return text

    def _info(self, moment: Moment, width: int, count: int) -> list[Text]:
        """What is under the cursor: numbers, then the words themselves."""
        found = self._cell(moment)
        palette = self.look.palette
        if not count:
            return []
        if found is None or self._grid is None:
            return [
                cut(
                    Text("arrows or the mouse read a cell · v other modes · z zoom · enter a layer", palette.muted),
                    width,
                )
            ]
        numbers = Text.assemble(("layer ", palette.muted), (f"{found.layer.index}", "bold"))
        if found.head is not None:
            numbers.append(f" head {found.head}", "bold")
        numbers.append(f" {found.layer.kind} {self.look.signs.dot} ", palette.muted)
        start, stop = found.positions.start, found.positions.stop - 1
        picks = bool(found.layer.histogram.any())
        numbers.append("tokens " if start < stop else "token ", palette.muted)
        numbers.append(f"{start:,}–{stop:,}" if start < stop else f"{start:,}", "bold")
        numbers.append(f" {self.look.signs.dot} ", palette.muted)
        if not picks:
            numbers.append("attends exactly, picks nothing", palette.muted)
        else:
            numbers.append(f"{'' if found.is_exact else '~'}{found.count:,}", "bold")
            numbers.append(f" picks, {percent(found.share)} of the layer's", palette.muted)
        if found.mass is not None:
            numbers.append(f" {self.look.signs.dot} which hold ", palette.muted)
            numbers.append(percent(found.mass), "bold")
            numbers.append(" of its attention", palette.muted)
        text = self._words(found, width)
        if count == 1:
            quoted = Text.assemble(numbers, "  ", text) if numbers.cell_len < width - 20 else numbers
            return [cut(quoted, width)]
        return [cut(numbers, width), cut(text, width)]

    def _words(self, found: Cell, width: int) -> Text:
        quote: Any = getattr(self.app, "quote", None)
        return Text() if quote is None else quote(found.layer.index, found.positions, width)

    # -- the cursor ------------------------------------------------------------------------------------------------

    def _cell(self, moment: Moment) -> Cell | None:
        positions = self.positions()
        if positions is None or moment.frame is None:
            return None
        return cell(moment, self.at_layer, positions, self.head if self.mode is Mode.HEADS else None)

    def _column_of(self, position: int) -> int:
        assert self._grid is not None
        return self._grid.column(min(max(position, self._grid.start), self._grid.end - 1))

    def watch_mode(self) -> None:
        """Draw in the other mode; one that shows a layer's heads takes a layer that picks."""
        picked = None if self.moment is None else self.moment.past.picked
        if self.mode is Mode.HEADS and picked is not None:
            picking = [layer.index for layer in picked.layers if layer.picks is not None]
            if picking and self.at_layer not in picking:
                self.at_layer = min(picking, key=lambda layer: abs(layer - self.at_layer))
        self.redraw()

    def watch_at_layer(self) -> None:
        """Tell, and draw."""
        self._tell()

    def watch_cursor(self) -> None:
        """Tell, and draw."""
        self._tell()

    def watch_window(self) -> None:
        """Draw the other part."""
        self.redraw()

    def _tell(self) -> None:
        self.redraw()
        if self.is_mounted and self._grid is not None:
            self.post_message(self.Looked(self.at_layer, self.positions()))

    @property
    def _tokens(self) -> int:
        return 0 if self.moment is None or self.moment.frame is None else self.moment.frame.tokens

    def positions(self) -> range | None:
        """The positions of the cell under the cursor."""
        if self.cursor is None or self._grid is None:
            return None
        return self._grid.positions(self._column_of(self.cursor))

    def action_row(self, by: int) -> None:
        """Move the cursor to another layer, or head."""
        count = len(self._grid.rows) if self._grid is not None else 0
        layers = 0 if self.moment is None or self.moment.frame is None else len(self.moment.frame.layers)
        if self.cursor is None:
            self.action_column(0)
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
        last = self._grid.values.shape[1] - 1
        at = last if self.cursor is None else self._column_of(self.cursor) + by
        if (at < 0 or at > last) and self.window.end is not None:
            self.window = self.window.moved(self._tokens, by * max(1, (self._grid.end - self._grid.start) // 8))
            self.cursor = self._grid.positions(min(max(at, 0), last)).start
            return
        self.cursor = self._grid.positions(min(max(at, 0), last)).start

    def action_mode(self, by: int = 1) -> None:
        """Go on to the next mode."""
        self.mode = _MODES[(_MODES.index(self.mode) + by) % len(_MODES)]

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
        column = x - _LABELS
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

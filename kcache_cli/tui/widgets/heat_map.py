"""The heat map as it is drawn: cells, axis, scale, and what is under its cursor."""

from __future__ import annotations

from typing import Any

from rich.text import Text
from textual.message import Message
from textual.reactive import reactive

from kcache_cli.tui.look import Look
from kcache_cli.tui.model.cell import Cell, cell
from kcache_cli.tui.model.heat import Grid, Mode, Window, grid
from kcache_cli.tui.model.moment import Moment
from kcache_cli.tui.model.scale import Slots, slots, ticks
from kcache_cli.tui.model.words import percent
from kcache_cli.tui.widgets.cells import cell_line
from kcache_cli.tui.widgets.paint import legend
from kcache_cli.tui.widgets.panel import Panel, columns, cut

LABELS = 4
_MASS = 5
_WIDE = 96
_LITTLE = 0.01
_LITTLE_WORDS = "<1 %"
MODES = tuple(Mode)


class HeatMap(Panel):
    """Layers from top to bottom, the context from left to right."""

    NUMBER = 3
    TITLE = "where attention looks"

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
        across = max(1, width - LABELS - mass)
        self._grid = grid(moment, self.mode, across, self.window, self.at_layer)
        per_line = 2 if self.look.halves else 1
        self._slots = slots(self._grid, max(1, height - 2 - info), per_line)
        lines = [self._head(width)]
        body = [self._line(moment, line, mass) for line in range(self._slots.lines)]
        if not self._slots.lines or (self._grid.note and not self._grid.values.any()):
            body = self._noted(self._grid.note or "the cache is empty", across, max(1, height - 2 - info))
        lines += body
        lines.append(self._axis(moment, across))
        lines += [Text()] * (height - info - len(lines))
        return [*lines, *self._info(moment, width, info)][:height]

    @staticmethod
    def _info_lines(height: int) -> int:
        return 2 if height >= 18 else 1 if height >= 6 else 0

    def _noted(self, note: str, width: int, height: int) -> list[Text]:
        lines = [Text(" " * LABELS) for _ in range(height)]
        lines[height // 2].append(note.center(width), self.look.palette.muted)
        return lines

    def _head(self, width: int) -> Text:
        """The modes, which can be clicked, and the scale."""
        palette, look = self.look.palette, self.look
        left, self._tabs = Text(), []
        for mode in MODES:
            start = left.cell_len
            name = f"layer {self.at_layer} by head" if mode is Mode.HEADS and mode is self.mode else mode.value
            left.append(f" {name} ", f"bold reverse {palette.accent}" if mode is self.mode else palette.muted)
            self._tabs.append((start, left.cell_len, mode))
        window = self.window
        if window.end is not None:
            left.append(f"  {window.start:,}–{window.end:,}", palette.warn)
        elif self._grid is not None and self._grid.note and self._grid.values.any() and width >= _WIDE:
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
        return f"{row:>3} " if is_first else " " * LABELS

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
        text = Text(" " * LABELS)
        for tick in ticks(self._grid, across, moment.frame.marks, self.look.signs.up):
            text.append(" " * (tick.column + LABELS - text.cell_len))
            tone = {"prompt": palette.prompt, "answer": palette.good}.get(tick.kind, palette.muted)
            text.append(tick.text, tone)
        mass = "attn" if self.size.width >= _WIDE and self.mode is not Mode.HEADS else ""
        if mass:
            text.append(" " * max(0, across + LABELS + 1 - text.cell_len))
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
        numbers = numbers_of(found, self.look, width >= _WIDE)
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
        positions = self._positions()
        if positions is None or moment.frame is None:
            return None
        return cell(moment, self.at_layer, positions, self.head if self.mode is Mode.HEADS else None)

    def _column_of(self, position: int) -> int:
        assert self._grid is not None
        return self._grid.column(min(max(position, self._grid.start), self._grid.end - 1))

    def watch_mode(self) -> None:
        """Draw in the other mode; one that shows a layer's heads takes a layer that picks."""
        if self.mode is Mode.HEADS:
            self.go_where_picks_are()
        self.redraw()

    def go_where_picks_are(self) -> None:
        """From a layer that picks nothing to the next one that does."""
        picked = None if self.moment is None else self.moment.past.picked
        picking = [] if picked is None else [layer.index for layer in picked.layers if layer.picks is not None]
        if picking and self.at_layer not in picking:
            self.at_layer = min(picking, key=lambda layer: abs(layer - self.at_layer))

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

    def positions(self) -> range | None:
        """The positions of the cell under the cursor, as the newest moment has it."""
        if self.cursor is not None and self.size:
            self.drawn()
        return self._positions()

    def _positions(self) -> range | None:
        if self.cursor is None or self._grid is None:
            return None
        return self._grid.positions(self._column_of(self.cursor))


def numbers_of(found: Cell, look: Look, wide: bool) -> Text:
    """What there is to say about a cell, in figures."""
    palette, dot = look.palette, f" {look.signs.dot} "
    whose = f" head {found.head}" if found.head is not None else ""
    text = Text.assemble(("layer ", palette.muted), (f"{found.layer.index}{whose}", "bold"))
    if wide:
        text.append(f" {found.layer.kind}", palette.muted)
    start, stop = found.positions.start, found.positions.stop - 1
    text.append(f"{dot}{'tokens' if start < stop else 'token'} ", palette.muted)
    text.append(f"{start:,}–{stop:,}" if start < stop else f"{start:,}", "bold")
    text.append(dot, palette.muted)
    if not found.layer.histogram.any():
        text.append("attends exactly, picks nothing", palette.muted)
        return text
    nearly = "" if found.is_exact else "~"
    text.append(f"{nearly}{found.count:,}", "bold")
    text.append(f" pick{'' if found.count == 1 else 's'}, {percent(found.share)}", palette.muted)
    text.append(f" of the {'layer' if found.head is None else 'head'}'s" if wide else "", palette.muted)
    text.append(f"{dot}{'attention' if wide else 'attn'} ", palette.muted)
    text.append(_share(found), "bold")
    if found.mass is not None:
        text.append(f" of {percent(found.mass)}{' in all' if wide else ''}", palette.muted)
    if found.held is not None and found.held.at_step is not None:
        text.append(f", at step {found.held.at_step:,}", palette.muted)
    return text


def _share(found: Cell) -> str:
    """What its picks hold; a recording says no more of little than that it is."""
    held = found.held
    if held is None:
        return "-"
    if held.share < _LITTLE:
        return _LITTLE_WORDS if found.count else "0"
    return f"{'' if held.is_exact else '~'}{percent(held.share)}"

"""The layer table: a row per layer, sorted and filtered; enter opens one."""

from __future__ import annotations

from typing import ClassVar

from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message
from textual.reactive import reactive

from kcache.errors import InputError
from kcache_cli.tui.model.layers import SORTS, LayerRow, layer_rows, parse_filter, sort_rows
from kcache_cli.tui.model.moment import Moment
from kcache_cli.tui.model.words import bytes_short, count, percent
from kcache_cli.tui.widgets.chart import rule
from kcache_cli.tui.widgets.panel import Panel, cut

Table = tuple[tuple[str, int], ...]
_WIDE: Table = tuple(zip(SORTS, (6, 14, 7, 6, 7, 7, 8, 7), strict=True))
_USUAL: Table = (("layer", 6), ("attn", 6), ("reuse", 7), ("rows", 6), ("link", 6), ("device", 7), ("host", 6))
_NARROW: Table = (("layer", 6), ("attn", 6), ("rows", 6), ("link", 6), ("host", 6))
_STAYS = "exact, V stays here"


def table_for(width: int) -> Table:
    """The columns that there is room for."""
    for table in (_WIDE, _USUAL):
        if sum(each for _, each in table) <= width:
            return table
    return _NARROW


class LayersPanel(Panel):
    """Rows of layers under a head that says what they are sorted by."""

    NUMBER = 4
    TITLE = "layers; rows and link of a step"

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "move(-1)", "up", show=False, id="layers.up"),
        Binding("down", "move(1)", "down", show=False, id="layers.down"),
        Binding("pageup", "move(-10)", "page up", show=False, id="layers.page_up"),
        Binding("pagedown", "move(10)", "page down", show=False, id="layers.page_down"),
        Binding("enter", "open", "layer", show=False, id="layers.open"),
    ]

    sort: reactive[str] = reactive("layer")
    """The column rows are sorted by."""
    backwards: reactive[bool] = reactive(False)
    """Sorted the other way round."""
    filter: reactive[str] = reactive("")
    """What rows must meet; see :func:`~kcache_cli.tui.model.layers.parse_filter`."""
    at_layer: reactive[int] = reactive(0)
    """The chosen layer."""

    class Chosen(Message):
        """Another layer was chosen."""

        def __init__(self, layer: int) -> None:
            super().__init__()
            self.layer = layer

    class Opened(Message):
        """The user wants to see a layer's detail."""

        def __init__(self, layer: int) -> None:
            super().__init__()
            self.layer = layer

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._rows: list[LayerRow] = []
        self._top, self._follows = 0, False

    def draw(self, moment: Moment, width: int, height: int) -> list[Text]:
        """See :class:`~kcache_cli.tui.widgets.panel.Panel`."""
        self._rows = self.rows(moment)
        shown = max(1, height - 1)
        at = next((at for at, row in enumerate(self._rows) if row.layer == self.at_layer), 0)
        if self._follows:
            self._top = min(max(self._top, at - shown + 1), at)
            self._follows = False
        self._top = max(0, min(self._top, len(self._rows) - shown))
        table = table_for(width)
        lines = [self._head(table, width)]
        lines += [self._line(row, table, width) for row in self._rows[self._top : self._top + shown]]
        self.say_below(self._subtitle(moment, shown))
        return lines

    def rows(self, moment: Moment) -> list[LayerRow]:
        """The rows that are shown."""
        try:
            test = parse_filter(self.filter)
        except InputError:
            return []
        return [row for row in sort_rows(layer_rows(moment), self.sort, self.backwards) if test(row)]

    def _subtitle(self, moment: Moment, shown: int) -> str:
        """Which rows are seen of how many, and what they meet."""
        count = 0 if moment.frame is None else len(moment.frame.layers)
        if len(self._rows) == count <= shown:
            return ""
        last = min(len(self._rows), self._top + shown)
        places = f"{self._top + 1 if self._rows else 0}-{last} of {len(self._rows)}"
        return f"{self.filter}  {places}".strip().replace("[", r"\[")

    def _head(self, table: Table, width: int) -> Text:
        palette, signs = self.look.palette, self.look.signs
        text = Text()
        for name, each in table:
            chosen = name == self.sort
            sign = (signs.up if (name == "layer") != self.backwards else signs.down) if chosen else ""
            text.append(f"{name}{sign}".rjust(each), f"bold {palette.accent}" if chosen else palette.muted)
        return cut(text, width)

    def _line(self, row: LayerRow, table: Table, width: int) -> Text:
        text, palette = Text(), self.look.palette
        exact = row.attn is None and row.kind == "resident"
        for name, each in table:
            if exact and name in ("reuse", "hits", "rows", "link"):
                continue
            if exact and name == "attn":
                room = sum(wide for column, wide in table if column in ("attn", "reuse", "hits", "rows", "link"))
                text.append((_STAYS if room > len(_STAYS) + 1 else "exact").rjust(room), palette.muted)
            else:
                text.append_text(self._cell(row, name, each))
        text = cut(text, width)
        if row.layer == self.at_layer and self.has_focus:
            text.append(" " * (width - text.cell_len))
            text.stylize("reverse")
        return text

    def _cell(self, row: LayerRow, name: str, width: int) -> Text:
        palette = self.look.palette
        value = getattr(row, name)
        if name == "layer":
            chosen = row.layer == self.at_layer
            return Text(f"{value:>{width}}", f"bold {palette.accent}" if chosen else palette.text)
        if value is None or (name == "host" and not value):
            return Text("–".rjust(width) if not self.look.ascii else "-".rjust(width), palette.faint)
        if name == "attn":
            tone = palette.good if value >= 0.9 else palette.accent if value >= 0.75 else palette.warn
            if width < 10:
                return Text(percent(value).rjust(width), tone)
            return Text.assemble("  ", rule(value, width - 8, tone, self.look), percent(value).rjust(6))
        if name in ("reuse", "hits"):
            return Text(percent(value).rjust(width), palette.text)
        words = count(value) if name == "rows" else bytes_short(value)
        return Text(words.rjust(width), palette.text)

    def watch_sort(self) -> None:
        """Draw in the other order, from the top."""
        self._top = 0
        self.redraw()

    def watch_backwards(self) -> None:
        """Draw in the other order, from the top."""
        self._top = 0
        self.redraw()

    def watch_filter(self) -> None:
        """Draw what meets it, from the top."""
        self._top = 0
        self.redraw()

    def watch_at_layer(self) -> None:
        """Draw so that it is seen."""
        self._follows = True
        self.redraw()

    def _choose(self, layer: int) -> None:
        """Go to a layer, and tell: only what the user does here is told, or two panels would tell each other."""
        if layer != self.at_layer:
            self.at_layer = layer
            self.post_message(self.Chosen(layer))

    def next_sort(self) -> None:
        """Sort by the next column; after the last by layer again."""
        self.sort = SORTS[(SORTS.index(self.sort) + 1) % len(SORTS)]

    def action_move(self, by: int) -> None:
        """Choose another row."""
        if not self._rows:
            return
        at = next((at for at, row in enumerate(self._rows) if row.layer == self.at_layer), 0)
        self._choose(self._rows[min(max(0, at + by), len(self._rows) - 1)].layer)

    def action_open(self) -> None:
        """Open the chosen layer."""
        self.post_message(self.Opened(self.at_layer))

    def on_click(self, event: events.Click) -> None:
        """Sort by a column, choose a row, open it when clicked twice."""
        at = event.get_content_offset(self)
        if at is None:
            return
        if at.y == 0:
            self._sort_at(at.x)
        elif self._top + at.y - 1 < len(self._rows):
            self._choose(self._rows[self._top + at.y - 1].layer)
            if event.chain == 2:
                self.action_open()

    def _sort_at(self, x: int) -> None:
        for name, width in table_for(self.size.width):
            if x < width:
                self.backwards = not self.backwards if name == self.sort else False
                self.sort = name
                return
            x -= width

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Up."""
        self.action_move(-1)
        event.stop()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Down."""
        self.action_move(1)
        event.stop()

"""The memory panel: both tiers as stacked bars, and what a full KV cache would take."""

from __future__ import annotations

from rich.text import Text

from kcache_cli.tui.model.memory import Bar, MemoryView, Segment, lengths, memory_view
from kcache_cli.tui.model.moment import Moment
from kcache_cli.tui.model.words import size
from kcache_cli.tui.widgets.panel import Panel, columns, cut

_ASCII_FILL = {
    "weights": "w",
    "k": "K",
    "v": "V",
    "overhead": "t",
    "hot": "h",
    "activations": "a",
    "other": "o",
    "host_v": "V",
}
_MONO_FILL = {
    "weights": "▒",
    "k": "█",
    "v": "▓",
    "overhead": "▚",
    "hot": "▙",
    "activations": "▞",
    "other": "░",
    "host_v": "▓",
}


class MemoryPanel(Panel):
    """Device, host and the ghost, to one scale."""

    NUMBER = 1
    TITLE = "memory, weights and cache"

    def draw(self, moment: Moment, width: int, height: int) -> list[Text]:
        """See :class:`~kcache_cli.tui.widgets.panel.Panel`."""
        view = memory_view(moment)
        if height < 6:
            return self._compact(view, width)[:height]
        lines: list[Text] = []
        for bar in (view.device, view.host):
            lines += [self._head(bar, width), self._bar(bar, view.scale, width)]
        lines += [self._ghost_head(view, width), self._bar(view.ghost, view.scale, width)]
        spare = height - 7
        if spare >= 2:  # room between the tiers
            lines.insert(4, Text(""))
            lines.insert(2, Text(""))
        return [*lines, *self._legend(view, width, height - len(lines))][:height]

    def _compact(self, view: MemoryView, width: int) -> list[Text]:
        """A line for each bar: name, bytes, bar."""
        lines = []
        for bar, name in ((view.device, "device"), (view.host, "host"), (view.ghost, "full KV")):
            label = Text.assemble((f"{name:<8}", self.look.palette.muted), (f"{size(bar.used):>9} ", "bold"))
            lines.append(Text.assemble(label, self._bar(bar, view.scale, max(1, width - label.cell_len))))
        return lines

    def _head(self, bar: Bar, width: int) -> Text:
        palette = self.look.palette
        left = Text.assemble((bar.name, palette.text), "  ", (size(bar.used), "bold"))
        right = Text()
        if bar.free is not None:
            right = Text.assemble((size(bar.free), palette.text), (" free", palette.muted))
            if bar.total is not None and left.cell_len + right.cell_len + 18 < width:
                right.append(f" of {size(bar.total)}", palette.muted)
        return columns(left, right, width)

    def _ghost_head(self, view: MemoryView, width: int) -> Text:
        palette = self.look.palette
        left = Text.assemble(("weights and a full KV cache", palette.text), "  ", (size(view.ghost.used), "bold"))
        if not view.host.used:
            right = Text("nothing offloaded yet", palette.muted)
        elif view.saved > 0:
            right = Text(f"{size(view.saved)} saved", palette.good)
        else:
            right = Text(f"{size(-view.saved)} less than here", palette.muted)
        return columns(left, right, width)

    def _bar(self, bar: Bar, scale: int, width: int) -> Text:
        """A stacked bar to an eighth of a cell; a segment that is long enough has its name on it."""
        palette, look = self.look.palette, self.look
        ends = lengths(bar.segments, scale, width)
        if not look.colour or look.ascii:
            return self._plain_bar(bar, ends, width)
        cells = [(" ", f"on {palette.free}")] * width
        used = 0
        for at, (segment, length) in enumerate(zip(bar.segments, ends, strict=True)):
            colour = getattr(palette, segment.part)
            first, used = -(-used // 8), used + length
            whole, rest = divmod(min(used, width * 8), 8)
            if segment.part == "ghost":
                whole = min(width, whole + (rest > 0))
                cells[first:whole] = [(look.signs.hatch, f"{colour} on {palette.free}")] * (whole - first)
            else:
                cells[first:whole] = [(" ", f"on {colour}")] * (whole - first)
                following = bar.segments[at + 1] if at + 1 < len(bar.segments) else None
                solid = following is not None and following.part != "ghost"
                after = getattr(palette, following.part) if following is not None and solid else palette.free
                if rest and whole < width:
                    cells[whole] = (look.signs.eighths[rest], f"{colour} on {after}")
            self._label(cells, segment, first, whole)
        text = Text()
        for sign, style in cells[:width]:
            text.append(sign, style)
        return text

    def _label(self, cells: list[tuple[str, str]], segment: Segment, first: int, end: int) -> None:
        """Write a segment's name on it."""
        palette = self.look.palette
        name = f" {segment.label} "
        if end - first < len(name) + 1:
            return
        back = palette.free if segment.part == "ghost" else getattr(palette, segment.part)
        tone = palette.text if segment.part == "ghost" else palette.on_bar
        for at, sign in enumerate(name):
            cells[first + at] = sign, f"{tone} on {back}"

    def _plain_bar(self, bar: Bar, ends: list[int], width: int) -> Text:
        fills = _ASCII_FILL if self.look.ascii else _MONO_FILL
        text, at, used = Text(), 0, 0
        for segment, end in zip(bar.segments, ends, strict=True):
            used += end
            cells = max(1, round(used / 8) - at)
            text.append(
                fills.get(segment.part, self.look.signs.hatch) * cells, getattr(self.look.palette, segment.part)
            )
            at += cells
        text.append(self.look.signs.dot * max(0, width - at), self.look.palette.faint)
        return cut(text, width)

    def _legend(self, view: MemoryView, width: int, height: int) -> list[Text]:
        """Names, colours and bytes of the segments, as many lines as there is room for."""
        lines = [Text()]
        for segment in (*view.device.segments[1:], *view.host.segments):
            entry = self._entry(segment)
            if lines[-1].cell_len + entry.cell_len > width:
                if len(lines) >= height:
                    break
                lines.append(Text())
            lines[-1].append_text(entry)
        return lines[:height]

    def _entry(self, segment: Segment) -> Text:
        look, palette = self.look, self.look.palette
        colour = getattr(palette, segment.part)
        sign = look.signs.square
        if look.ascii:
            sign = _ASCII_FILL.get(segment.part, sign)
        elif not look.colour:
            sign = _MONO_FILL.get(segment.part, sign)
        name = "host V" if segment.part == "host_v" else segment.label
        return Text.assemble(
            (f"{sign} ", colour), (f"{name} ", palette.muted), (f"{size(segment.bytes)}  ", palette.text)
        )

"""The memory panel: both tiers as stacked bars, and what a full KV cache would take."""

from __future__ import annotations

from rich.text import Text

from kcache_cli.tui.model.memory import Bar, MemoryView, Segment, lengths, memory_view
from kcache_cli.tui.model.moment import Moment
from kcache_cli.tui.model.words import size
from kcache_cli.tui.widgets.panel import Panel, columns, cut

_ASCII_FILL = {"weights": "w", "k": "K", "v": "V", "overhead": "t", "activations": "a", "other": "o", "host_v": "V"}
_MONO_FILL = {"weights": "▒", "k": "█", "v": "▓", "overhead": "▚", "activations": "▞", "other": "░", "host_v": "▓"}


class MemoryPanel(Panel):
    """Device, host and the ghost, to one scale."""

    NUMBER = 1
    TITLE = "memory"

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
        left = Text.assemble(("with a full KV cache", palette.text), "  ", (size(view.ghost.used), "bold"))
        if view.saved >= 0:
            right = Text(f"{size(view.saved)} less on the device", palette.good)
        else:
            right = Text(f"{size(-view.saved)} allocated ahead", palette.muted)
        return columns(left, right, width)

    def _bar(self, bar: Bar, scale: int, width: int) -> Text:
        """A stacked bar; between two colours an eighth block has the one before and the one after."""
        palette, look = self.look.palette, self.look
        ends = lengths(bar.segments, scale, width)
        if not look.colour or look.ascii:
            return self._plain_bar(bar, ends, width)
        parts: list[tuple[str, int]] = [
            (getattr(palette, segment.part), end) for segment, end in zip(bar.segments, ends, strict=True)
        ]
        ghost = {palette.ghost} if any(segment.part == "ghost" for segment in bar.segments) else set()
        parts.append((palette.free, width * 8))
        text, at, used = Text(), 0, 0
        for number, (colour, end) in enumerate(parts):
            stop = min(width * 8, used + end)
            if stop <= used:
                continue
            whole = stop // 8 - at
            if whole > 0:
                if colour in ghost:
                    text.append(look.signs.hatch * whole, f"{colour} on {palette.free}")
                else:
                    text.append(" " * whole, f"on {colour}")
                at += whole
            rest = stop - at * 8
            if rest > 0 and at < width and number + 1 < len(parts):
                following = parts[number + 1][0]
                text.append(look.signs.eighths[rest], f"{colour} on {following}" if following not in ghost else colour)
                at += 1
                used = at * 8
            else:
                used = stop
        return text

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
        for segment in (*view.device.segments, *view.host.segments):
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

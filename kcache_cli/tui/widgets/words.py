"""The text panel: what is being said, the passage under the cursor, or the progress of a batch."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text
from textual import events
from textual.reactive import reactive

from kcache.watch.frame import Frame, SequenceFrame
from kcache_cli.text import one_line
from kcache_cli.tui.model.moment import Moment
from kcache_cli.tui.model.passage import Piece
from kcache_cli.tui.model.words import count
from kcache_cli.tui.widgets.chart import bar
from kcache_cli.tui.widgets.paint import words
from kcache_cli.tui.widgets.panel import Panel, columns, cut

_WRAP = Console(width=80, color_system=None, markup=False, emoji=False, highlight=False)


class WordsPanel(Panel):
    """Running text; tokens that the last step picked are lit."""

    NUMBER = 6
    TITLE = "text"

    pieces: reactive[tuple[Piece, ...]] = reactive((), always_update=True, repaint=False)
    """The tokens that are shown."""
    passage: reactive[bool] = reactive(False)
    """Whether they are a passage from the middle, shown from its beginning."""
    names: reactive[tuple[str, ...]] = reactive((), repaint=False)
    """What the sequences are called, where they have names: text of the job's input."""
    said: reactive[Text | None] = reactive(None, always_update=True, repaint=False)
    """A conversation of this process, shown instead."""
    top: reactive[int | None] = reactive(None)
    """The first line of the conversation that is shown to one who reads back; None follows what is said."""

    def watch_pieces(self) -> None:
        """Draw them."""
        self.redraw()

    def watch_said(self) -> None:
        """Draw it."""
        self.redraw()

    def watch_top(self) -> None:
        """Draw the other part."""
        self.redraw()

    def action_page(self, by: int) -> None:
        """Go on in the conversation by pages, or back."""
        self._go(by * max(1, self.size.height - 1))

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Back."""
        self._go(-1)
        event.stop()

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """On."""
        self._go(1)
        event.stop()

    def _go(self, by: int) -> None:
        if self.said is None or self.passage:
            return
        last = max(0, len(wrapped(self.said, self.size.width)) - self.size.height)
        top = max(0, by + (last if self.top is None else min(self.top, last)))
        self.top = None if top >= last else top

    def _conversation(self, said: Text, width: int, height: int) -> list[Text]:
        lines = wrapped(said, width)
        last = max(0, len(lines) - height)
        top = last if self.top is None else min(self.top, last)
        self.say_below(f"{top + 1}-{top + height} of {len(lines)}, pgup and pgdn" if last else "")
        return lines[top : top + height]

    def draw(self, moment: Moment, width: int, height: int) -> list[Text]:
        """See :class:`~kcache_cli.tui.widgets.panel.Panel`."""
        frame = moment.frame
        assert frame is not None
        if self.said is not None and not self.passage:
            return self._conversation(self.said, width, height)
        self.say_below("")
        if frame.began > 1 and not self.passage:
            return self._batch(frame, width, height)
        head: list[Text] = []
        if frame.job is not None and not self.passage:
            head = [self._job(frame.job, width)]
            if self.names:
                head.append(cut(Text(one_line(self.names[0]), self.look.palette.muted), width))
        lines = wrapped(words(self.pieces, self.look), width)
        if not any(line.plain.strip() for line in lines):
            why = "no text: the publisher has no tokenizer" if frame.tokens else "no text yet"
            lines = [Text(why, self.look.palette.muted)]
        room = height - len(head)
        return [*head, *(lines[:room] if self.passage else lines[-room:])]

    def draw_empty(self, width: int, height: int) -> list[Text]:
        """What is said even before the first frame."""
        if self.said is not None:
            return self._conversation(self.said, width, height)
        return super().draw_empty(width, height)

    def _job(self, job: tuple[int, int], width: int) -> Text:
        done, total = job
        palette = self.look.palette
        label = Text.assemble((f"{done:,}", "bold"), (f"/{total:,} prompts ", palette.muted))
        share = done / total if total else 0
        return Text.assemble(label, bar(share, max(1, width - label.cell_len), palette.accent, palette.free, self.look))

    def _batch(self, frame: Frame, width: int, height: int) -> list[Text]:
        """Progress of each sequence, and of the job."""
        palette = self.look.palette
        lines = [] if frame.job is None else [self._job(frame.job, width)]
        made = sum(each.completion_tokens for each in frame.sequences)
        going = sum(not each.done for each in frame.sequences)
        left = Text.assemble((f"{going}", "bold"), (f" of {frame.began} going", palette.muted))
        lines.append(columns(left, Text.assemble((count(made), "bold"), (" new tokens", palette.muted)), width))
        room = height - len(lines)
        longest = max([1, *(each.completion_tokens for each in frame.sequences)])
        each_width = width if len(frame.sequences) <= room else (width - 2) // 2
        labels = self._labels(len(frame.sequences), each_width)
        cells = [
            self._sequence(label, each, longest, each_width)
            for label, each in zip(labels, frame.sequences, strict=True)
        ]
        if each_width == width:
            return [*lines, *cells]
        half = min(room, -(-len(cells) // 2))
        for at in range(half):
            right = cells[at + half] if at + half < len(cells) else Text()
            lines.append(Text.assemble(cells[at], "  ", right))
        return lines

    def _labels(self, count: int, width: int) -> list[Text]:
        """Names of sequences, of one width and half of the line at most; numbers where there are no names."""
        muted = self.look.palette.muted
        if not count or len(self.names) != count:
            return [Text(f"{index:>3} ", muted) for index in range(count)]
        names = [Text(one_line(name), muted) for name in self.names]
        room = min(width // 2, max(3, *(name.cell_len for name in names)))
        labels = [cut(name, room) for name in names]
        for label in labels:
            label.append(" " * (room + 1 - label.cell_len))
        return labels

    def _sequence(self, label: Text, sequence: SequenceFrame, longest: int, width: int) -> Text:
        palette = self.look.palette
        tail = Text.assemble((f" {sequence.completion_tokens:>5,}", palette.good if sequence.done else palette.text))
        tail.append(" done" if sequence.done else "     ", palette.good)
        tone = palette.good if sequence.done else palette.accent
        share = sequence.completion_tokens / longest
        room = max(1, width - label.cell_len - tail.cell_len)
        return cut(Text.assemble(label, bar(share, room, tone, palette.free, self.look), tail), width)


def wrapped(text: Text, width: int) -> list[Text]:
    """Running text in lines."""
    return list(text.wrap(_WRAP, max(1, width)))

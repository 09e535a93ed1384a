"""What all panels are: a frame with a number, and lines drawn from the present moment."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from itertools import pairwise
from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from kcache_cli.tui.look import Look, look_of
from kcache_cli.tui.model.moment import Moment


class Panel(Widget, can_focus=True):
    """A numbered panel.

    A subclass says in :meth:`draw` what is in it; it is drawn anew when the moment, its size or the look changes.
    """

    NUMBER: ClassVar[int] = 0
    TITLE: ClassVar[str] = ""

    moment: reactive[Moment | None] = reactive(None, always_update=True, repaint=False)
    """What is shown."""

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._drawn: tuple[tuple[int, int], Look, list[Strip]] | None = None
        self.border_title = f"{self.NUMBER} {self.TITLE}"

    @property
    def look(self) -> Look:
        """The app's."""
        return look_of(self.app)

    def watch_moment(self) -> None:
        """Draw the new moment."""
        self.redraw()

    def redraw(self) -> None:
        """Draw anew."""
        self._drawn = None
        self.refresh()

    def say_below(self, text: str) -> None:
        """Have the frame say something: after this drawing, which has the frame's old words."""
        if text != (self.border_subtitle or ""):
            self.call_later(setattr, self, "border_subtitle", text)

    @abstractmethod
    def draw(self, moment: Moment, width: int, height: int) -> list[Text]:
        """The lines of the panel, at most ``height`` of them, ``width`` cells wide."""

    def draw_empty(self, width: int, height: int) -> list[Text]:
        """The lines while there is no frame."""
        return [Text("waiting for the first step", self.look.palette.muted)]

    def strips(self, width: int, height: int) -> list[Strip]:
        """The lines as they go to the screen."""
        moment = self.moment
        if moment is None or moment.frame is None:
            lines = self.draw_empty(width, height)
        else:
            lines = self.draw(moment, width, height)
        base = self.rich_style
        return [strip(line, self.look.ascii, base).adjust_cell_length(width, base) for line in lines]

    def drawn(self) -> list[Strip]:
        """The lines, drawn if that has not been done since something changed."""
        size = (self.size.width, self.size.height)
        if self._drawn is None or self._drawn[:2] != (size, self.look):
            self._drawn = size, self.look, self.strips(*size)
        return self._drawn[2]

    def render_line(self, y: int) -> Strip:
        """Give one line to the screen."""
        lines = self.drawn()
        return lines[y] if y < len(lines) else Strip.blank(self.size.width, self.rich_style)


def strip(text: Text, ascii: bool = False, base: Style | None = None) -> Strip:
    """A styled line as a strip, over the style ``base``.

    With ``ascii`` other characters give way to some that look like them.
    """
    plain, base = text.plain, (base or Style()) + _style(text.style)
    if ascii:
        plain = plain.translate(_ASCII).encode("ascii", "replace").decode()
    segments: list[Segment] = []
    at = 0
    for start, end, style in _stretches(text):
        if start > at:
            segments.append(Segment(plain[at:start], base))
        segments.append(Segment(plain[start:end], base + style))
        at = end
    if at < len(plain):
        segments.append(Segment(plain[at:], base))
    return Strip(segments)


def _stretches(text: Text) -> Iterator[tuple[int, int, Style]]:
    """The styled stretches of a text in their order; where spans overlap the later one goes before."""
    spans = text.spans
    if all(before.end <= after.start for before, after in pairwise(spans)):
        for span in spans:
            yield span.start, span.end, _style(span.style)
        return
    edges = sorted({edge for span in spans for edge in (span.start, span.end)})
    for start, end in pairwise(edges):
        style = Style()
        for span in spans:
            if span.start <= start and end <= span.end:
                style += _style(span.style)
        yield start, end, style


_ASCII = str.maketrans({"–": "-", "—": "-", "·": "-", "…": "~", "×": "x", "≤": "<", "“": '"', "”": '"', "’": "'"})


def _style(style: str | Style) -> Style:
    return Style.parse(style) if isinstance(style, str) else style


def columns(left: Text, right: Text, width: int) -> Text:
    """Two texts at the ends of a line; the right one goes where there is no room."""
    gap = width - left.cell_len - right.cell_len
    if gap < 1:
        return cut(left, width)
    return Text.assemble(left, " " * gap, right)


def cut(text: Text, width: int) -> Text:
    """At most ``width`` cells of a line."""
    if text.cell_len > width:
        text = text.copy()
        text.truncate(width, overflow="ellipsis")
    return text

"""The line at the top that says what is watched, and the timeline of what can be stepped through."""

from __future__ import annotations

from abc import abstractmethod

from rich.text import Text
from textual import events
from textual.message import Message
from textual.reactive import reactive
from textual.strip import Strip
from textual.widget import Widget

from kcache_cli.text import one_line
from kcache_cli.tui.look import look_of
from kcache_cli.tui.model.moment import Moment
from kcache_cli.tui.model.words import clock, figure
from kcache_cli.tui.widgets.panel import columns, cut, strip


class Line(Widget):
    """One line drawn from the moment."""

    moment: reactive[Moment | None] = reactive(None, always_update=True)
    """What is shown."""
    rate_hz: reactive[float] = reactive(5.0)
    """How often the dashboard looks."""

    @abstractmethod
    def draw(self, width: int) -> Text:
        """The line."""

    def render_line(self, y: int) -> Strip:
        """Give the line to the screen."""
        width = self.size.width
        text = self.draw(width) if y == 0 else Text()
        base = self.rich_style
        return strip(cut(text, width), look_of(self.app).ascii, base).adjust_cell_length(width, base)


class Headline(Line):
    """Name, model, process, phase, and whether it is live."""

    over: reactive[str] = reactive("")
    """What became of the work of this process, once it is over."""

    def draw(self, width: int) -> Text:
        """See :class:`Line`."""
        look = look_of(self.app)
        palette, signs, moment = look.palette, look.signs, self.moment
        left = Text.assemble((" KCache ", f"bold reverse {palette.accent}"), " ")
        if moment is None:
            return left.append("connecting", palette.muted)
        info = moment.info
        left.append(one_line(info.model), "bold")
        left.append(f" {signs.dot} {one_line(info.command)} {info.pid}", palette.muted)
        state = self._state(moment, width)
        tok_s = None if moment.frame is None else moment.frame.speed.tok_s
        fast = Text("decode ", palette.muted) if tok_s is not None else Text()
        if tok_s is not None:
            fast.append(figure(tok_s), "bold").append(" tok/s  ", palette.muted)
        room = width - left.cell_len - state.cell_len
        if self.app.has_class("small") and fast.cell_len < room:  # there the speed has no panel of its own
            state = Text.assemble(fast, state)
        where = "host-only run: both tiers are RAM" if info.host_only else one_line(info.device)
        if left.cell_len + len(where) + state.cell_len + 4 < width:
            left.append(f" {signs.dot} {where}", palette.muted)
        return columns(cut(left, width - state.cell_len - 1), state, width)

    def _state(self, moment: Moment, width: int) -> Text:
        look = look_of(self.app)
        palette, signs, place, frame = look.palette, look.signs, moment.place, moment.frame
        text = Text()
        if frame is not None:
            text.append(
                f"{frame.phase} ", {"decode": palette.good, "prefill": palette.warn}.get(frame.phase, palette.muted)
            )
            text.append(f"{frame.tokens:,}", "bold")
            text.append(" tokens  " if width >= 100 else "t  ", palette.muted)
            if width >= 100:
                text.append_text(Text.assemble(("step ", palette.muted), (f"{frame.step:,}  ", "bold")))
        if place.paused and (place.live or place.replay):
            text.append(f"{signs.pause} paused", f"bold {palette.warn}")
        elif place.replay:
            text.append(f"{signs.play} {place.speed:g}×", f"bold {palette.accent}")
        elif self.over:
            text.append(self.over, f"bold {palette.good if self.over == 'done' else palette.bad}")
            text.append("; q leaves", palette.muted)
        elif place.live:
            text.append(f"{signs.live} live", f"bold {palette.good}")
            text.append(f" {self.rate_hz:g} Hz", palette.muted)
        else:
            text.append("ended", f"bold {palette.bad}")
        return text.append(" ")


class Timeline(Line):
    """Where among the frames the dashboard is; a click goes there."""

    class Sought(Message):
        """The user wants to go to a frame."""

        def __init__(self, index: int) -> None:
            super().__init__()
            self.index = index

    def __init__(self, *, id: str | None = None) -> None:
        super().__init__(id=id)
        self._bar = (0, 1)

    def draw(self, width: int) -> Text:
        """See :class:`Line`."""
        look = look_of(self.app)
        palette, signs, moment = look.palette, look.signs, self.moment
        if moment is None or not moment.place.span:
            return Text()
        place = moment.place
        sign = signs.pause if place.paused else signs.play
        left = Text.assemble((f" {sign} ", f"bold {palette.accent}"))
        at = place.index - place.span.start + 1
        right = Text.assemble((f"  {at:,}/{len(place.span):,}", palette.text))
        if place.times is not None:
            right.append(f"  {clock(place.times[0])} / {clock(place.times[1])} ", palette.muted)
        room = max(1, width - left.cell_len - right.cell_len)
        self._bar = left.cell_len, room
        knob = self._cell(place.index, place.span, room)
        turns = {self._cell(index, place.span, room) for index in place.turns}
        for cell in range(room):
            if cell == knob:
                left.append(signs.knob, f"bold {palette.accent}")
            elif cell in turns:
                left.append(signs.mark, palette.prompt)
            else:
                left.append(signs.line, palette.accent if cell < knob else palette.faint)
        return left.append_text(right)

    @staticmethod
    def _cell(index: int, span: range, room: int) -> int:
        return (index - span.start) * (room - 1) // max(1, len(span) - 1)

    def on_click(self, event: events.Click) -> None:
        """Go there."""
        start, room = self._bar
        if self.moment is None or not start <= event.x < start + room:
            return
        span = self.moment.place.span
        share = (event.x - start) / max(1, room - 1)
        self.post_message(self.Sought(span.start + round(share * (len(span) - 1))))


class Notice(Line):
    """What there is to say about the source: why it ended, what is wrong with it."""

    def draw(self, width: int) -> Text:
        """See :class:`Line`."""
        palette = look_of(self.app).palette
        place = None if self.moment is None else self.moment.place
        if place is None or place.closed is None:
            return Text()
        said = one_line(place.closed) + ("" if place.replay else "; the last state stays here")
        return Text.assemble((" ! ", f"bold reverse {palette.warn}"), (f" {said}", palette.warn))

"""Where in a source the dashboard is: following a live run, stepping back through it, or replaying a recording."""

from __future__ import annotations

from kcache.watch.source import Source

SPEEDS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 64.0)


class Playhead:
    """A position that moves with time; used by one thread.

    Parameters
    ----------
    source : Source
    replay : bool
        Play a recording at its own pace, instead of following the newest frame.
    """

    def __init__(self, source: Source, replay: bool) -> None:
        self.replay = replay
        self.paused = False
        self.speed = 1.0
        self.index = -1
        self._source = source
        self._anchor: tuple[float, float] | None = None

    def advance(self, now: float) -> int:
        """Move on to where it should be at ``now``; returns the index, -1 before the first frame."""
        span = self._source.span()
        if not span:
            return -1
        if not self.replay:
            if not self.paused:
                self.index = span[-1]
            self.index = min(max(self.index, span[0]), span[-1])
            return self.index
        self.index = min(max(self.index, span[0]), span[-1])
        if not self.paused:
            self._play(now, span)
        return self.index

    def _play(self, now: float, span: range) -> None:
        here = self._source.frame(self.index).time_s
        if self._anchor is None:
            self._anchor = now, here
        due = self._anchor[1] + (now - self._anchor[0]) * self.speed
        while self.index < span[-1] and self._source.frame(self.index + 1).time_s <= due:
            self.index += 1
        if self.index == span[-1]:
            self.paused, self._anchor = True, None

    def pause(self, paused: bool) -> None:
        """Stop, or go on: a live run jumps to its newest frame, a replay at its end begins anew."""
        span = self._source.span()
        if self.replay and not paused and span and self.index == span[-1]:
            self.index = span[0]
        self.paused, self._anchor = paused, None

    def step(self, by: int) -> None:
        """Go so many frames on, or back; a replay stops there."""
        self.seek(self.index + by)
        self.paused = True

    def seek(self, index: int) -> None:
        """Go to a frame; a live run is paused by that."""
        span = self._source.span()
        if span:
            self.index = min(max(index, span[0]), span[-1])
        self._anchor = None
        self.paused = self.paused or not self.replay

    def faster(self, steps: int) -> None:
        """Change the speed of a replay by so many notches."""
        at = SPEEDS.index(self.speed) + steps
        self.speed, self._anchor = SPEEDS[min(max(at, 0), len(SPEEDS) - 1)], None

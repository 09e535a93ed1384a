"""Where in a source its turns begin: found a stretch at a time, so that a long recording opens at once."""

from __future__ import annotations

from kcache.watch.source import Source


class Turns:
    """The frames with which a prompt or an answer begins."""

    def __init__(self, source: Source) -> None:
        self.found: list[int] = []
        self._source = source
        self._next = 0
        self._before: tuple[int, int, int] | None = None

    def scan(self, most: int = 64) -> None:
        """Look at up to ``most`` more frames."""
        span = self._source.span()
        start = max(self._next, span.start)
        self._next = min(span.stop, start + most)
        for index in range(start, self._next):
            try:
                frame = self._source.frame(index)
            except IndexError:  # unreadable, or forgotten meanwhile
                return
            latest = frame.marks[-1].start if frame.marks else -1
            turn = frame.run, len(frame.marks), latest
            if turn != self._before and frame.marks:
                self.found.append(index)
            self._before = turn
        while self.found and self.found[0] < span.start:
            self.found.pop(0)

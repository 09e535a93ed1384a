"""The frames a viewer has seen and the text that goes with them: what live sources are made of."""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import replace

from kcache.errors import FormatError
from kcache.watch.codec import Message
from kcache.watch.columns import read_frame, read_info
from kcache.watch.frame import Frame, Info
from kcache.watch.transcript import Transcript

KEPT = 4096
"""Frames that are kept."""
KEPT_WITH_PICKS = 64
"""The latest of them keep their exact picks, which are many times the rest."""


class History:
    """Takes messages from one thread and answers another.

    The part of a live :class:`~kcache.watch.source.Source` that does not depend on where the messages come from.
    """

    info: Info

    def __init__(self) -> None:
        self._frames: deque[Frame] = deque()
        self._first = 0
        self._text = Transcript()
        self._closed: str | None = None
        self._lock = threading.Lock()

    def take(self, message: Message) -> None:
        """Take in a frame, text, who publishes, or the end.

        Raises
        ------
        FormatError
            If the message is malformed.
        """
        kind = message.get("kind")
        if kind == "frame":
            frame = read_frame(message)
            with self._lock:
                self._add(frame)
        elif kind == "text":
            with self._lock:
                self._text.apply(message)
        elif kind == "info":
            info = message.get("info")
            if not isinstance(info, dict):
                raise FormatError("info: a map was expected")
            self.info = read_info(info)
        elif kind == "end":
            self.end(str(message.get("reason", "process ended")))

    def _add(self, frame: Frame) -> None:
        self._frames.append(frame)
        if len(self._frames) > KEPT_WITH_PICKS:
            at = len(self._frames) - 1 - KEPT_WITH_PICKS
            self._frames[at] = without_picks(self._frames[at])
        if len(self._frames) > KEPT:
            self._frames.popleft()
            self._first += 1

    def end(self, reason: str) -> None:
        """No more messages will come; the first reason stays."""
        with self._lock:
            self._closed = self._closed or reason

    @property
    def live(self) -> bool:
        """See :class:`~kcache.watch.source.Source`."""
        return self._closed is None

    @property
    def closed(self) -> str | None:
        """See :class:`~kcache.watch.source.Source`."""
        return self._closed

    def span(self) -> range:
        """See :class:`~kcache.watch.source.Source`."""
        with self._lock:
            return range(self._first, self._first + len(self._frames))

    def frame(self, index: int) -> Frame:
        """See :class:`~kcache.watch.source.Source`."""
        with self._lock:
            if not 0 <= index - self._first < len(self._frames):
                raise IndexError(f"frame {index} is not kept")
            return self._frames[index - self._first]

    def latest(self) -> Frame | None:
        """See :class:`~kcache.watch.source.Source`."""
        with self._lock:
            return self._frames[-1] if self._frames else None

    def pieces(self, start: int, end: int, sequence: int = 0, index: int | None = None) -> list[str]:
        """See :class:`~kcache.watch.source.Source`; text is kept for the newest frame only."""
        frame = self.latest() if index is None else self.frame(index)
        if frame is None:
            return [""] * max(0, end - start)
        with self._lock:
            return self._text.pieces(frame.run, start, min(end, frame.tokens), sequence) + [""] * (
                max(0, end - start) - max(0, min(end, frame.tokens) - start)
            )

    def names(self, index: int | None = None) -> tuple[str, ...]:
        """See :class:`~kcache.watch.source.Source`; kept for the newest run and the one before."""
        frame = self.latest() if index is None else self.frame(index)
        with self._lock:
            return () if frame is None else self._text.names(frame.run)


def without_picks(frame: Frame) -> Frame:
    """The same frame without its exact picks."""
    if all(layer.picks is None for layer in frame.layers):
        return frame
    return replace(frame, layers=tuple(replace(layer, picks=None, weights=None) for layer in frame.layers))

"""A source that the reader's thread and the screen may ask at the same time, and that remembers what it decoded."""

from __future__ import annotations

import threading
from collections import OrderedDict

from kcache.watch.frame import Frame, Info
from kcache.watch.source import Source

_KEPT = 512


class Shelf:
    """Frames of another :class:`~kcache.watch.source.Source`, which it asks from one thread at a time.

    Parameters
    ----------
    source : Source
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lock = threading.Lock()
        self._known: OrderedDict[int, Frame] = OrderedDict()
        self._is_recording = not source.live

    @property
    def info(self) -> Info:
        """See :class:`~kcache.watch.source.Source`."""
        return self._source.info

    @property
    def live(self) -> bool:
        """See :class:`~kcache.watch.source.Source`."""
        return self._source.live

    @property
    def closed(self) -> str | None:
        """See :class:`~kcache.watch.source.Source`."""
        return self._source.closed

    def span(self) -> range:
        """See :class:`~kcache.watch.source.Source`."""
        with self._lock:
            return self._source.span()

    def frame(self, index: int) -> Frame:
        """See :class:`~kcache.watch.source.Source`; the latest few hundred that were asked for are kept."""
        with self._lock:
            if index in self._known:
                self._known.move_to_end(index)
                return self._known[index]
            frame = self._source.frame(index)
            if self._is_recording:  # a live source has them at hand
                self._known[index] = frame
                if len(self._known) > _KEPT:
                    self._known.popitem(last=False)
            return frame

    def latest(self) -> Frame | None:
        """See :class:`~kcache.watch.source.Source`."""
        with self._lock:
            return self._source.latest()

    def pieces(self, start: int, end: int, sequence: int = 0, index: int | None = None) -> list[str]:
        """See :class:`~kcache.watch.source.Source`; empty where the frame is gone."""
        with self._lock:
            try:
                return self._source.pieces(start, end, sequence, index)
            except IndexError:
                return [""] * max(0, end - start)

    def names(self, index: int | None = None) -> tuple[str, ...]:
        """See :class:`~kcache.watch.source.Source`; empty where the frame is gone."""
        with self._lock:
            try:
                return self._source.names(index)
            except IndexError:
                return ()

    def ask(self, *, rate_hz: float | None = None, picks: bool | None = None, probe: bool | None = None) -> None:
        """See :class:`~kcache.watch.source.Source`."""
        self._source.ask(rate_hz=rate_hz, picks=picks, probe=probe)

    def close(self) -> None:
        """See :class:`~kcache.watch.source.Source`."""
        self._source.close()

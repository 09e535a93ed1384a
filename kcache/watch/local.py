"""The viewer in the publishing process itself."""

from __future__ import annotations

from collections.abc import Callable

from kcache.watch.frame import Info
from kcache.watch.history import History
from kcache.watch.viewers import LocalViewer


class LocalSource(History):
    """Frames of this process; see :class:`~kcache.watch.source.Source`.

    Parameters
    ----------
    info : Info
    wake : callable
        Tells the publisher that something was asked for.
    """

    def __init__(self, info: Info, wake: Callable[[], None]) -> None:
        super().__init__()
        self.info = info
        self.viewer = LocalViewer(self)
        self._wake = wake

    def ask(self, *, rate_hz: float | None = None, picks: bool | None = None, probe: bool | None = None) -> None:
        """See :class:`~kcache.watch.source.Source`."""
        self.viewer.ask({"rate_hz": rate_hz, "picks": picks, "probe": probe})
        self._wake()

    def close(self) -> None:
        """See :class:`~kcache.watch.source.Source`."""
        self.end("closed")
        self._wake()

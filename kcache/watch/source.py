"""Where a viewer gets its frames: a live process, this process, or a recording, all behind one protocol."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from kcache.watch.frame import Frame, Info


@runtime_checkable
class Source(Protocol):
    """Frames to look at.

    Frames have an index, ascending without gaps. A live source keeps the latest few thousand and forgets older ones;
    a recording has all of its frames from the start. All methods return at once and may be called from any one thread;
    a live source reads its socket in a thread of its own, so a viewer looks at :meth:`span` or :meth:`latest` on a
    timer.

    Attributes
    ----------
    info : Info
        Who publishes; a live source may come to know more of it.
    live : bool
        Whether more frames may come; false for a recording, and once :attr:`closed` says why.
    closed : str or None
        Why no more frames will come ("process ended", "connection lost: ...", the damage in a cut recording), in words
        for the user; ``None`` while nothing is wrong. The frames that are there stay.
    """

    @property
    def info(self) -> Info:
        """See the class."""
        ...

    @property
    def live(self) -> bool:
        """See the class."""
        ...

    @property
    def closed(self) -> str | None:
        """See the class."""
        ...

    def span(self) -> range:
        """Indices of the frames that are there now; empty before the first."""
        ...

    def frame(self, index: int) -> Frame:
        """The frame at ``index``.

        Raises
        ------
        IndexError
            If it is outside of :meth:`span`.
        """
        ...

    def latest(self) -> Frame | None:
        """The newest frame; ``None`` before the first."""
        ...

    def pieces(self, start: int, end: int, sequence: int = 0, index: int | None = None) -> list[str]:
        """Text of the tokens at positions ``start:end`` of a sequence, one string each; ``""`` where it is not known.

        Characters that span tokens are with the first of them. The text is untrusted model output. ``index`` asks for
        the text as it was at that frame; by default the newest.
        """
        ...

    def names(self, index: int | None = None) -> tuple[str, ...]:
        """What the sequences are called at a frame, the newest by default; empty where they have no names.

        Untrusted text: names come from the input of a job.
        """
        ...

    def ask(self, *, rate_hz: float | None = None, picks: bool | None = None, probe: bool | None = None) -> None:
        """Tell the publisher what this viewer needs; what is ``None`` stays. A recording takes no notice.

        ``rate_hz``: frames per second (10 at first, 0.2 to 60). ``picks``: exact picks with each frame (true at first).
        ``probe``: have layers that attend exactly in a short context say what would be picked (false at first, since
        it costs the engine something).
        """
        ...

    def close(self) -> None:
        """Let go of it; idempotent."""
        ...

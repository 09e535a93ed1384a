"""What all panels are given: one frame, what led to it, and where in time it is."""

from __future__ import annotations

from dataclasses import dataclass, field

from kcache.watch.frame import Frame, Info
from kcache_cli.tui.model.trace import Past


@dataclass(frozen=True, slots=True)
class Place:
    """Where the dashboard is in its source.

    Attributes
    ----------
    index : int
        Of the frame; -1 before the first.
    span : range
        The frames that are there.
    live : bool
        Whether more may come.
    paused : bool
    speed : float
        Of a replay, times real time.
    closed : str or None
        Why no more will come.
    replay : bool
        Whether the source is a recording.
    turns : tuple of int
        Frames in which a turn begins, as far as they have been found.
    times : (float, float) or None
        Seconds from the first frame to this one and to the last.
    """

    index: int = -1
    span: range = range(0)
    live: bool = True
    paused: bool = False
    speed: float = 1.0
    closed: str | None = None
    replay: bool = False
    turns: tuple[int, ...] = ()
    times: tuple[float, float] | None = None


@dataclass(frozen=True, eq=False)
class Moment:
    """One frame and its circumstances; ``frame`` is None before the first."""

    info: Info
    frame: Frame | None
    past: Past
    place: Place = field(default_factory=Place)

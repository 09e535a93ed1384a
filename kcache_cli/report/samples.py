"""A run as arrays: one sample per recorded frame, read once, in order, however long the run is."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from kcache.telemetry import Stats
from kcache.watch.frame import Frame, since
from kcache.watch.source import Source

MOST_FRAMES = 20_000
"""Frames that are read; of a longer run every second, or every third, and so on."""


@dataclass
class Samples:
    """What a page shows over time; every list has a value per frame read.

    Attributes
    ----------
    seconds : list of float
        Since the first frame.
    step, tokens, run : list of int
    phase : list of str
    device_k, device_v, overhead, host_v, full : list of int
        Bytes held.
    h2d, d2h, rows, hits, steps : list of int
        What was added since the frame before, of the same run.
    took : list of float
        Seconds since the frame before; 0 for the first frame of a run.
    itl_ms, mass, worst_mass, overlap : list of float
        NaN where there is nothing to tell; ``mass`` is the mean over layers that picked, ``worst_mass`` the least.
    """

    seconds: list[float] = field(default_factory=list)
    step: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    run: list[int] = field(default_factory=list)
    phase: list[str] = field(default_factory=list)
    device_k: list[int] = field(default_factory=list)
    device_v: list[int] = field(default_factory=list)
    overhead: list[int] = field(default_factory=list)
    host_v: list[int] = field(default_factory=list)
    full: list[int] = field(default_factory=list)
    h2d: list[int] = field(default_factory=list)
    d2h: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    took: list[float] = field(default_factory=list)
    itl_ms: list[float] = field(default_factory=list)
    mass: list[float] = field(default_factory=list)
    worst_mass: list[float] = field(default_factory=list)
    overlap: list[float] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.seconds)

    def column(self, name: str) -> np.ndarray:
        """A list as an array."""
        return np.asarray(getattr(self, name), dtype=np.float64)

    def add(self, frame: Frame, before: Frame | None, began_s: float) -> None:
        """Take in a frame."""
        follows = before if before is not None and before.run == frame.run else None
        new = since(Stats() if follows is None else follows.totals, frame.totals)
        totals = frame.totals
        self.seconds.append(max(0.0, frame.time_s - began_s))
        self.took.append(0.0 if follows is None else max(0.0, frame.time_s - follows.time_s))
        for name, value in (
            ("step", frame.step),
            ("tokens", frame.tokens),
            ("run", frame.run),
            ("phase", frame.phase),
            ("device_k", totals.k_bytes),
            ("device_v", totals.resident_v_bytes),
            ("overhead", totals.overhead_bytes),
            ("host_v", totals.host_bytes),
            ("full", totals.full_kv_bytes),
            ("h2d", new.bytes_h2d),
            ("d2h", new.bytes_d2h),
            ("rows", new.rows_fetched),
            ("hits", new.hot_hits),
            ("steps", new.steps),
        ):
            getattr(self, name).append(value)
        decoding = new.steps > 0 and frame.speed.itl_ms is not None
        self.itl_ms.append(float(frame.speed.itl_ms or 0) if decoding else np.nan)
        masses = [float(layer.mass.mean()) for layer in frame.layers if layer.mass is not None]
        self.mass.append(sum(masses) / len(masses) if masses else np.nan)
        self.worst_mass.append(min(masses) if masses else np.nan)
        again = [layer.overlap for layer in frame.layers if layer.overlap is not None]
        self.overlap.append(sum(again) / len(again) if again else np.nan)


def frames(source: Source) -> Iterator[tuple[int, Frame]]:
    """The frames of a source with their indices, up to where it can be read; every n-th of a very long run.

    Of the frames of one decode step only the last is given: those before it were taken while it was under way. So is
    the one that only says that nothing happens any more.
    """
    held: tuple[int, Frame] | None = None
    for index, frame in _readable(source):
        if held is None or not _same_step(held[1], frame):
            if held is not None:
                yield held
            held = index, frame
        elif frame.phase != "idle" or (held[1].totals, held[1].sequences) != (frame.totals, frame.sequences):
            held = index, frame
    if held is not None:
        yield held


def _readable(source: Source) -> Iterator[tuple[int, Frame]]:
    span = source.span()
    for index in range(span.start, span.stop, max(1, -(-len(span) // MOST_FRAMES))):
        try:
            frame = source.frame(index)
        except IndexError:  # forgotten meanwhile, or unreadable: the source says what is wrong
            if not source.live:
                return
            continue
        if frame.run:  # else there was no cache yet
            yield index, frame


def _same_step(one: Frame, other: Frame) -> bool:
    return one.step > 0 and (one.run, one.step, one.tokens) == (other.run, other.step, other.tokens)

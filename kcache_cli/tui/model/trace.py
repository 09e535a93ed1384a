"""What a single frame does not say: how it came to be. Histories over the frames that led to the present one.

Shapes: L layers, W buckets of the frame, n frames remembered.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from kcache.telemetry import Stats
from kcache.watch.frame import HALF_LIFE_STEPS, Frame

REMEMBERED = 240
"""Frames that graphs go back."""
_WINDOW = 32


@dataclass(frozen=True, slots=True)
class Point:
    """One frame, as graphs need it: totals of the run so far, and the time between tokens then."""

    time_s: float
    run: int
    step: int
    phase: str
    totals: Stats
    itl_ms: float | None


@dataclass(frozen=True, eq=False)
class Past:
    """Histories up to a frame.

    Attributes
    ----------
    points : tuple of Point
        Oldest first, the present one last.
    decayed : ndarray ``[L, W]``
        Picks per bucket and step, a mean over steps that weighs older ones less.
    last_step : ndarray ``[L, W]``
        The step in which a bucket was last picked; -1 for never.
    heads : int
        Rows of picks a layer has: KV heads times observed sequences; at least 1.
    picked : Frame or None
        The latest frame that has exact picks; frames of a recording have them now and then.
    weighed : Frame or None
        The latest frame that says what buckets of it hold; frames of a recording do so now and then.
    earlier : Frame or None
        The decode frame of this run that is a window back, or as far back as there is one.
    """

    points: tuple[Point, ...]
    decayed: np.ndarray
    last_step: np.ndarray
    heads: int
    picked: Frame | None
    weighed: Frame | None = None
    earlier: Frame | None = None

    def window(self) -> tuple[Point, Point] | None:
        """The first and last of the latest ``_WINDOW`` frames that are of this run and phase.

        When the run is idle, of the phase before that.
        """
        points = list(self.points[-2 * _WINDOW :])
        while points and points[-1].phase == "idle":
            points.pop()
        if not points or points[-1].run != self.points[-1].run:
            return None
        first = last = points[-1]
        for point in reversed(points[-_WINDOW:]):
            if point.run != last.run or point.phase != last.phase or point.step > first.step:
                break
            first = point
        return (first, last) if last.time_s > first.time_s else None


class Trace:
    """Takes frames in order and keeps the histories."""

    def __init__(self) -> None:
        self._points: deque[Point] = deque(maxlen=REMEMBERED)
        self._frame: Frame | None = None
        self._decayed = np.zeros((0, 0))
        self._last_step = np.zeros((0, 0), np.int64)
        self._weight = 0.0
        self._heads = 1
        self._picked: Frame | None = None
        self._weighed: Frame | None = None
        self._recent: deque[Frame] = deque(maxlen=_WINDOW)

    def add(self, frame: Frame) -> None:
        """Take in the next frame."""
        before = self._frame
        speed = frame.speed.itl_ms
        self._points.append(Point(frame.time_s, frame.run, frame.step, frame.phase, frame.totals, speed))
        if before is None or before.run != frame.run or len(before.layers) != len(frame.layers):
            self._begin(frame)
            before = None
        elif before.bucket_tokens != frame.bucket_tokens or before.buckets != frame.buckets:
            self._resize(before, frame)
        steps = frame.step - (before.step if before is not None else frame.step - 1)
        heat = frame.heat
        if heat.any() and (steps > 0 or frame.phase == "decode"):
            kept = 0.5 ** (max(0, steps) / HALF_LIFE_STEPS)
            self._decayed = self._decayed * kept + heat * (1 - kept)
            self._weight = self._weight * kept + 1 - kept
            self._last_step[heat > 0] = frame.step
        self._note_picks(frame)
        self._frame = frame
        if frame.phase == "prefill" or (before is None and self._recent):
            self._recent.clear()
        elif frame.phase == "decode":
            self._recent.append(frame)

    def past(self) -> Past:
        """The histories as they are now."""
        earlier = self._recent[0] if self._recent else None
        heat = self._decayed / max(self._weight, 1e-9), self._last_step.copy()
        return Past(tuple(self._points), *heat, self._heads, self._picked, self._weighed, earlier)

    def _begin(self, frame: Frame) -> None:
        shape = (len(frame.layers), frame.buckets)
        self._decayed, self._last_step = np.zeros(shape), np.full(shape, -1, np.int64)
        self._picked = self._weighed = None
        self._heads, self._weight = 1, 0.0

    def _note_picks(self, frame: Frame) -> None:
        if any(layer.held is not None for layer in frame.layers):
            self._weighed = frame
        shapes = [layer.picks.shape for layer in frame.layers if layer.picks is not None]
        if shapes:
            self._picked = frame
            self._heads = max(shape[0] * shape[1] for shape in shapes)
        elif self._picked is None and frame.layers and frame.buckets:
            fullest = max(int(layer.histogram.max(initial=0)) for layer in frame.layers)
            self._heads = max(self._heads, -(-fullest // frame.bucket_tokens))

    def _resize(self, before: Frame, frame: Frame) -> None:
        """Carry the histories over to buckets of another width, or more of them."""
        decayed, last = self._decayed, self._last_step
        if before.bucket_tokens > frame.bucket_tokens:
            times = before.bucket_tokens // frame.bucket_tokens
            decayed, last = np.repeat(decayed / times, times, 1), np.repeat(last, times, 1)
        elif before.bucket_tokens < frame.bucket_tokens:
            times = frame.bucket_tokens // before.bucket_tokens
            padding = -decayed.shape[1] % times
            decayed = np.pad(decayed, ((0, 0), (0, padding))).reshape(len(decayed), -1, times).sum(2)
            last = np.pad(last, ((0, 0), (0, padding)), constant_values=-1).reshape(len(last), -1, times).max(2)
        room = max(0, frame.buckets - decayed.shape[1])
        self._decayed = np.pad(decayed, ((0, 0), (0, room)))[:, : frame.buckets]
        self._last_step = np.pad(last, ((0, 0), (0, room)), constant_values=-1)[:, : frame.buckets]

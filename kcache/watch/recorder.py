"""Writing a recording: every step, as small as it gets, on the disk when the call returns."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from kcache.errors import InputError
from kcache.watch.codec import Message
from kcache.watch.columns import PICKS, ROOTS, SOMETIMES, STATS, WIDTHS
from kcache.watch.frame import MOST_BUCKETS
from kcache.watch.kcr import DELTA, END, HEADER, KEY, KEY_EVERY, MAGIC, START, TEXT, VERSION, record, thin
from kcache.watch.tokens import Tokens
from kcache.watch.transcript import TextCursor

BUDGET = 60
"""Bytes per layer and step that a recording keeps to in the long run, of 32 layers (1,920) or more; text aside.

Counters, mass and histograms come first. Where they take more than that, the histograms get half the buckets, twice as
wide. What buckets hold is written where the step itself pays for it, or what has been saved so far; exact picks, many
times the size of the rest, where what has been saved does. Only steps earn, and pay: a frame of a prompt, or in the
middle of a step, is a hundred bytes, and gets more only of what is left.
"""
_CREDIT = 8192
"""What there is to begin with, so that an answer's first step has exact picks."""
_COARSE = 8
_LEAST_HELD = 0.01
_LEAST_LAYERS = 32
_WINDOW = 8
_ROOM = 0.45
_STEPS = STATS.index("steps")


class Recorder:
    """Appends to a new recording, in the publisher's thread.

    Parameters
    ----------
    path : Path
        Must not exist: a recording is never overwritten.

    Attributes
    ----------
    problem : str or None
        Why nothing has been written any more since, in words.

    Raises
    ------
    InputError
        If the file exists or cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem: str | None = None
        self.text = TextCursor()
        self._before: Message = {}
        self._alone = 0
        self._spent = self._earned = 0
        self._credit = _CREDIT
        self._step = (0, 0)
        self._buckets = MOST_BUCKETS
        self._sizes: deque[int] = deque(maxlen=_WINDOW)
        self._costs = {"held": 0, "picks": 0}
        try:
            self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0), 0o600)
        except FileExistsError:
            raise InputError(f"the recording {path}: exists; give another name, or remove it") from None
        except OSError as error:
            raise InputError(f"the recording {path}: cannot be written: {error.strerror or error}") from None
        self._append(START.pack(MAGIC, VERSION))

    def begin(self, info: Message) -> None:
        """Write the header."""
        self._append(record(HEADER, info))

    def write(self, frame: Message, tokens: Tokens) -> None:
        """Write the text that is new, then the frame."""
        while (text := self.text.next(tokens)) is not None:
            self._append(record(TEXT, text))
        plain = {name: value for name, value in frame.items() if name not in SOMETIMES}
        pay = BUDGET * max(_LEAST_LAYERS, len(frame["kinds"]))
        step = plain["run"], int(plain["counts"][_STEPS].max(initial=0))
        advanced = step[1] > 0 and step != self._step
        if advanced:
            self._earned, self._step = self._earned + pay, step
            self._fit_buckets(pay)
        plain["histogram"] = _merged(plain["histogram"], self._buckets)
        alone = self._alone % KEY_EVERY == 0 or plain["run"] != self._before.get("run")
        self._alone = 1 if alone else self._alone + 1
        kind, thinned = (KEY, plain) if alone else (DELTA, thin(plain, self._before))
        data = record(kind, thinned)
        if advanced and not alone:
            self._sizes.append(len(data))
        for name, extra in self._extras(frame):
            saved = self._earned - self._spent
            room = saved + self._credit if name == "picks" else max(saved, pay if advanced else 0)
            if len(data) + self._costs[name] <= room:
                more = {**thinned, **extra}
                larger = record(kind, more)
                self._costs[name] = len(larger) - len(data)
                if len(larger) <= room:
                    lent = max(0, len(larger) - max(saved, len(data)))
                    self._credit, self._spent = self._credit - lent, self._spent - lent
                    data, thinned = larger, more
        self._spent += len(data) if advanced or thinned.keys() & set(SOMETIMES) else 0
        self._before = plain
        self._append(data)

    def _extras(self, frame: Message) -> Iterator[tuple[str, Message]]:
        """What is written where there is room for it, the cheaper first."""
        if "picks" in frame:
            yield "held", {"held": _coarse(frame["held"], self._buckets)}
            yield "picks", {name: frame[name] for name in PICKS if name != "weights"}

    def _fit_buckets(self, pay: int) -> None:
        """Fewer buckets if frames have been larger than what they earn, more if there was room; a key frame follows."""
        if len(self._sizes) < _WINDOW:
            return
        mean, at = sum(self._sizes) / len(self._sizes), WIDTHS.index(self._buckets)
        if pay * _ROOM <= mean <= pay:
            return
        wanted = WIDTHS[min(at + 1, len(WIDTHS) - 1) if mean > pay else max(at - 1, 0)]
        if wanted != self._buckets:
            self._buckets, self._alone = wanted, 0
            self._sizes.clear()

    def close(self, reason: str) -> None:
        """Write the end."""
        self._append(record(END, {"kind": "end", "reason": reason}))
        os.close(self._file)

    def _append(self, data: bytes) -> None:
        """One write per record, so a process that dies leaves whole records; after a failure nothing more is tried."""
        if self.problem is not None:
            return
        try:
            while data:
                data = data[os.write(self._file, data) :]
        except OSError as error:
            self.problem = f"{self.path}: {error.strerror or error}; the recording ends there"


def _merged(histogram: np.ndarray, buckets: int) -> np.ndarray:
    """The histograms ``[layers, 128]`` with neighbouring buckets together, ``[layers, buckets]``."""
    merged: np.ndarray = histogram.reshape(len(histogram), buckets, histogram.shape[1] // buckets).sum(
        2, dtype=np.int64
    )
    return merged


def _coarse(held: np.ndarray, buckets: int) -> np.ndarray:
    """What neighbouring buckets hold together, ``[layers, buckets]``: little, or noise from step to step, left out."""
    shares = ((held / ROOTS) ** 2).reshape(len(held), buckets, held.shape[1] // buckets).sum(2)
    roots = np.rint(np.sqrt(np.where(shares < _LEAST_HELD, 0, shares)) * ROOTS / _COARSE) * _COARSE
    coarse: np.ndarray = np.minimum(roots, ROOTS).astype(np.uint8)
    return coarse

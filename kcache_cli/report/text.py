"""The text of a run, turn by turn, cut into the buckets of its heat map so that a page can shade it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from kcache.watch.frame import Frame
from kcache.watch.source import Source
from kcache_cli.text import printable

MOST_CHARACTERS = 300_000
"""Of all text on a page; then the middle of what is left is passed over."""
MOST_TOKENS = 2**22
"""Whatever a recording says of its length."""
MOST_SEQUENCES = 8
MOST_TURNS = 1000
LEVELS = 9


@dataclass(frozen=True)
class Piece:
    """Text of one bucket's tokens in a turn: its first position, and its shade from 0 to 9; -1 for a remark."""

    text: str
    start: int
    shade: int


@dataclass(frozen=True)
class Turn:
    """A prompt or an answer of a sequence."""

    sequence: int
    role: str
    start: int
    end: int
    pieces: list[Piece]


def turns(source: Source, index: int, frame: Frame, heat: np.ndarray | None) -> list[Turn]:
    """The turns of a frame's run, those of sequence after sequence.

    Parameters
    ----------
    source : Source
    index : int
        Of the frame.
    heat : ndarray ``[buckets]``, optional
        What to shade by.
    """
    shades = np.zeros(frame.buckets, int) if heat is None else _shades(heat)
    found: list[Turn] = []
    count = min(MOST_SEQUENCES, max(1, frame.began))
    room = MOST_CHARACTERS // count
    for sequence in range(count):
        pieces = source.pieces(0, min(frame.tokens, MOST_TOKENS), sequence, index)
        if not any(pieces):
            continue
        skip = _passed_over(pieces, room)
        for role, start, end in _boundaries(frame):
            cut = [*_cut(pieces, start, end, skip, frame.bucket_tokens, shades)]
            if cut:
                found.append(Turn(sequence, role, start, end, cut))
    return found


def _boundaries(frame: Frame) -> Iterator[tuple[str, int, int]]:
    starts = [(mark.role, mark.start) for mark in frame.marks if mark.start < frame.tokens][:MOST_TURNS]
    if not starts or starts[0][1] > 0:
        starts.insert(0, ("prompt", 0))
    for (role, start), end in zip(starts, [*(start for _, start in starts[1:]), frame.tokens], strict=True):
        if end > start:
            yield role, start, end


def _passed_over(pieces: list[str], room: int) -> range:
    """The tokens in the middle to leave out so that the rest is at most ``room`` characters."""
    lengths = np.cumsum([len(piece) for piece in pieces])
    if lengths[-1] <= room:
        return range(0)
    first = int(np.searchsorted(lengths, room // 2))
    last = int(np.searchsorted(lengths, lengths[-1] - room // 2)) + 1
    return range(first, last)


def _cut(pieces: list[str], start: int, end: int, skip: range, width: int, shades: np.ndarray) -> Iterator[Piece]:
    at = start
    while at < end:
        if at in skip:
            count = min(end, skip.stop) - at
            yield Piece(f"\n\n… {count:,} tokens are not shown …\n\n", at, -1)
            at += count
            continue
        bucket = at // width
        stop = min(end, (bucket + 1) * width, skip.start if at < skip.start else end)
        text = printable("".join(pieces[at:stop]))
        if text:
            yield Piece(text, at, int(shades[bucket]) if bucket < len(shades) else 0)
        at = stop


def _shades(heat: np.ndarray) -> np.ndarray:
    """Levels by the square root, the end of the scale where only a few lie above."""
    top = np.quantile(heat, 0.98) or heat.max() or 1.0
    shades: np.ndarray = np.rint(np.sqrt(np.clip(heat / top, 0, 1)) * LEVELS).astype(int)
    return shades

"""What the publisher knows of the tokens: ids and text per position, turn boundaries, progress, latency.

It is told of each forward (:class:`~kcache.watch.capture.Forward`) in order, in the publisher's thread, and turns ids
into text only when a viewer wants it.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Sequence
from typing import Any

from kcache.watch.capture import Finish, Forward, Kept
from kcache.watch.frame import Mark, SequenceFrame, Speed

UNKNOWN = -1
"""Stands for a token that came as an embedding."""
_BROKEN = "\ufffd"
_LONGEST_CHARACTER = 16
_SPEED_STEPS = 32


class Pieces:
    """Text of single tokens, remembered; characters that span tokens are put with the first of them.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase or None
        Without one every piece is empty.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, str] = {}
        anchor = tokenizer("a", add_special_tokens=False)["input_ids"] if tokenizer is not None else []
        self._anchor = [int(token) for token in anchor]
        self._anchor_text = self._decode(self._anchor)

    def is_broken(self, token: int) -> bool:
        """Whether the token alone is not whole characters."""
        return _BROKEN in self._piece(token)

    def __call__(self, ids: Sequence[int]) -> list[str]:
        """One string per token; together they are the text."""
        pieces = [self._piece(token) for token in ids]
        at = 0
        while at < len(pieces):
            end = at
            while end < len(pieces) and end - at < _LONGEST_CHARACTER and _BROKEN in pieces[end]:
                end += 1
            if end - at > 1:
                pieces[at:end] = [self._after_anchor(ids[at:end]), *[""] * (end - at - 1)]
            at = max(end, at + 1)
        return pieces

    def _piece(self, token: int) -> str:
        if token not in self._known:
            self._known[token] = "" if token == UNKNOWN else self._after_anchor([token])
        return self._known[token]

    def _after_anchor(self, ids: Sequence[int]) -> str:
        """Decode tokens as they read in the middle of a text, where a leading space is not dropped."""
        text = self._decode([*self._anchor, *ids])
        return text.removeprefix(self._anchor_text)

    def _decode(self, ids: list[int]) -> str:
        if self._tokenizer is None:
            return ""
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


class Row:
    """One sequence: its ids, and how far their text is known."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.pieces: list[str] = []
        self.padding = self.holes = 0
        self.completion = 0
        self.done = False

    def crop(self, length: int) -> None:
        """Forget what comes after ``length`` tokens."""
        del self.ids[length:], self.pieces[length:]

    def read(self, pieces: Pieces, most: int) -> None:
        """Turn up to ``most`` more ids into text; the beginning of a character waits for the rest of it."""
        start = len(self.pieces)
        ids = self.ids[start : start + most]
        if not ids:
            return
        found = pieces(ids)
        open_tokens = 0
        while open_tokens < min(len(ids), _LONGEST_CHARACTER) and pieces.is_broken(ids[-1 - open_tokens]):
            open_tokens += 1
        if 0 < open_tokens < _LONGEST_CHARACTER and found[-open_tokens].endswith(_BROKEN):
            del found[-open_tokens:]
        for position in range(start, min(self.padding, start + len(found))):
            found[position - start] = ""
        self.pieces += found


class Tokens:
    """Ids, boundaries and times of the latest run.

    Parameters
    ----------
    pieces : Pieces
    ends : set of int
        Token ids that end a sequence.
    """

    def __init__(self, pieces: Pieces, ends: frozenset[int] = frozenset()) -> None:
        self.run = 0
        self.names: tuple[str, ...] = ()
        self.rows: list[Row] = []
        self._held: list[Row] = []  # those of them that the cache still holds, in its order
        self.marks: list[Mark] = []
        self.pieces = pieces
        self._ends = ends
        self._next_names: tuple[str, ...] = ()
        self._called: tuple[str, ...] = ()
        self._in_prompt = False
        self._end = self._going = 0
        self._prompt_began: float | None = None
        self._ttft_ms: float | None = None
        self._latest_step: float | None = None
        self._intervals: deque[float] = deque(maxlen=_SPEED_STEPS)
        self._itl_ms: float | None = None
        self._fresh: list[float] = []

    def take(self, forward: Forward) -> int:
        """Take note of a forward; returns the length its past was cut back to."""
        if forward.run != self.run or len(self._held) != forward.batch:
            self._begin(forward)
        for row in self.rows:
            row.crop(forward.past)
        self.marks = [mark for mark in self.marks if mark.start < forward.past]
        if forward.prompt:
            self._take_prompt(forward)
        else:
            self._take_step(forward)
        self._end = forward.past + forward.count
        self._add_ids(forward)
        return forward.past

    def name(self, names: tuple[str, ...]) -> None:
        """What the sequences of the next run are called."""
        self._next_names = names

    def finish(self, finish: Finish) -> None:
        """Take note of sequences that have had their last token."""
        if finish.run != self.run:
            return
        for index, made in finish.made.items():
            if index < len(self.rows):
                self.rows[index].completion, self.rows[index].done = made, True

    def keep(self, kept: Kept) -> None:
        """Take note that the cache goes on with some of its sequences alone, or with one that was read for several."""
        if kept.run != self.run or any(place >= len(self._held) for place in kept.places):
            return
        self._held = [self._held[place] for place in kept.places]
        if len(set(kept.places)) < len(kept.places):
            self.rows = self._held = [copy.deepcopy(row) for row in self._held]
            self.names = self._called if len(self._called) == len(self.rows) else ()

    def _begin(self, forward: Forward) -> None:
        self._called, self._next_names = self._next_names, ()
        self.names = self._called if len(self._called) == forward.batch else ()
        self.run, self.rows, self.marks = forward.run, [Row() for _ in range(forward.batch)], []
        self._held = list(self.rows)
        self._in_prompt, self._latest_step = False, None

    def _take_prompt(self, forward: Forward) -> None:
        if not self._in_prompt or forward.past != self._end:
            self._ttft_ms = self._itl_ms = None  # those of the prompt before say nothing of this one
            self._intervals.clear()
            self._fresh = []
            self.marks.append(Mark(forward.past, "prompt"))
            self._prompt_began, self._in_prompt = forward.at_s, True
            for row in self.rows:
                row.completion, row.done = 0, False
        self._latest_step = None

    def _take_step(self, forward: Forward) -> None:
        if self._in_prompt or not self.marks:
            self.marks.append(Mark(forward.past, "answer"))
            self._in_prompt = False
            self._intervals.clear()
            if self._prompt_began is not None:
                self._ttft_ms = (forward.at_s - self._prompt_began) * 1e3
        if all(row.done for row in self.rows):  # nobody decodes on after the end: it is text that is fed step by step
            for row in self.rows:
                row.done = False
        self._going = sum(not row.done for row in self.rows)
        if self._latest_step is not None and forward.past == self._end:
            self._intervals.append(forward.at_s - self._latest_step)
            self._fresh.append(self._intervals[-1])
        self._latest_step = forward.at_s

    def _add_ids(self, forward: Forward) -> None:
        ids = None if forward.ids is None else forward.ids.numpy()
        real = None if forward.mask is None else forward.mask.numpy()
        for index, row in enumerate(self._held):
            row.ids += [UNKNOWN] * (forward.past - len(row.ids))
            new = [UNKNOWN] * forward.count if ids is None else ids[index].tolist()
            if real is not None and forward.past == 0:
                row.padding = int(real[index].argmax()) if real[index].any() else forward.count
            elif real is not None:
                row.holes += int((real[index] == 0).sum())
                new = [token if there else UNKNOWN for token, there in zip(new, real[index], strict=True)]
            if not forward.prompt and not row.done:
                row.completion += len(new)
                row.done = any(token in self._ends for token in new)
            row.ids += new

    def sequences(self) -> list[SequenceFrame]:
        """Progress of each sequence."""
        return [
            SequenceFrame(row.padding, max(0, len(row.ids) - row.padding - row.holes), row.completion, row.done)
            for row in self.rows
        ]

    def speed(self) -> Speed:
        """Figures since the last time this was asked, where they are of a stretch."""
        if self._fresh:
            self._itl_ms = sum(self._fresh) / len(self._fresh) * 1e3
            self._fresh = []
        spent = sum(self._intervals)
        tok_s = self._going * len(self._intervals) / spent if spent > 0 else None
        return Speed(tok_s, self._itl_ms, self._ttft_ms)

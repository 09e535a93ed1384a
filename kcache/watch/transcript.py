"""The text of the context, token by token, as a viewer holds it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from kcache.errors import FormatError
from kcache.watch.codec import Message
from kcache.watch.columns import whole

if TYPE_CHECKING:
    from kcache.watch.tokens import Tokens

Part = tuple[int, int, list[str]]

MOST_PIECES = 4096
"""Tokens whose text one message carries at most."""
_MOST_SEQUENCES = 2**16


class Transcript:
    """Text of each token of each sequence of one run, and what its sequences and those of the run before are called.

    What comes begins where the viewer's text ends, or before that, where the cache was cut back.
    """

    def __init__(self) -> None:
        self._run = 0
        self._rows: dict[int, list[str]] = {}
        self._names: dict[int, tuple[str, ...]] = {}

    def apply(self, message: Message) -> None:
        """Take in a text message; see :func:`text_message`.

        Raises
        ------
        FormatError
            If it is malformed, or leaves a gap.
        """
        run, parts = whole(message, "run"), message.get("parts")
        if not isinstance(parts, list):
            raise FormatError("parts: a list was expected")
        if run != self._run:
            self._names = {at: called for at, called in self._names.items() if at == self._run}
            self._run, self._rows = run, {}
        names = message.get("names")  # which older writers do not send
        if isinstance(names, list):
            if len(names) > _MOST_SEQUENCES or not all(isinstance(name, str) for name in names):
                raise FormatError("names: a list of texts was expected")
            self._names[run] = tuple(names)
        for part in parts:
            if not isinstance(part, list) or len(part) != 3:
                raise FormatError("parts: a sequence, a position and pieces were expected")
            self._replace(whole({"sequence": part[0]}, "sequence"), whole({"start": part[1]}, "start"), part[2])

    def _replace(self, sequence: int, start: int, pieces: object) -> None:
        """Let the text of a sequence from ``start`` on be ``pieces``."""
        if not isinstance(pieces, list) or not all(isinstance(piece, str) for piece in pieces):
            raise FormatError("pieces: a list of texts was expected")
        if sequence >= _MOST_SEQUENCES or start > len(self._rows.get(sequence, ())):
            raise FormatError(f"text of sequence {sequence} from token {start} on: what comes before is missing")
        row = self._rows.setdefault(sequence, [])
        del row[start:]
        row += pieces

    def pieces(self, run: int, start: int, end: int, sequence: int = 0) -> list[str]:
        """Text of the tokens ``start:end``, one string each; empty where none is known."""
        row = self._rows.get(sequence, []) if run == self._run else []
        start, end = max(0, start), max(0, end)
        found = row[start:end]
        return found + [""] * (max(0, end - start) - len(found))

    def names(self, run: int) -> tuple[str, ...]:
        """What the sequences of a run are called; empty where they have no names, or are long gone. Untrusted text.

        The last frame of a run is still looked at when the next one has begun.
        """
        return self._names.get(run, ())


class TextCursor:
    """How much of the text one reader has been told."""

    def __init__(self) -> None:
        self._run = 0
        self._told: list[int] = []

    def crop(self, length: int) -> None:
        """The cache was cut back to ``length`` tokens; what comes after is new."""
        self._told = [min(told, length) for told in self._told]

    def next(self, tokens: Tokens) -> Message | None:
        """The next message for this reader: at most :data:`MOST_PIECES` tokens; None when it knows all."""
        names: tuple[str, ...] = ()
        if tokens.run != self._run or len(tokens.rows) != len(self._told):
            self._run, self._told, names = tokens.run, [0] * len(tokens.rows), tokens.names
        parts: list[Part] = []
        room = MOST_PIECES
        for sequence, row in enumerate(tokens.rows):
            told = self._told[sequence]
            if told == len(row.pieces):
                row.read(tokens.pieces, room)
            pieces = row.pieces[told : told + room]
            if pieces:
                parts.append((sequence, told, pieces))
                self._told[sequence] += len(pieces)
                room -= len(pieces)
            if room <= 0:
                break
        return text_message(self._run, parts, names) if parts or names else None


def text_message(run: int, parts: list[Part], names: Sequence[str] = ()) -> Message:
    """What :meth:`Transcript.apply` takes in: for each sequence the text of its tokens from a position on.

    And, with the first one of a run, what its sequences are called, where they have names.
    """
    named = {"names": list(names)} if names else {}
    return {"kind": "text", "run": run, "parts": [list(part) for part in parts], **named}

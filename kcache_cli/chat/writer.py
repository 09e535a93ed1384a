"""Printing an answer piece by piece, as it comes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable

from kcache_cli.text import printable

_FENCE = "```"


class AnswerWriter:
    """Puts the pieces of one answer on standard output: as they are, or at a terminal word by word.

    Attributes
    ----------
    has_begun : bool
        Whether there was a piece.
    """

    def __init__(self) -> None:
        self._folding = Folding(lambda: shutil.get_terminal_size().columns) if sys.stdout.isatty() else None
        self.has_begun = self._ended = False

    def write(self, piece: str) -> None:
        """Print a piece; of a word that a terminal may have no room for, only once it is whole."""
        self.has_begun = True
        if piece:
            self._ended = piece.endswith("\n")
        text = printable(piece)
        self._put(text if self._folding is None else self._folding.fold(text))

    def end(self) -> None:
        """Print what is held back, and end the line."""
        rest = "" if self._folding is None else self._folding.rest()
        self._put(rest if self._ended else rest + "\n")

    def _put(self, text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()


class Folding:
    """Ends a line at the space before the word that has no room on it.

    What is longer than a line, has no spaces (as Chinese) or stands between lines that begin with three backticks is
    broken by the terminal, which joins it again when it is copied.

    Parameters
    ----------
    width : callable
        How wide the terminal is now.
    """

    def __init__(self, width: Callable[[], int]) -> None:
        from rich.cells import cell_len

        self._width, self._cells = width, cell_len
        self._column = 0
        self._gap = self._word = ""  # what is held back
        self._is_code = False

    def fold(self, piece: str) -> str:
        """What there is to print after another piece."""
        return "".join(map(self._next, piece))

    def rest(self) -> str:
        """What has been held back."""
        gap, word = self._gap, self._word
        self._gap = self._word = ""
        width = self._width()
        if not self._column and word.startswith(_FENCE) and word.count(_FENCE) % 2:
            self._is_code = not self._is_code
        start = len((" " * self._column + gap).expandtabs())
        if gap and self._column and start + self._cells(word) > width and not self._is_code:
            gap, self._column = "", 0
            shown = f"\n{word}" if word else ""
        else:
            shown = gap + word
        for character in gap + word:
            self._advance(character, width)
        return shown

    def _advance(self, character: str, width: int) -> None:
        """Go where the terminal is after a character: on its next line, if there is no room on this one."""
        if character == "\t":
            self._column = min(width, self._column // 8 * 8 + 8)
        else:
            cells = self._cells(character)
            self._column = self._column + cells if self._column + cells <= width else cells

    def _next(self, character: str) -> str:
        if character == "\n":
            rest = self.rest()
            self._column = 0
            return rest + "\n"
        if character in " \t":
            rest = self.rest() if self._word else ""
            self._gap += character
            return rest
        is_whole = self._cells(character) > 1 or self._cells(self._word) >= self._width()
        rest = self.rest() if self._word and is_whole else ""
        self._word += character
        return rest

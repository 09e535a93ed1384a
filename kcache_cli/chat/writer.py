"""Printing an answer piece by piece, as it comes."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable

from kcache_cli.text import printable


def answer_writer() -> Callable[[str], None]:
    """What to call with the pieces of one answer, to have them on standard output at once."""
    fold = Folding(shutil.get_terminal_size().columns).fold if sys.stdout.isatty() else str

    def write(piece: str) -> None:
        sys.stdout.write(fold(printable(piece)))
        sys.stdout.flush()

    return write


class Folding:
    """Ends a line at the space that would else begin the terminal's next one.

    Words that are longer than what is left of a line are broken by the terminal, which joins them again when copied.
    """

    def __init__(self, width: int) -> None:
        from rich.cells import cell_len

        self._width, self._cells = width, cell_len
        self._column = 0

    def fold(self, piece: str) -> str:
        """Return the piece with such spaces made line ends."""
        return "".join(map(self._next, piece))

    def _next(self, character: str) -> str:
        if character == " " and self._column >= self._width:
            character = "\n"
        if character == "\n":
            self._column = 0
        elif character == "\t":
            self._column = min(self._width, self._column // 8 * 8 + 8)
        else:
            cells = self._cells(character)
            fits = self._column + cells <= self._width
            self._column = self._column + cells if fits else cells
        return character

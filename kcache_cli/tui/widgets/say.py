"""Where the user writes to the model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual.binding import Binding, BindingType
from textual.events import Key, Paste
from textual.widgets import Input

from kcache_cli.text import printable

_JOINERS = ("\u200c", "\u200d")


class Say(Input):
    """A line of text, of which pasted text becomes part as a whole, with earlier ones above it.

    Parameters
    ----------
    draft : str
        What has been written of it.
    earlier : sequence of str
        What was written before, the latest last; it may grow.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "recall(-1)", "earlier", show=False),
        Binding("down", "recall(1)", "later", show=False),
    ]

    def __init__(self, draft: str = "", earlier: Sequence[str] = (), *, placeholder: str = "", id: str = "say") -> None:
        super().__init__(draft, placeholder=placeholder, select_on_focus=False, id=id)
        self._earlier = earlier
        self._found: list[str] = []  # what begins as what was written does, and at the end that itself
        self._at = 0

    def on_key(self, event: Key) -> None:
        """Take what joins letters of Persian or Hindi, and emoji, or keeps them apart: an input drops it unseen."""
        if event.character in _JOINERS:
            self.insert_text_at_cursor(event.character)
            event.stop()

    def on_paste(self, event: Paste) -> None:
        """Make one line of it; an input takes the first alone."""
        event.text = _in_one_line(event.text)

    def action_recall(self, by: int) -> None:
        """What was written before that begins like this, or after it; in the end what is being written."""
        if self._at >= len(self._found) - 1 or self.value != self._found[self._at]:
            lines = dict.fromkeys(map(_in_one_line, reversed(self._earlier)))  # each once, the latest first
            found = [line for line in lines if line.startswith(self.value) and line != self.value]
            self._found = [*reversed(found), self.value]
            self._at = len(found)
        self._at = min(max(self._at + by, 0), len(self._found) - 1)
        self.value = self._found[self._at]
        self.cursor_position = len(self.value)


def _in_one_line(text: str) -> str:
    return " ".join(filter(None, map(str.strip, printable(text).splitlines())))

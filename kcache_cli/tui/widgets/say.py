"""Where the user writes to the model."""

from __future__ import annotations

from textual.events import Paste
from textual.widgets import Input


class Say(Input):
    """A line of text, of which pasted text becomes part as a whole."""

    def on_paste(self, event: Paste) -> None:
        """Make one line of it; an input takes the first alone."""
        event.text = " ".join(filter(None, map(str.strip, event.text.splitlines())))

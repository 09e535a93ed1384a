"""A terminal's keys, which come to an end when the terminal is somebody else's."""

from __future__ import annotations

from prompt_toolkit.input.vt100 import Vt100Input
from prompt_toolkit.key_binding import KeyPress

from kcache_cli.terminal import in_foreground


class Keyboard(Vt100Input):
    """Closes itself when a read gives nothing because another has the terminal and what started us is gone.

    Such reads fail while keys are waiting, and prompt_toolkit would try again for ever.
    """

    def read_keys(self) -> list[KeyPress]:
        """The keys that were pressed."""
        keys = super().read_keys()
        if not keys and not in_foreground(self.fileno()):
            self.stdin_reader.closed = True
        return keys

"""A conversation in the dashboard's own process, as the dashboard sees it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from rich.text import Text

from kcache_cli.tui.look import Look

if TYPE_CHECKING:
    from textual.app import App


class Talk(Protocol):
    """Takes what the user writes; the engine runs in a thread of its own."""

    @property
    def earlier(self) -> Sequence[str]:
        """What the user has written, the latest last; it grows."""

    def begin(self, app: App) -> None:
        """The dashboard is there: post it a :class:`~kcache_cli.tui.conversation.Said` when there is something new."""

    def say(self, text: str) -> None:
        """Send a message, or a slash command; returns at once."""

    def stop(self) -> bool:
        """Stop the reply; whether there was one."""

    def close(self) -> None:
        """Stop the reply, and be done."""

    def text(self, look: Look) -> Text:
        """Everything that was said so far, styled."""

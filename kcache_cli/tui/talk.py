"""A conversation in the dashboard's own process, as the dashboard sees it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from textual.app import App


class Talk(Protocol):
    """Takes what the user writes; the engine runs in a thread of its own."""

    def begin(self, app: App) -> None:
        """The dashboard is there; what is said goes to its text panel."""

    def say(self, text: str) -> None:
        """Send a message, or a slash command; returns at once."""

    def stop(self) -> bool:
        """Stop the reply; whether there was one."""

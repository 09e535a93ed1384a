"""The time the dashboard goes by, so that tests can turn it themselves."""

from __future__ import annotations

import threading
import time
from typing import Protocol


class Clock(Protocol):
    """Tells the time and waits."""

    def now(self) -> float:
        """Seconds, from anywhere."""

    def wait(self, bell: threading.Event, seconds: float) -> None:
        """Wait until the bell rings or ``seconds`` have passed."""


class SystemClock:
    """The real one."""

    def now(self) -> float:
        """See :class:`Clock`."""
        return time.monotonic()

    def wait(self, bell: threading.Event, seconds: float) -> None:
        """See :class:`Clock`."""
        bell.wait(seconds)

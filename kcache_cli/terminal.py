"""The keys of the terminal that something is drawn on: kept out of the drawing, for whoever reads them next."""

from __future__ import annotations

import os
import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

try:
    import termios
except ImportError:  # no such thing on this platform
    termios = None  # type: ignore[assignment]

from kcache_cli.text import printable

_KEY = re.compile("\x1b(?:\\[[0-?]*[ -/]*[@-~]|O.|.)?", re.DOTALL)
"""What a terminal sends for a key that writes nothing."""


def in_foreground(terminal: int) -> bool:
    """Whether a terminal listens to us; one that controls no processes does."""
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return True


@contextmanager
def hushed(stream: Any) -> Iterator[None]:
    """Have keys that are pressed meanwhile, Ctrl-C among them, not echoed; they are read at the next prompt.

    Parameters
    ----------
    stream : file or None
        Leads to the terminal; where it does not, nothing is done.
    """
    terminal = _descriptor(stream)
    if terminal is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before: list[Any] | None = None

    def hush(number: int = 0, frame: FrameType | None = None) -> None:
        nonlocal before
        if not in_foreground(terminal):  # in the background the terminal is somebody else's
            return
        with suppress(termios.error):  # the terminal has been taken away
            now = termios.tcgetattr(terminal)
            if now[3] & termios.ECHO:
                before = list(now)
                now[3] &= ~termios.ECHO
                termios.tcsetattr(terminal, termios.TCSADRAIN, now)

    hush()
    if before is None and in_foreground(terminal):  # it is hushed already, by somebody who sees to it
        yield
        return
    resumed = signal.signal(signal.SIGCONT, hush)  # a shell sets its terminal as it likes while we are stopped
    try:
        yield
    finally:
        signal.signal(signal.SIGCONT, resumed)
        if before is not None and in_foreground(terminal):
            with suppress(termios.error):
                termios.tcsetattr(terminal, termios.TCSADRAIN, before)


def typed_ahead(stream: Any) -> str:
    """Take what was typed at a terminal and read by nobody yet, the line that has not ended with it.

    Parameters
    ----------
    stream : file or None
        Leads to the terminal; where it does not, nothing is taken.
    """
    terminal = _descriptor(stream)
    if terminal is None or not in_foreground(terminal):
        return ""
    found = b""
    with suppress(termios.error, OSError):  # the terminal has been taken away
        before = termios.tcgetattr(terminal)
        at_once = termios.tcgetattr(terminal)
        at_once[3] &= ~(termios.ICANON | termios.ECHO)
        at_once[6][termios.VMIN] = at_once[6][termios.VTIME] = 0
        termios.tcsetattr(terminal, termios.TCSANOW, at_once)
        try:
            while part := os.read(terminal, 4096):
                found += part
        finally:
            termios.tcsetattr(terminal, termios.TCSANOW, before)
    return printable(_KEY.sub("", found.decode("utf-8", "replace").replace("\r", "\n")))


def _descriptor(stream: Any) -> int | None:
    """The number of the terminal that a file is, if it is one and this platform lets us change it."""
    if termios is None:
        return None
    try:
        return stream.fileno() if stream is not None and stream.isatty() else None
    except (OSError, ValueError):  # it has none
        return None

"""SIGTERM and SIGHUP end a command as Ctrl-C does: what is open is closed, what can go on later says so.

Where neither is heard by anybody else, that is: ``nohup`` and programs that use the command line as a library keep
what they have set.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from textual.app import App

Result = TypeVar("Result")
Handler = Callable[[int, FrameType | None], None]
_Handlers = dict[int, Callable[[int, FrameType | None], Any] | int]
SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_SAME_S = 1.0
"""A signal that comes so soon after another is the same one: ``timeout`` and shells send it to us and to our group."""


class Ended(KeyboardInterrupt):
    """A signal asked the process to end; nobody goes on after it."""


@contextmanager
def heard(signals: tuple[int, ...] = SIGNALS, *, to_the_end: bool = False) -> Iterator[list[int]]:
    """Raise :class:`Ended` in the body when a signal comes; yields the signals that have come.

    Another one, in case what ends takes too long, raises once more. Where the process lasts ``to_the_end`` of the
    body only, they are ignored after it if one has come: the same one may come again while the interpreter ends, and
    would take its exit code.
    """
    came: list[int] = []
    latest_s = -_SAME_S

    def end(number: int, frame: FrameType | None) -> None:
        nonlocal latest_s
        before_s, latest_s = latest_s, time.monotonic()
        came.append(number)
        if latest_s - before_s >= _SAME_S:
            raise Ended

    with _handling(end, signals, signal.SIG_DFL) as after:
        try:
            yield came
        finally:
            if came and to_the_end:
                after.update(dict.fromkeys(after, signal.SIG_IGN))


def show(app: App[Result]) -> Result | None:
    """Run an app at the terminal; a signal closes it, which gives the terminal back, before it does what it does."""
    with closed_first(app.exit):
        return app.run()
    return None


@contextmanager
def closed_first(close: Callable[[], None]) -> Iterator[None]:
    """Have a signal ``close`` what the event loop of the body runs, and do what it does when the body is left.

    An exception in the middle of what some loop does would leave the terminal in any state.
    """
    import asyncio

    came: list[int] = []

    def hear(number: int, frame: FrameType | None) -> None:
        came.append(number)
        try:
            asyncio.get_running_loop().call_soon_threadsafe(close)  # which wakes a loop that sleeps
        except RuntimeError:  # it does not run yet, or no more
            raise Ended from None

    with _handling(hear, SIGNALS):
        try:
            yield
        except BaseException:
            if not came:  # else it is how the body was left, or the terminal is gone
                raise
    if came:
        signal.raise_signal(came[0])  # as if it came now


@contextmanager
def kept() -> Iterator[None]:
    """Take no notice of the handlers that somebody else sets in the body.

    One that has left the body with ``sys.exit`` has done so for SIGTERM, which then comes as if there had been none.
    """
    left = False
    with _handling(None, SIGNALS):
        try:
            yield
        except SystemExit:
            left = True
    if left:
        signal.raise_signal(signal.SIGTERM)


@contextmanager
def _handling(handle: Handler | None, signals: tuple[int, ...], instead_of: object = None) -> Iterator[_Handlers]:
    """Handle signals in the body, as far as this thread may, or leave that to the body; yields how after it: as before.

    Never those that are ignored; only those handled by ``instead_of``, if that is given.
    """
    before: _Handlers = {}
    if threading.current_thread() is threading.main_thread():
        now = {number: signal.getsignal(number) for number in signals}
        before = {number: known for number, known in now.items() if known is not signal.SIG_IGN and known is not None}
        if instead_of is not None:
            before = {number: known for number, known in before.items() if known == instead_of}
    for number in before if handle is not None else ():
        signal.signal(number, handle)
    try:
        yield before
    finally:
        for number, known in before.items():
            signal.signal(number, known)

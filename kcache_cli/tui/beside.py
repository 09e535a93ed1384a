"""Work and its dashboard in one process: the work in a thread, the dashboard at the terminal."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from kcache_cli.ending import show

if TYPE_CHECKING:
    from kcache import TokenEvent
    from kcache_cli.batch.progress import Watch
    from kcache_cli.tui.app import Dashboard

_LOOK_S = 0.2


class Beside:
    """A batch job behind a dashboard.

    Leaving the dashboard leaves the job running, with its plain progress bar; Ctrl-C stops the job, from either.

    Parameters
    ----------
    meter : Watch
        Counts the job's tokens.
    progress : callable
        Draws the meter once the dashboard is gone; yields what is told of the job then.
    """

    def __init__(self, meter: Watch, progress: Callable[[], AbstractContextManager[Watch]]) -> None:
        self._watch = meter
        self._progress = progress
        self._stopping = False
        self._failed: BaseException | None = None
        self._interrupted: KeyboardInterrupt | None = None
        self._ended = threading.Event()
        self._ended.set()

    def begin(self, names: Sequence[str]) -> None:
        """Take in that a batch begins, in the job's thread."""
        self._watch.begin(names)

    def count(self, event: TokenEvent, tokens: int = 1) -> None:
        """Take in tokens, in the job's thread.

        Raises
        ------
        KeyboardInterrupt
            If the user has stopped the job.
        """
        self._check()
        self._watch.count(event, tokens)

    def read(self, done: int, total: int) -> None:
        """Take in how far the prompts have been read, in the job's thread; stops like :meth:`count`."""
        self._check()
        self._watch.read(done, total)

    def _check(self) -> None:
        if self._stopping:
            raise KeyboardInterrupt

    def stop(self) -> bool:
        """Stop the job at its next token, or after a piece of a prompt; whether it is running."""
        self._stopping = True
        return not self._ended.is_set()

    def run(self, work: Callable[[], None], make: Callable[[Callable[[], bool]], Dashboard]) -> None:
        """Run the work; returns when it is done and the dashboard is gone.

        Parameters
        ----------
        work : callable
        make : callable
            Makes the dashboard, given what stops the work.
        """
        dashboard = make(self.stop)
        self._ended.clear()
        thread = threading.Thread(target=self._work, args=(work, dashboard), name="kcache-engine", daemon=True)
        thread.start()
        try:
            show(dashboard)
        except KeyboardInterrupt as error:  # the whole process shall end
            self._interrupted, self._stopping = error, True
            self._wait()
        if not self._ended.is_set():
            with self._progress() as self._watch:
                self._wait()
        thread.join()
        if isinstance(self._failed, KeyboardInterrupt) and self._interrupted is not None:
            raise self._interrupted
        if self._failed is not None:
            raise self._failed

    def _work(self, work: Callable[[], None], dashboard: Dashboard) -> None:
        try:
            work()
        except BaseException as error:  # raised again where the command waits
            self._failed = error
        self._ended.set()
        dashboard.work_ended(self._failed)

    def _wait(self) -> None:
        """Wait for the work, not its thread: until Python 3.13 one whose ``join`` is interrupted counts as ended."""
        while not self._ended.is_set():
            try:
                self._ended.wait(_LOOK_S)
            except KeyboardInterrupt as error:
                self._interrupted, self._stopping = error, True

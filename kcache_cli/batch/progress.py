"""How far a batch job is, on standard error: prompts done, tokens per second, time left.

A bar at a terminal; in a log, a line now and then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

from kcache_cli.console import console
from kcache_cli.exits import note
from kcache_cli.terminal import hushed

if TYPE_CHECKING:
    from kcache import TokenEvent
    from kcache.watch.publication import Publication

_LINE_S = 10.0
"""Seconds between two lines of a log."""


class Watch(Protocol):
    """Takes in what a job has read and written, as it comes."""

    def begin(self, names: Sequence[str]) -> None:
        """Take in that a batch begins, of the prompts with these ids."""

    def count(self, event: TokenEvent, tokens: int = 1) -> None:
        """Take in the latest token of a prompt, or its latest ``tokens``."""

    def read(self, done: int, total: int) -> None:
        """Take in how many tokens of a batch's prompts have been read, and of how many."""


class Meter:
    """Counts what has been generated, and in which time.

    Work is measured in tokens that may still come: a prompt that ends early gives the rest of its share at once.
    Reading goes at a speed of its own, by the ``prompt_tokens`` that are still to be read.
    """

    def __init__(
        self,
        total: int,
        done: int,
        max_tokens: int,
        prompt_tokens: int = 0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.total, self.done, self.max_tokens, self.prompt_tokens = total, done, max_tokens, prompt_tokens
        self.tokens = self.cut = 0
        self.reading: tuple[int, int] | None = None
        self.units = self._units_before = done * max_tokens
        self._clock, self._began = clock, clock()
        self._read, self._reading_s, self._latest = 0, 0.0, self._began

    def begin(self, names: Sequence[str]) -> None:
        """See :class:`Watch`: nothing is counted yet."""

    def count(self, event: TokenEvent, tokens: int = 1) -> None:
        """Take in the latest token of a prompt, or its latest ``tokens``."""
        if self.reading is not None:
            self._read += self.reading[1]
            self._reading_s += self._clock() - self._latest
            self.reading = None
        self._latest = self._clock()
        self.tokens += tokens
        self.units += tokens
        if event.finish_reason is not None:
            self.done += 1
            self.cut += event.finish_reason == "length"
            self.units += self.max_tokens - event.completion_tokens

    def read(self, done: int, total: int) -> None:
        """Take in how many tokens of a batch's prompts have been read, and of how many."""
        self.reading = done, total

    @property
    def elapsed_s(self) -> float:
        """Seconds from when counting began to the last token of the last prompt, or until now."""
        return (self._latest if 0 < self.total <= self.done else self._clock()) - self._began

    @property
    def tok_s(self) -> float:
        """Tokens per second since counting began, the time in which prompts were read with it."""
        return self.tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds until all is done, should it go on like this; None as long as nothing has come."""
        made = self.units - self._units_before
        if not made:
            return None
        read, reading_s = self._read, self._reading_s
        if self.reading is not None:
            read, reading_s = read + self.reading[0], reading_s + self._clock() - self._latest
        left_s = (self.elapsed_s - reading_s) * (self.total * self.max_tokens - self.units) / made
        return left_s + (reading_s * max(0, self.prompt_tokens - read) / read if read else 0.0)


@contextmanager
def progress_bar(meter: Meter) -> Iterator[Watch]:
    """Show the meter while the body runs: a bar at a terminal, else lines; yields what is told of the job."""
    if not sys.stderr.isatty():
        yield Told(meter, _Lines(meter).show)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    bars = Progress(
        BarColumn(bar_width=None),
        TextColumn("{task.description}", markup=False),
        TimeElapsedColumn(),
        console=console(),
        expand=True,
    )
    with hushed(sys.stderr), bars:
        task = bars.add_task(_state(meter), total=meter.total * meter.max_tokens, completed=meter.units)
        yield Told(meter, lambda: bars.update(task, completed=meter.units, description=_state(meter)))


def _state(meter: Meter) -> str:
    """How far the job is, what it is doing, and how long it may take."""
    doing = f"job average {meter.tok_s:.1f} tok/s"
    if meter.reading is not None:
        done, total = meter.reading
        doing = f"read {done:,} of {total:,} tokens"
    left = f" · about {_span(meter.left_s)} left" if meter.left_s else ""
    return f"{meter.done:,}/{meter.total:,} prompts · {doing}{left}"


class Told:
    """Passes on what it is told, and has that shown."""

    def __init__(self, watch: Watch, show: Callable[[], None]) -> None:
        self._watch, self._show = watch, show

    def begin(self, names: Sequence[str]) -> None:
        """See :class:`Watch`."""
        self._watch.begin(names)

    def count(self, event: TokenEvent, tokens: int = 1) -> None:
        """See :class:`Watch`."""
        self._watch.count(event, tokens)
        self._show()

    def read(self, done: int, total: int) -> None:
        """See :class:`Watch`."""
        self._watch.read(done, total)
        self._show()


class Published(Told):
    """Passes on what it is told, and has viewers see how far the job is and whose sequences they look at."""

    def __init__(self, watch: Watch, publication: Publication, meter: Meter) -> None:
        super().__init__(watch, lambda: publication.job(meter.done, meter.total))
        self._publication = publication

    def begin(self, names: Sequence[str]) -> None:
        """See :class:`Watch`."""
        self._publication.name(names)
        super().begin(names)


class _Lines:
    """Shows the meter as a line, each time some seconds have passed."""

    def __init__(self, meter: Meter) -> None:
        self._meter, self._next_s = meter, _LINE_S

    def show(self) -> None:
        """Print it, if it is time."""
        meter = self._meter
        if meter.elapsed_s < self._next_s:
            return
        self._next_s = meter.elapsed_s + _LINE_S
        note(_state(meter))


def _span(seconds: float) -> str:
    """A time for people: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

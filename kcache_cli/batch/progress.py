"""How far a batch job is, on standard error: prompts done, tokens per second, time left.

A bar at a terminal; in a log, a line now and then.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from kcache_cli.console import console
from kcache_cli.exits import note

if TYPE_CHECKING:
    from kcache import TokenEvent

_LINE_S = 10.0
"""Seconds between two lines of a log."""


class Watch(Protocol):
    """Takes in new tokens as they come."""

    def __call__(self, event: TokenEvent, tokens: int = 1) -> None:
        """Take in the latest token of a prompt, or its latest ``tokens``."""


class Meter:
    """Counts what has been generated, and in which time.

    Work is measured in tokens that may still come: a prompt that ends early gives the rest of its share at once.
    """

    def __init__(self, total: int, done: int, max_tokens: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.total, self.done, self.max_tokens = total, done, max_tokens
        self.tokens = 0
        self.units = self._units_before = done * max_tokens
        self._clock, self._began = clock, clock()

    def count(self, event: TokenEvent, tokens: int = 1) -> None:
        """Take in the latest token of a prompt, or its latest ``tokens``."""
        self.tokens += tokens
        self.units += tokens
        if event.finish_reason is not None:
            self.done += 1
            self.units += self.max_tokens - event.completion_tokens

    @property
    def elapsed_s(self) -> float:
        """Seconds since counting began."""
        return self._clock() - self._began

    @property
    def tok_s(self) -> float:
        """Tokens per second over all prompts."""
        return self.tokens / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds until all is done, should it go on like this; None as long as nothing has come."""
        made = self.units - self._units_before
        return self.elapsed_s * (self.total * self.max_tokens - self.units) / made if made else None


@contextmanager
def progress_bar(meter: Meter) -> Iterator[Watch]:
    """Show the meter while the body runs: a bar at a terminal, else lines; yields what to call per token."""
    if not sys.stderr.isatty():
        yield _Lines(meter)
        return
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    bars = Progress(
        TextColumn("generating", markup=False),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[prompts]} · {task.fields[rate]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("ETA", markup=False),
        TimeRemainingColumn(),
        console=console(),
        expand=True,
        speed_estimate_period=120,
    )
    with bars:
        task = bars.add_task("", total=meter.total * meter.max_tokens, completed=meter.units, **_fields(meter))

        def count(event: TokenEvent, tokens: int = 1) -> None:
            meter.count(event, tokens)
            bars.update(task, completed=meter.units, **_fields(meter))

        yield count


def _fields(meter: Meter) -> dict[str, Any]:
    return {"prompts": f"{meter.done:,}/{meter.total:,} prompts", "rate": f"{meter.tok_s:.1f} tok/s"}


class _Lines:
    """A line each time some seconds have passed."""

    def __init__(self, meter: Meter) -> None:
        self._meter, self._next_s = meter, _LINE_S

    def __call__(self, event: TokenEvent, tokens: int = 1) -> None:
        meter = self._meter
        meter.count(event, tokens)
        if meter.elapsed_s < self._next_s:
            return
        self._next_s = meter.elapsed_s + _LINE_S
        fields, left_s = _fields(meter), meter.left_s
        left = "" if not left_s else f" · about {_span(left_s)} left"
        note(f"{fields['prompts']} · {fields['rate']}{left}")


def _span(seconds: float) -> str:
    """A time for people: ``40 s``, ``12 min``, ``3.5 h``."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"

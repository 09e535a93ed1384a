"""The progress bar of a batch job, on standard error: prompts done, tokens per second, time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

from kcache_cli.console import console

if TYPE_CHECKING:
    from kcache import TokenEvent


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
        self.units = done * max_tokens
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


@contextmanager
def progress_bar(meter: Meter) -> Iterator[Watch]:
    """Draw the meter while the body runs, where standard error is a terminal; yields what to call per token."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    if not sys.stderr.isatty():
        yield meter.count
        return
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

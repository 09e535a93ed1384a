"""Drawing at the terminal: what answers are printed with, and on standard error what is under way.

Status lines are there while something takes its time, and not at all when nobody watches.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kcache_cli.terminal import hushed
from kcache_cli.text import between_words, one_line, size

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kcache.models.progress import Progress


def console() -> Console:
    """A console on standard error that takes text as it is: no markup, no emoji names, no highlighting."""
    from rich.console import Console

    return Console(stderr=True, markup=False, emoji=False, highlight=False, soft_wrap=True)


def answers() -> Console:
    """A console on standard output that takes text as it is, too, and wraps it."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


def plain_table() -> Table:
    """A table without lines, under bold headings."""
    from rich.table import Table

    return Table(box=None, pad_edge=False, header_style="bold")


def put(console: Console, text: str, style: str | None = None) -> None:
    """Print text, at a terminal wrapped at words, but for indented lines: they are commands, to be copied whole."""
    width = console.width if console.is_terminal else None
    for line in text.split("\n"):
        console.print(line if line.startswith("  ") else between_words(line, width), style=style, soft_wrap=True)


def terminal_width() -> int | None:
    """Columns of the terminal that standard error is; None where it is none."""
    return console().width if sys.stderr.isatty() else None


@contextmanager
def working(label: str) -> Iterator[Callable[[str], None]]:
    """Show a spinner with the elapsed time for as long as the body runs, where standard error is a terminal.

    Yields what to call with another label; where there is no terminal, that one is a line.
    """
    from rich.progress import Progress as Bars
    from rich.progress import SpinnerColumn, TextColumn, TimeElapsedColumn

    if not sys.stderr.isatty():
        yield lambda label: print(f"kcache: {one_line(label)}", file=sys.stderr, flush=True)
        return
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with hushed(sys.stderr), Bars(*columns, console=console(), transient=True) as bars:
        task = bars.add_task(one_line(label), total=None)
        yield lambda label: bars.update(task, description=one_line(label), refresh=True)


@contextmanager
def download_bar(label: str) -> Iterator[Progress]:
    """Yield a progress callback ``(done_bytes, total_bytes, label)`` that draws a bar on standard error.

    Where standard error is not a terminal, each new label is one line instead.
    """
    from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as Bars

    if not sys.stderr.isatty():
        yield _Lines().report
        return
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    with hushed(sys.stderr), Bars(*columns, console=console(), transient=True) as bars:
        task = bars.add_task(one_line(label), total=None, amount="")

        def report(done_bytes: int, total_bytes: int, what: str) -> None:
            amount = f"{size(done_bytes)} of {size(total_bytes)}" if total_bytes else ""
            bars.update(
                task,
                completed=min(done_bytes, total_bytes - 1),  # the clock of a finished task stands still
                total=total_bytes or None,
                description=one_line(what or label),
                amount=amount,
            )

        yield report


class _Lines:
    """Progress for a log: a line when something new begins, with its size where that is known."""

    def __init__(self) -> None:
        self._label = ""
        self._lock = threading.Lock()

    def report(self, done_bytes: int, total_bytes: int, label: str) -> None:
        with self._lock:
            if label and label != self._label:
                self._label = label
                amount = f", {size(total_bytes)}" if total_bytes else ""
                print(f"kcache: {one_line(label)}{amount}", file=sys.stderr, flush=True)

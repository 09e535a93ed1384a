"""How far a measurement is, on standard error: a bar at a terminal, a line per case in a log."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kcache_cli.console import console
from kcache_cli.exits import note
from kcache_cli.terminal import hushed
from kcache_cli.text import one_line

if TYPE_CHECKING:
    from kcache.bench.run import Watch


@contextmanager
def steps_bar(total: int | None, verb: str, case_of: Callable[[str], str]) -> Iterator[Watch]:
    """Yield ``watch(label, done)``, which counts up to ``total`` while the body runs.

    Parameters
    ----------
    total : int or None
        None where it is not known beforehand.
    verb : str
        Begins the line a log gets.
    case_of : callable
        The part of a label whose change is worth a line in a log; empty for none.
    """
    if not sys.stderr.isatty():
        yield _Lines(verb, case_of)
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    bars = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=24),
        TimeElapsedColumn(),
        TextColumn("ETA", markup=False),
        TimeRemainingColumn(),
        console=console(),
        transient=True,
        speed_estimate_period=600,
    )
    with hushed(sys.stderr), bars:
        task = bars.add_task("", total=total)

        def watch(label: str, turns: int) -> None:
            bars.update(task, description=one_line(label), advance=turns)

        yield watch


class _Lines:
    """A line when another case begins."""

    def __init__(self, verb: str, case_of: Callable[[str], str]) -> None:
        self._verb, self._case_of = verb, case_of
        self._case = ""

    def __call__(self, label: str, turns: int) -> None:
        case = self._case_of(label)
        if case and case != self._case:
            self._case = case
            note(f"{self._verb} {case}")

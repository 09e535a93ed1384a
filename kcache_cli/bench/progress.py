"""How far a benchmark is, on standard error: a bar at a terminal, a line per case in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kcache_cli.console import console
from kcache_cli.exits import note

if TYPE_CHECKING:
    from kcache.bench.run import Watch


@contextmanager
def turns_bar(total: int) -> Iterator[Watch]:
    """Count turns up to ``total`` while the body runs."""
    if not sys.stderr.isatty():
        yield _Lines()
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
    with bars:
        task = bars.add_task("", total=total)

        def watch(label: str, turns: int) -> None:
            bars.update(task, description=label, advance=turns)

        yield watch


class _Lines:
    """A line when another case begins."""

    def __init__(self) -> None:
        self._case = ""

    def __call__(self, label: str, turns: int) -> None:
        case = label.rpartition(" · ")[0]
        if case and case != self._case:
            self._case = case
            note(f"timing {case}")

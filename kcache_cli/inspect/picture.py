"""Taking a picture of the dashboard: it runs without a terminal, as large as wanted, until it shows what it should."""

from __future__ import annotations

import asyncio
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kcache.errors import InputError, WatchError
from kcache_cli.inspect.choose import index_of
from kcache_cli.pictures.of_app import picture_of

if TYPE_CHECKING:
    from textual.pilot import Pilot

    from kcache.watch.source import Source
    from kcache_cli.tui.app import Dashboard

VIEWS = ("last", "history", "heads", "age")
_SMALLEST, _LARGEST = (40, 12), (400, 200)
_LIVE_S = 1.0
_PATIENCE_S = 30.0
_LOOK_S = 0.05


@dataclass(frozen=True)
class Wish:
    """What a picture shall show.

    Attributes
    ----------
    columns, lines : int
    at : int or None
        The decode step; the newest if None.
    view : str
        What the heat map shows, one of :data:`VIEWS`.
    run : int or None
        Which run the step is of; the latest that has it if None.
    """

    columns: int = 120
    lines: int = 40
    at: int | None = None
    view: str = "last"
    run: int | None = None


def parse_size(text: str) -> tuple[int, int]:
    """Read ``120x40``.

    Raises
    ------
    InputError
        If it is none, or no screen has that size.
    """
    found = re.fullmatch(r"(\d{1,5})[x×](\d{1,5})", text.strip())
    size = (int(found[1]), int(found[2])) if found else (0, 0)
    if not all(least <= given <= most for least, given, most in zip(_SMALLEST, size, _LARGEST, strict=True)):
        raise InputError(
            f"--size {text}: write columns x lines, as 120x40; from {_SMALLEST[0]}x{_SMALLEST[1]} to "
            f"{_LARGEST[0]}x{_LARGEST[1]}"
        )
    return size


def take(source: Source, wish: Wish, title: str) -> str:
    """A picture of a source, as SVG.

    Raises
    ------
    InputError
        If the step is not there.
    WatchError
        If there is no frame to show.
    """
    from kcache_cli.tui.start import dashboard

    index = index_of(source, wish.at, wish.run)
    app = dashboard(source)
    return asyncio.run(_pictured(app, source, wish, index, title))


async def _pictured(app: Dashboard, source: Source, wish: Wish, index: int | None, title: str) -> str:
    async with app.run_test(size=(wish.columns, wish.lines)) as pilot:
        if index is not None:
            app.feed.order(lambda head: head.seek(index))
            app.feed.order(lambda head: head.step(0))
        await _until_shown(app, pilot, source, index)
        for _ in range(VIEWS.index(wish.view)):
            app.action_mode(1)
        await pilot.pause(_LOOK_S)
        return picture_of(app, title)


async def _until_shown(app: Dashboard, pilot: Pilot[None], source: Source, index: int | None) -> None:
    """Wait for the frame; of a live run a moment longer, so that there is a stretch to show."""
    began = time.monotonic()
    while True:
        await pilot.pause(_LOOK_S)
        moment, waited = app.moment, time.monotonic() - began
        is_there = moment is not None and moment.frame is not None
        if moment is not None and is_there:
            is_it = moment.place.index == index if index is not None else waited >= _LIVE_S or not source.live
            if is_it:
                return
        if waited > _PATIENCE_S or (source.closed is not None and not is_there and not source.span()):
            raise WatchError(f"there is nothing to show: {source.closed or 'no step yet'}")

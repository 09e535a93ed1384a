"""``kcache inspect``: look at a run, live or recorded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kcache.errors import InputError

if TYPE_CHECKING:
    from kcache.watch.frame import Frame
    from kcache.watch.source import Source


def inspect(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="A recording (.kcr).", show_default="what runs now")
    ] = None,
    pid: Annotated[
        int | None, typer.Option("--pid", metavar="PID", help="Which process.", show_default="the newest")
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--connect",
            metavar="HOST:PORT",
            help="A process that publishes on TCP; its token goes into KCACHE_WATCH_TOKEN.",
        ),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print the state and exit.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="With --once: one JSON object.")] = False,
    export_csv: Annotated[
        str | None,
        typer.Option("--export-csv", metavar="FILE", help="Write a row per layer, of every recorded frame, and exit."),
    ] = None,
    report: Annotated[
        str | None,
        typer.Option("--report", metavar="FILE", help="Write the run as one page of HTML, to keep or send, and exit."),
    ] = None,
) -> None:
    """Look at a run: what is in which memory, what crosses the link, where attention looks.

    A full-screen dashboard, unless --once or --export-csv is given; ? lists its keys. Finds `kcache chat`, `generate`,
    `bench` and any program that calls kcache.telemetry.publish(), as long as they run as the same user; or replays
    what --record wrote. With nothing running it says so and exits with 1.

    Examples
    --------
      kcache inspect
      kcache inspect run.kcr
      kcache inspect --once
      kcache inspect --once --json
      kcache inspect run.kcr --once
      kcache inspect run.kcr --export-csv run.csv
      kcache inspect run.kcr --report run.html
    """
    from kcache_cli.inspect.choose import choose
    from kcache_cli.rows.store import check_file

    if as_json and not once:
        raise InputError("--json goes with --once")
    target, page = check_file("--export-csv", export_csv), check_file("--report", report)
    if not once and target is None and page is None and file is None and pid is None and address is None:
        pid = _ask()
    with contextlib.closing(choose(file, pid, address)) as source:
        if target is not None:
            _export(source, target)
        elif page is not None:
            _report(source, page, file)
        elif once:
            _print(source, as_json)
        else:
            from kcache_cli.tui.start import watch

            watch(source)


def _ask() -> int | None:
    """Which of several processes, where there is a terminal to ask at."""
    from kcache_cli.tui.start import has_terminal, pick

    return pick() if has_terminal() else None


def _print(source: Source, as_json: bool) -> None:
    from kcache_cli.inspect.values import state
    from kcache_cli.inspect.view import show
    from kcache_cli.text import json_line

    if as_json:
        print(json_line(state(source)))
    else:
        show(source)


def _export(source: Source, target: Path) -> None:
    """All frames of a recording; of a live run the newest."""
    from kcache_cli.exits import note, warn
    from kcache_cli.inspect.values import rows
    from kcache_cli.rows.formats import comma_separated
    from kcache_cli.rows.store import Store

    table = Store(target, "csv", comma_separated)
    newest = source.latest()
    found = [newest] if source.live and newest is not None else _frames(source)
    frames = 0
    for frame in found:
        table.rows += rows(frame)
        frames = frames + 1
    table.close()
    if source.closed is not None:
        warn(source.closed)
    note(f"{frames:,} frame{'' if frames == 1 else 's'} in {target}")


def _report(source: Source, target: Path, file: Path | None) -> None:
    """The page of a recording; of a live run what was seen of it."""
    from kcache_cli.exits import note, warn
    from kcache_cli.report.page import write

    write(source, target, "live" if file is None else file.name)
    if source.closed is not None:
        warn(source.closed)
    note(f"{len(source.span()):,} frames in {target}")


def _frames(source: Source) -> Iterator[Frame]:
    """The frames of a recording, up to where it can be read."""
    for index in source.span():
        try:
            yield source.frame(index)
        except IndexError:  # the source says now what is wrong
            return

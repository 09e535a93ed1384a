"""``kcache inspect``: look at a run, live or recorded."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from kcache.errors import InputError

if TYPE_CHECKING:
    from kcache.watch.source import Source

View = Literal["last", "history", "heads", "age"]
_picture = functools.partial(typer.Option, rich_help_panel="Pictures")


def inspect(
    file: Annotated[
        Path | None, typer.Argument(metavar="FILE", help="A recording (.kcr).", show_default="what runs now")
    ] = None,
    pid: Annotated[
        int | None,
        typer.Option("--pid", metavar="PID", help="Which process.", show_default="the newest; a dashboard asks"),
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
    web: Annotated[
        bool, typer.Option("--web", help="Serve the dashboard to a browser on this machine, until Ctrl-C.")
    ] = False,
    port: Annotated[
        int, typer.Option("--port", min=0, max=65535, help="With --web: where; 0 takes any free port.")
    ] = 8010,
    export_csv: Annotated[
        str | None,
        typer.Option("--export-csv", metavar="FILE", help="Write a row per layer, of every recorded frame, and exit."),
    ] = None,
    export_svg: Annotated[
        str | None, _picture("--export-svg", metavar="FILE", help="Write a picture of the dashboard and exit.")
    ] = None,
    export_png: Annotated[
        str | None, _picture("--export-png", metavar="FILE", help="The same as PNG.", show_default=False)
    ] = None,
    size: Annotated[
        str, _picture("--size", metavar="COLUMNSxLINES", help="Of the terminal in the picture.")
    ] = "120x40",
    at: Annotated[
        int | None,
        _picture("--at", metavar="STEP", min=0, help="Which decode step; with --once, too.", show_default="the newest"),
    ] = None,
    run: Annotated[
        int | None,
        _picture(
            "--run",
            metavar="NUMBER",
            min=1,
            help="Of which cache: a batch job makes one for every batch. With --once and --report, too.",
            show_default="the newest",
        ),
    ] = None,
    view: Annotated[
        View, _picture("--view", help="What the heat map shows: the last step, its history, one layer by head, age.")
    ] = "last",
    report: Annotated[
        str | None,
        typer.Option("--report", metavar="FILE", help="Write the run as one page of HTML, to keep or send, and exit."),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Let what is written take the place of a file that is there.")
    ] = False,
) -> None:
    """Look at a run: what is in which memory, what crosses the link, where attention looks.

    A full-screen dashboard, unless it shall print or write something; ? lists its keys. Finds `kcache chat`,
    `generate`, `bench`, `eval` and any program that calls kcache.publish(), as long as they run as the same
    user; or replays what --record wrote. With nothing running it says so and exits with 1.

    Examples
    --------
      kcache inspect
      kcache inspect run.kcr
      kcache inspect --web
      kcache inspect --once
      kcache inspect --once --json
      kcache inspect run.kcr --once --at 12
      kcache inspect job.kcr --once --run 3 --at 12
      kcache inspect run.kcr --export-csv run.csv
      kcache inspect run.kcr --export-png step.png --at 12 --view history
      kcache inspect run.kcr --report run.html
    """
    from kcache_cli.inspect.choose import choose
    from kcache_cli.inspect.files import Files
    from kcache_cli.inspect.picture import Wish, parse_size

    if as_json and not once:
        raise InputError("--json goes with --once")
    files = Files.check(export_csv, export_svg, export_png, report, overwrite)
    if once + web + bool(files) > 1:
        raise InputError("--once prints, --web serves until Ctrl-C, --export-* and --report write: choose one of them")
    if at is not None and not (once or files.pictures):
        raise InputError("--at goes with --once, --export-svg and --export-png")
    if run is not None and not (once or files.pictures or files.report):
        raise InputError("--run goes with --once, --export-svg, --export-png and --report")
    wish = Wish(*parse_size(size), at, view, run)
    if not once and not files and file is None and pid is None and address is None:
        pid = _ask()
    with contextlib.closing(choose(file, pid, address)) as source:
        if files:
            files.write(source, wish, "" if file is None else file.name)
        elif web:
            _serve(source, file, pid, address, port)
        elif once:
            _print(source, at, run, as_json)
        else:
            from kcache_cli.tui.start import watch

            watch(source)


def _ask() -> int | None:
    """Which of several processes, where there is a terminal to ask at."""
    from kcache_cli.tui.start import has_terminal, pick

    return pick() if has_terminal() else None


def _serve(source: Source, file: Path | None, pid: int | None, address: str | None, port: int) -> None:
    """Serve what could be opened just now; each window opens it for itself."""
    from kcache_cli.exits import note
    from kcache_cli.web.order import Order
    from kcache_cli.web.server import serve

    source.close()
    serve(Order.of(file, pid, address), port, lambda where: note(f"the dashboard is at {where}; Ctrl-C ends it"))


def _print(source: Source, at: int | None, run: int | None, as_json: bool) -> None:
    from kcache_cli.inspect.choose import index_of
    from kcache_cli.inspect.values import state
    from kcache_cli.inspect.view import show
    from kcache_cli.text import json_line

    index = index_of(source, at, run)
    frame = source.latest() if index is None else source.frame(index)
    if as_json:
        print(json_line(state(source, frame, index)))
    else:
        show(source, frame, index)

"""What commands that run a model share: letting others watch, and recording."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kcache.errors import InputError, WatchError

if TYPE_CHECKING:
    from kcache.watch.publication import Publication
    from kcache_cli.engine import Engine

_option = functools.partial(typer.Option, rich_help_panel="Watching", show_default=False)


@dataclass(frozen=True)
class WatchOptions:
    """Who may watch, and what is kept."""

    publish: Annotated[
        bool, _option("--publish/--no-publish", help="Let `kcache inspect` find and watch this run. Default: yes.")
    ] = True
    publish_port: Annotated[
        int | None,
        _option(
            "--publish-port",
            min=0,
            max=65535,
            metavar="PORT",
            help="Also publish on 127.0.0.1, with a token that is printed; 0 takes any free port.",
        ),
    ] = None
    record: Annotated[
        Path | None, _option("--record", metavar="FILE", help="Write every step to a new recording (.kcr).")
    ] = None

    dashboard: Annotated[bool, _option("--dashboard", help="Watch it in this terminal; see `kcache inspect`.")] = False

    def check(self) -> None:
        """Refuse what contradicts itself, a recording that could not be made, and a dashboard nobody sees.

        That is said before anything is loaded.

        Raises
        ------
        InputError
        """
        from kcache_cli.rows.store import check_file

        if self.publish_port is not None and not self.publish:
            raise InputError(f"--no-publish and --publish-port {self.publish_port} contradict each other; drop one")
        path = check_file("--record", None if self.record is None else str(self.record))
        if path is not None and path.exists():
            raise InputError(f"--record {self.record}: exists; give another name, or remove it")
        if self.dashboard:
            from kcache_cli.tui.start import check_terminal

            check_terminal("--dashboard needs a terminal; leave it away where there is none")

    def refuse(self, reason: str) -> None:
        """Raise :class:`InputError` if a recording or a port was asked for."""
        for name, asked in (("--record", self.record is not None), ("--publish-port", self.publish_port is not None)):
            if asked:
                raise InputError(f"{name}: {reason}; leave it out")


@contextmanager
def watching(engine: Engine, lm: Any, command: str, options: WatchOptions) -> Iterator[Publication | None]:
    """Publish the model while the body runs, as far as the options ask for it.

    Not being able to is no reason to stop, unless a recording or a port was asked for.
    """
    from kcache_cli.exits import note, warn
    from kcache_cli.inspect.choose import TOKEN

    publication = None
    asked = options.record is not None or options.publish_port is not None or options.dashboard
    if options.publish or asked:
        try:
            publication = engine.publish(
                lm,
                command=command,
                record=None if options.record is None else options.record.expanduser(),
                unix=options.publish,
                port=options.publish_port,
            )
        except WatchError as error:
            if asked:
                raise
            warn(f"{error}; `kcache inspect` will not find this run")
    if publication is None:
        yield None
        return
    if publication.port is not None:
        note(f"{TOKEN}={publication.token} kcache inspect --connect 127.0.0.1:{publication.port}")
    try:
        with publication:
            yield publication
    finally:
        if publication.problem is not None:
            warn(publication.problem)
        if publication.lost and options.record is not None:
            warn(f"{publication.lost:,} steps are missing in {options.record}: the disk or the processor was too busy")

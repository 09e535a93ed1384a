"""Opening the dashboard from a command: settings, the terminal, the choice among several processes."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

from kcache.errors import InputError
from kcache_cli.ending import show
from kcache_cli.settings import load_settings
from kcache_cli.terminal import typed_ahead

if TYPE_CHECKING:
    from kcache.watch.source import Source
    from kcache_cli.tui.app import Dashboard
    from kcache_cli.tui.talk import Talk

NO_TERMINAL = "the dashboard needs a terminal; `kcache inspect --once` prints the state"


def check_terminal(why: str = NO_TERMINAL) -> None:
    """Refuse to draw where nobody sees it, and say ``why``.

    Raises
    ------
    InputError
    """
    if not has_terminal():
        raise InputError(why)


def has_terminal() -> bool:
    """Whether there is somebody to draw for and to ask."""
    return all(stream is not None and stream.isatty() for stream in (sys.stdin, sys.stdout, sys.stderr))


def dashboard(source: Source, stop: Callable[[], bool] | None = None, *, talk: Talk | None = None) -> Dashboard:
    """Make the app, as the settings want it."""
    from kcache_cli.tui.app import Dashboard

    settings = load_settings()
    check_theme(settings.theme)
    return Dashboard(
        source,
        talk=talk,
        typed=partial(typed_ahead, sys.stdin),
        stop=stop,
        ascii=settings.ascii or not _writes_blocks(),
        theme=settings.theme,
        keymap=parse_keys(settings.keys),
    )


def check_theme(name: str | None) -> None:
    """Raise :class:`InputError` if a theme is asked for that there is not."""
    from textual.theme import BUILTIN_THEMES

    from kcache_cli.tui.palette import THEMES

    if name is not None and name not in (*THEMES, *BUILTIN_THEMES):
        raise InputError(f"theme {name!r}: there is none; use one of {', '.join((*THEMES, *BUILTIN_THEMES))}")


def watch(source: Source) -> None:
    """Show the dashboard until the user leaves it.

    Raises
    ------
    InputError
        If this is no terminal.
    """
    check_terminal()
    show(dashboard(source))


def pick() -> int | None:
    """Ask which process to watch, if several publish; None leaves it to the usual choice.

    Raises
    ------
    KeyboardInterrupt
        If the user wants none of them.
    """
    from kcache.watch.attach import find

    places = find()
    if len(places) < 2:
        return None
    from kcache_cli.tui.menu import Menu, candidates

    found = candidates(places)
    if len(found) < 2:  # the others did not answer
        return found[0].place.pid if found else None
    chosen = show(Menu(found))
    if chosen is None:
        raise KeyboardInterrupt
    return chosen.place.pid


def parse_keys(text: str | None) -> dict[str, str]:
    """Read ``pause=p,quit=ctrl+q``: other keys for what the dashboard does.

    Raises
    ------
    InputError
        If a name is unknown.
    """
    from kcache_cli.tui.keys import KEYS

    found: dict[str, str] = {}
    names = [key.id for key in KEYS]
    for part in (text or "").split(","):
        if not part.strip():
            continue
        name, _, keys = (word.strip() for word in part.partition("="))
        if name not in names or not keys:
            raise InputError(f"keys = {text!r}: write it as NAME=KEY,NAME=KEY; names are {', '.join(names)}")
        found[name] = keys.replace(" ", ",")
    return found


def _writes_blocks() -> bool:
    """Whether the terminal's encoding has the characters that pictures are made of."""
    try:
        "▀█⣿·–“".encode(sys.stdout.encoding or "ascii")
    except (LookupError, UnicodeEncodeError):
        return False
    return True

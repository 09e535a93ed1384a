"""Which run to look at: a recording, a process that is named, or the one that began last; and which of its steps."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from kcache.errors import InputError, WatchError

if TYPE_CHECKING:
    from kcache.watch.attach import Place
    from kcache.watch.source import Source

TOKEN = "KCACHE_WATCH_TOKEN"
_FIRST_FRAME_S = 5.0
NOTHING_RUNS = (
    "nothing that can be inspected is running; start `kcache chat`, `kcache generate` or `kcache bench`, or name a "
    "recording"
)


def choose(file: Path | None, pid: int | None, address: str | None) -> Source:
    """Open what was asked for.

    Raises
    ------
    InputError
        If that makes no sense, or the recording cannot be read.
    WatchError
        If no such process publishes, or none does.
    """
    if sum(given is not None for given in (file, pid, address)) > 1:
        raise InputError("give one of FILE, --pid and --connect")
    if file is not None:
        from kcache.watch.recording import open_recording

        return open_recording(file.expanduser())
    from kcache.watch.attach import attach

    source = attach(_place(pid, address))
    source.wait(_FIRST_FRAME_S)
    return source


def index_of(source: Source, step: int | None, run: int | None = None) -> int | None:
    """The last frame of a step, or of what there is, of a run, or of the latest that has it.

    None for the newest of a live source.

    Raises
    ------
    InputError
        If the run or the step is not there.
    """
    span = source.span()
    if step is None and run is None:
        return None if source.live or not span else span[-1]
    runs, steps = set(), set()
    for index in reversed(span):
        try:
            frame = source.frame(index)
        except IndexError:
            continue
        runs.add(frame.run)
        if run in (None, frame.run):
            if step in (None, frame.step):
                return index
            steps.add(frame.step)
    if run is not None and run not in runs:
        raise InputError(f"--run {run}: no such run; {_there('runs', runs)}")
    raise InputError(f"--at {step}: no such step; {_there('steps', steps)}")


def _there(what: str, found: set[int]) -> str:
    return f"there are {what} {min(found)} to {max(found)}" if found else "there are none"


def _place(pid: int | None, address: str | None) -> Place:
    from kcache.watch.attach import find

    if address is not None:
        return _parse(address)
    places = find()
    chosen = [place for place in places if pid in (None, place.pid)]
    if chosen:
        return chosen[0]
    if pid is None:
        raise WatchError(NOTHING_RUNS)
    raise WatchError(f"--pid {pid}: {_why_not(pid)}; {_who_does(places)}")


def _why_not(pid: int) -> str:
    """Why a process cannot be looked at."""
    import psutil

    if pid <= 0 or not psutil.pid_exists(pid):
        return "there is no such process"
    return "that process does not publish what it does, or not for you"


def _who_does(places: list[Place]) -> str:
    if not places:
        return "nothing else that can be inspected is running"
    return f"these can be inspected: {', '.join(str(place.pid) for place in places)}"


def _parse(address: str) -> Place:
    """Read ``HOST:PORT`` or ``PORT``."""
    from kcache.watch.attach import Place

    host, _, port = address.rpartition(":")
    if not port.isdigit() or not 0 < int(port) < 65536:
        raise InputError(f"--connect {address}: write it as 127.0.0.1:PORT, as the program that publishes printed it")
    token = os.environ.get(TOKEN)
    if not token:
        raise InputError(f"--connect {address}: set {TOKEN} to the token that the program printed")
    return Place(host=host or "127.0.0.1", port=int(port), token=token)

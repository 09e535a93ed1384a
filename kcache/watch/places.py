"""Where processes publish: an owner-only folder of sockets, one for each, named after the process."""

from __future__ import annotations

import os
import stat
import warnings
from pathlib import Path

from kcache.errors import WatchError

_LONGEST_PATH = 100
"""Bytes; the system's limit for the path of a socket is 104 or 108."""


def runtime_folder(make: bool = False) -> Path:
    """The folder for sockets; with ``make`` it is there and nobody else's.

    Raises
    ------
    WatchError
        If it is open to others, or cannot be made.
    """
    base = os.environ.get("XDG_RUNTIME_DIR", "").strip()
    if base:
        folder = Path(base) / "kcache"
    else:
        from platformdirs import user_runtime_path

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it chose a folder of its own; it is checked here
            folder = user_runtime_path("kcache", appauthor=False)
    if make:
        try:
            folder.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            folder.mkdir(exist_ok=True, mode=0o700)
        except OSError as error:
            raise WatchError(f"cannot publish: {folder}: {error.strerror or error}; set XDG_RUNTIME_DIR") from None
        check_private(folder)
    return folder


def check_private(folder: Path) -> None:
    """Raise unless a folder is this user's own and closed to others.

    Raises
    ------
    WatchError
        Saying what is wrong with it.
    """
    state = folder.lstat()
    if not stat.S_ISDIR(state.st_mode) or state.st_uid != os.getuid() or state.st_mode & 0o077:
        raise WatchError(
            f"{folder} must be a folder of your own that nobody else may enter (mode 700); set XDG_RUNTIME_DIR"
        )


def socket_path(pid: int) -> Path:
    """A free path for a socket of this process.

    Raises
    ------
    WatchError
        If the path is too long for a socket.
    """
    folder = runtime_folder(make=True)
    path, number = folder / f"{pid}.sock", 1
    while path.exists():
        number += 1
        path = folder / f"{pid}-{number}.sock"
    if len(os.fsencode(path)) > _LONGEST_PATH:
        raise WatchError(f"cannot publish: {path} is too long for a socket; set XDG_RUNTIME_DIR to a shorter folder")
    return path


def sockets() -> list[tuple[int, Path]]:
    """The sockets that are there, live or not, with the process they are named after; newest first."""
    folder = runtime_folder()
    try:
        check_private(folder)
    except FileNotFoundError:
        return []
    found: list[tuple[float, int, Path]] = []
    for path in folder.glob("*.sock"):
        pid = path.stem.partition("-")[0]
        try:
            state = path.lstat()
        except OSError:  # gone meanwhile
            continue
        if pid.isdigit() and stat.S_ISSOCK(state.st_mode):
            found.append((state.st_mtime, int(pid), path))
    return [(pid, path) for _, pid, path in sorted(found, reverse=True)]

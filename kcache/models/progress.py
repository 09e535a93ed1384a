"""Progress of downloads and conversions, reported to whoever asked and drawn by nobody here.

A download is watched from outside: the bytes that have arrived in a folder are counted while another program (pip, the
hub client) fills it. That works for every version of those programs and for caches they keep of their own.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

_LOOK_S = 0.1

Progress = Callable[[int, int, str], None]
"""Called with bytes done, bytes in all, and a label for what is going on; may be called from another thread."""


def ignore_progress(done_bytes: int, total_bytes: int, label: str) -> None:
    """Stand in for a caller who does not want to know."""


def folder_bytes(folder: Path) -> int:
    """Count the bytes of all files below a folder; files that vanish meanwhile, and a missing folder, count nothing."""
    total = 0
    for path in folder.rglob("*"):
        try:
            if path.is_file() and not path.is_symlink():
                total += path.stat().st_size
        except OSError:
            continue
    return total


@contextmanager
def watch_folder(folder: Path, total_bytes: int, label: str, progress: Progress) -> Iterator[None]:
    """Report the growth of ``folder`` as progress towards ``total_bytes`` for as long as the body runs.

    The last report says that all is done, and is left out when the body raises.
    """
    start = folder_bytes(folder)
    done = threading.Event()

    def watch() -> None:
        while not done.wait(_LOOK_S):
            progress(min(max(folder_bytes(folder) - start, 0), total_bytes), total_bytes, label)

    progress(0, total_bytes, label)
    watcher = threading.Thread(target=watch, name="kcache-progress", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    progress(total_bytes, total_bytes, label)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers from drawing its own progress bars, and accelerate from remarking on where weights went.

    Their settings are put back afterwards.
    """
    from logging import ERROR, getLogger

    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    placing = getLogger("accelerate.big_modeling")
    level = placing.level
    placing.setLevel(ERROR)
    try:
        yield
    finally:
        placing.setLevel(level)
        if shown:
            logging.enable_progress_bar()

"""Result lines in input order, however the batches finish."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from kcache.errors import InputError
from kcache_cli.batch.inputs import Id
from kcache_cli.batch.journal import RESULT_KEYS, Result, parse_whole
from kcache_cli.replace import naming
from kcache_cli.text import json_line

STDOUT = Path("standard output")


class OrderedOutput:
    """Writes results in the order of ``ids``; each as soon as all before it have been written.

    Parameters
    ----------
    ids : sequence
        The id of every line there will be.
    file : binary file
        Where to write.
    name : Path
        What an error calls it.
    written : int
        Lines the file already holds.
    """

    def __init__(self, ids: Sequence[Id], file: BinaryIO, written: int = 0, name: Path = STDOUT) -> None:
        self.written = written
        self._ids = ids
        self._file, self._name = file, name
        self._waiting: dict[int, Result] = {}

    def add(self, results: Iterable[tuple[int, Result]]) -> None:
        """Take results, each with its position; those written before are left alone."""
        self._waiting.update((position, result) for position, result in results if position >= self.written)
        lines = []
        while self.written < len(self._ids) and self.written in self._waiting:
            result = self._waiting.pop(self.written)
            lines.append(json_line({key: result[key] for key in RESULT_KEYS}) + "\n")
            self.written += 1
        if lines:
            with naming(self._name):
                self._file.write("".join(lines).encode())
                self._file.flush()

    def sync(self) -> None:
        """Make sure what was written is on the disk."""
        with naming(self._name):
            os.fsync(self._file.fileno())


def check_target(name: str, source: str) -> Path | None:
    """The file ``-o`` names, or None for standard output.

    Raises
    ------
    InputError
        If it cannot be written.
    """
    if name == "-":
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        raise InputError(f"-o {name}: is a folder; name a file")
    if not path.parent.is_dir():
        raise InputError(f"-o {name}: the folder {path.parent} does not exist")
    if source != "-" and path.exists() and path.samefile(Path(source).expanduser()):
        raise InputError(f"-o {name}: is the input itself; name another file")
    try:
        if path.is_file():
            path.open("ab").close()
        elif not path.exists():
            TemporaryFile(dir=path.parent).close()
    except OSError as error:
        raise InputError(f"-o {name}: cannot be written: {error.strerror or error}") from None
    return path


@contextmanager
def opened(path: Path | None) -> Iterator[BinaryIO]:
    """The output to add lines to; without a path standard output, for bytes: they are UTF-8 in any locale."""
    if path is None:
        sys.stdout.flush()
        yield sys.stdout.buffer
        return
    file = path.open("ab")
    try:
        yield file
    finally:
        with naming(path):
            file.close()


def mend(path: Path, ids: Sequence[Id]) -> int:
    """Cut a torn last line off an output; return how many whole lines it holds.

    Raises
    ------
    InputError
        If a line is not the one that belongs there.
    """
    if not path.exists():
        return 0
    count = end = 0
    with path.open("r+b") as file:
        for raw in file:
            value = parse_whole(raw)
            if value is None:
                if file.read(1):
                    raise InputError(_foreign(path, count + 1))
                break
            if count >= len(ids) or value.get("id") != ids[count] or set(value) != set(RESULT_KEYS):
                raise InputError(_foreign(path, count + 1))
            count += 1
            end += len(raw)
        if end < file.seek(0, os.SEEK_END):
            file.truncate(end)
    return count


def _foreign(path: Path, line: int) -> str:
    return f"{path}, line {line}, is not what this job writes there; use --overwrite or another -o"

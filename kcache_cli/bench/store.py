"""The rows of a run: those a file already holds, those that are new, and where they are written.

A file is written anew after each case, through a temporary one, so it is whole whenever the run is stopped.
Standard output gets JSON lines and CSV as they come; a Markdown table and a JSON list are only known at the end.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from tempfile import NamedTemporaryFile
from typing import Any

from kcache.errors import InputError
from kcache_cli.bench.formats import FORMATS, BenchRow, render

IDENTITY = ("engine", "model", "ctx", "batch", "topn", "dtype", "device")
"""What makes two rows measurements of the same thing."""
_SETTINGS = ("policy", "context_from", "repeats", "steps")


def identity(row: BenchRow) -> tuple[Any, ...]:
    """What the row measures."""
    return tuple(row.get(name) for name in IDENTITY)


def same_settings(row: BenchRow, wanted: BenchRow) -> bool:
    """Whether a row was measured in the way that is wanted now."""
    return all(row.get(name) == wanted.get(name) for name in _SETTINGS)


def choose_format(form: str | None, target: Path | None) -> str:
    """The format asked for, or what the file's name says, or Markdown."""
    if form is not None:
        return form
    suffix = "" if target is None else target.suffix.removeprefix(".").lower()
    return suffix if suffix in FORMATS else "md"


def read_rows(path: Path, option: str) -> list[BenchRow]:
    """Read rows from JSON lines or a JSON list; a torn last line is left out.

    Raises
    ------
    InputError
        If the file cannot be read or holds something else.
    """
    try:
        text = path.expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{option} {path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{option} {path}: is not UTF-8 text") from None
    values = _list(text) if text.lstrip().startswith("[") else _lines(text)
    if values is None or not all(isinstance(row, dict) and {"engine", "ctx", "batch"} <= set(row) for row in values):
        raise InputError(f"{option} {path}: does not hold rows of kcache bench; it reads -o jsonl and -o json")
    return values


def _list(text: str) -> list[Any] | None:
    try:
        values = json.loads(text)
    except ValueError:
        return None
    return values if isinstance(values, list) else None


def _lines(text: str) -> list[Any] | None:
    lines = [line for line in text.splitlines() if line.strip()]
    values = []
    for number, line in enumerate(lines, start=1):
        try:
            values.append(json.loads(line))
        except ValueError:
            if number < len(lines):
                return None
    return values


def compare(rows: Iterable[BenchRow], old: Sequence[BenchRow]) -> list[BenchRow]:
    """Add ``compare_ratio`` to each row: its speed over that of the same row in ``old``, above 1 is faster now."""
    before = {identity(row): row.get("decode_ms_p50") for row in old}
    compared = []
    for row in rows:
        then, now = before.get(identity(row)), row.get("decode_ms_p50")
        compared.append({**row, "compare_ratio": then / now if then and now else None})
    return compared


class Store:
    """Collects rows and writes them.

    Parameters
    ----------
    target : Path or None
        The file, or None for standard output.
    form : str
        One of the formats.
    rows : sequence of dict
        Rows that are there already.
    old : sequence of dict or None
        Rows of an earlier run to compare with.
    """

    def __init__(
        self, target: Path | None, form: str, rows: Sequence[BenchRow] = (), old: Sequence[BenchRow] | None = None
    ) -> None:
        self.target, self.form, self._old = target, form, old
        self.rows: list[BenchRow] = []
        self._printed = ""
        self._take(rows)

    def _take(self, rows: Sequence[BenchRow]) -> None:
        self.rows += rows if self._old is None else compare(rows, self._old)

    def add(self, rows: Sequence[BenchRow]) -> None:
        """Take the rows of a case."""
        self._take(rows)
        if self.target is None:
            if self.form in ("jsonl", "csv"):
                self._print()
        elif self._replaceable:
            self._replace(render(self.rows, self.form))

    def close(self) -> None:
        """Write what could not be written before the end."""
        if self.target is None:
            self._print()
        elif not self._replaceable:
            self.target.write_text(render(self.rows, self.form), encoding="utf-8")
        elif self.rows:
            self._replace(render(self.rows, self.form))

    def _print(self) -> None:
        text = render(self.rows, self.form)
        sys.stdout.write(text.removeprefix(self._printed))
        sys.stdout.flush()
        self._printed = text

    @property
    def _replaceable(self) -> bool:
        assert self.target is not None
        return self.target.is_file() or not self.target.exists()

    def _replace(self, text: str) -> None:
        assert self.target is not None
        target = self.target.resolve()
        with NamedTemporaryFile("w", encoding="utf-8", dir=target.parent, delete=False) as file:
            file.write(text)
        os.chmod(file.name, target.stat().st_mode & 0o777 if target.exists() else 0o644)  # noqa: PTH101
        os.replace(file.name, target)  # noqa: PTH105


def check_file(option: str, name: str | None) -> Path | None:
    """The file an option names, whose folder must be there and writable.

    Raises
    ------
    InputError
    """
    if name is None:
        return None
    path = Path(name).expanduser()
    if path.is_dir():
        raise InputError(f"{option} {name}: is a folder; name a file")
    if not path.parent.is_dir():
        raise InputError(f"{option} {name}: the folder {path.parent} does not exist")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{option} {name}: cannot be written")
    return path

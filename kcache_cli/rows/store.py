"""The rows of a run: those a file already holds, those that are new, and where they are written.

A file is written anew after each case, through a temporary one, so it is whole whenever the run is stopped.
Standard output gets JSON lines and CSV as they come; a Markdown table and a JSON list are only known at the end.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

from kcache.errors import InputError
from kcache_cli.exits import note
from kcache_cli.replace import replace
from kcache_cli.rows.formats import FORMATS, Markdown, Row, render


def destination(
    form: str | None, output: str | None, resume: bool, command: str, names: set[str]
) -> tuple[Path | None, str, list[Row]]:
    """Where ``--output`` sends rows (None is standard output), their format, and the rows there that are to be kept.

    The format is the one asked for, or what the file's name says, or Markdown where that has no ending.

    Raises
    ------
    InputError
        If the file cannot be written, its ending says nothing or another format than the one asked for, or it cannot be
        resumed; see :func:`read_rows`.
    """
    target = check_file("--output", output)
    if form is not None and target is not None and _suffix(target) in set(FORMATS) - {form}:
        raise InputError(f"--output {target} and -o {form} name two formats; leave one out, or rename the file")
    form = form or _format_of(target)
    if not resume:
        return target, form, []
    if target is None or form not in ("json", "jsonl"):
        raise InputError("--resume reads what --output holds: name a .jsonl or .json file there")
    return target, form, read_rows(target, "--output", command, names) if target.exists() else []


def _format_of(target: Path | None) -> str:
    if target is None:
        return "md"
    suffix = _suffix(target)
    if suffix in FORMATS:
        return suffix
    if suffix not in ("", "txt"):
        endings = ", ".join(f".{each}" for each in FORMATS)
        raise InputError(f"--output {target}: the name must end in {endings} or .txt, which is Markdown; or choose -o")
    return "md"


def _suffix(target: Path) -> str:
    return target.suffix.removeprefix(".").lower()


def read_rows(path: Path, option: str, command: str, names: set[str]) -> list[Row]:
    """Read rows from JSON lines or a JSON list; a torn last line is left out.

    Parameters
    ----------
    path : Path
    option : str
        The flag that named it, for messages.
    command : str
        Whose rows they should be.
    names : set of str
        Fields that tell such a row from anything else.

    Raises
    ------
    InputError
        If the file cannot be read or holds something else.
    """
    text = read_text(option, path)
    values = _list(text) if text.lstrip().startswith("[") else _lines(text)
    if values is None or not all(isinstance(row, dict) and names <= set(row) for row in values):
        raise InputError(f"{option} {path}: does not hold rows of {command}; it reads -o jsonl and -o json")
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


def say_skipped(cases: int) -> None:
    """Say on standard error how many cases were not run since their rows are there."""
    if cases:
        note(f"{cases} case{'s were' if cases > 1 else ' was'} there already")


class Store:
    """Collects rows and writes them.

    Parameters
    ----------
    target : Path or None
        The file, or None for standard output.
    form : str
        One of the formats.
    markdown : callable
        Writes the rows as a Markdown table.
    rows : sequence of dict
        Rows that are there already.
    """

    def __init__(self, target: Path | None, form: str, markdown: Markdown, rows: Sequence[Row] = ()) -> None:
        self.target, self.form, self._markdown = target, form, markdown
        self.rows: list[Row] = [*rows]
        self._printed = ""

    def add(self, rows: Sequence[Row]) -> None:
        """Take the rows of a case."""
        self.rows += rows
        if self.target is None:
            if self.form in ("jsonl", "csv"):
                self._print(self.rows)
        elif self._replaceable:
            self._write()

    def replace(self, rows: Sequence[Row], is_whole: Callable[[Row], bool]) -> None:
        """Take all rows anew, some of which may grow still; standard output gets the first ones, up to such a row."""
        self.rows = [*rows]
        if self.target is None:
            if self.form in ("jsonl", "csv"):
                self._print([*takewhile(is_whole, self.rows)])
        elif self.rows and self._replaceable:
            self._write()

    def close(self) -> None:
        """Write what could not be written before the end."""
        if self.target is None:
            self._print(self.rows)
        elif self.rows or not self._replaceable:
            self._write()

    def say_where(self, chart: Path | None = None) -> None:
        """Say on standard error which files have been written."""
        if self.target is not None:
            note(f"{len(self.rows):,} row{'' if len(self.rows) == 1 else 's'} in {self.target}")
        if chart is not None and self.rows:
            note(f"drew {chart}")

    def _print(self, rows: Sequence[Row]) -> None:
        """Print what of these rows has not been printed yet."""
        text = render(rows, self.form, self._markdown)
        sys.stdout.write(text.removeprefix(self._printed))
        sys.stdout.flush()
        self._printed = text

    @property
    def _replaceable(self) -> bool:
        assert self.target is not None
        return self.target.is_file() or not self.target.exists()

    def _write(self) -> None:
        assert self.target is not None
        replace(self.target, render(self.rows, self.form, self._markdown).encode())


def read_text(option: str, name: str | Path) -> str:
    """The text of the file an option names.

    Raises
    ------
    InputError
        If it cannot be read or is not UTF-8 text.
    """
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(f"{option} {name}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{option} {name}: is not UTF-8 text") from None


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

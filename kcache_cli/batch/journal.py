"""What makes a batch job safe to kill: a journal beside the output.

``out.jsonl`` gets its lines in input order as soon as all lines before them are there. ``out.jsonl.kcache`` holds, in
JSON lines, a header (what input, which settings), then the finished batches, each one line, synced to disk before the
next begins. A batch is in the journal whole or not at all. When the job is done the journal shrinks to the header and
a closing line, which is how a later run knows what the output was made from.

A job that goes on with other settings begins again with a header of its own: what is before it is kept.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from kcache.errors import InputError
from kcache_cli.batch.plan import Sizes
from kcache_cli.replace import naming
from kcache_cli.text import json_line

FORMAT = 1
Result = dict[str, Any]
RESULT_KEYS = ("id", "text", "finish_reason", "prompt_tokens", "completion_tokens")


@dataclass(frozen=True)
class Header:
    """What a job is: two runs with the same header belong together."""

    input_sha256: str
    settings: dict[str, Any]

    def difference(self, other: Header) -> str | None:
        """Say how ``other``, the job on disk, differs from this one; None when it does not."""
        if self.input_sha256 != other.input_sha256:
            return "another input"
        names = list({**self.settings, **other.settings})
        pairs = [(name, other.settings.get(name), self.settings.get(name)) for name in names]
        changed = [f"{name}: {then} then, {now} now" for name, then, now in pairs if then != now]
        return f"other settings ({'; '.join(changed)})" if changed else None


class Journal:
    """The output and the journal of one job, locked against a second run.

    Opening reads what is there and changes nothing but a torn end; :meth:`begin` starts a new job.

    Parameters
    ----------
    output : Path
        Where the result lines go.
    header : Header
        What this run is.
    overwrite : bool
        Start anew whatever is there.
    keep : bool
        Keep what is finished, though it was made with other settings.

    Attributes
    ----------
    sizes : Sizes or None
        The batch sizes of the job that is continued; None when a new one must begin.
    finished : dict
        Results of finished batches by number.
    kept : list
        Results that were made with other settings.
    skipped : list of int or None
        Lines a complete job left out; None while it is not complete.
    holds_results : bool
        Whether there is anything for the next run to go on from.

    Raises
    ------
    InputError
        If what is there belongs to another job, another process is at work on it, or it cannot be written.
    """

    def __init__(self, output: Path, header: Header, overwrite: bool = False, keep: bool = False) -> None:
        self.output = output
        self.path = output.with_name(output.name + ".kcache")
        self.header = header
        self.sizes: Sizes | None = None
        self.finished: dict[int, list[Result]] = {}
        self.kept: list[Result] = []
        self.skipped: list[int] | None = None
        self.holds_results = False
        self._file: BinaryIO | None = _open(self.path, output) if self.path.exists() else None
        try:
            if not overwrite:
                self._read(keep)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of the files."""
        if self._file is not None:
            with naming(self.path):
                self._file.close()

    def _read(self, keep: bool) -> None:
        lines = _whole_lines(self._file) if self._file is not None else []
        begun = _read_header(lines[0][1]) if lines else None
        has_output = self.output.exists() and self.output.stat().st_size > 0
        if begun is None:
            if has_output:
                raise InputError(
                    f"{self.output} exists and no {self.path.name} beside it says what it was made from; "
                    "use --overwrite or another -o"
                )
            return
        end = 0
        for end_of_line, value in lines:
            again = _read_header(value)
            if again is not None:
                begun = again
                self._set_aside()
            elif not self._take(value):
                break
            end = end_of_line
        header, self.sizes = begun
        difference = self.header.difference(header)
        if difference:
            has_results = has_output or self.finished or self.kept
            if has_results and not (keep and header.input_sha256 == self.header.input_sha256):
                raise InputError(
                    f"{self.output} was made from {difference}; run it as before, "
                    + ("" if header.input_sha256 != self.header.input_sha256 else "--keep what is finished, ")
                    + "or use --overwrite or another -o"
                )
            self._set_aside()
            self.sizes = None
        self._cut(end)

    def _set_aside(self) -> None:
        """Keep the results there are, whatever comes now."""
        self.kept += [result for results in self.finished.values() for result in results]
        self.finished = {}

    def _take(self, value: Any) -> bool:
        """Take in a line; returns whether it is one that a job writes."""
        if "complete" in value:
            skipped = value.get("skipped")
            self.skipped = skipped if isinstance(skipped, list) else None
            return self.skipped is not None
        results = value.get("results")
        if not isinstance(value.get("batch"), int) or not isinstance(results, list):
            return False
        if not all(isinstance(result, dict) for result in results):
            return False
        self.finished[value["batch"]] = results
        self.holds_results = True
        self.skipped = None
        return True

    def begin(self, sizes: Sizes) -> None:
        """Start a new job: what the output and the journal hold is thrown away, but for what is kept."""
        if self._file is None:
            if self.path.exists():
                raise InputError(f"another kcache generate has begun to write {self.output}; use another -o")
            self._file = _open(self.path, self.output)
        if not self.kept:
            if self.output.exists():
                os.truncate(self.output, 0)
            self._cut(0)
        self._append(
            {
                "kcache": FORMAT,
                "input_sha256": self.header.input_sha256,
                "batch_sizes": sizes.steps,
                "settings": self.header.settings,
            }
        )
        self.sizes, self.finished, self.skipped = sizes, {}, None
        self.holds_results = bool(self.kept)

    def record(self, number: int, results: list[Result]) -> None:
        """Keep the results of a finished batch; they are on the disk when this returns."""
        self._append({"batch": number, "results": results})
        self.holds_results = True

    def close_job(self, skipped: list[int]) -> None:
        """Say that the output is whole but for the input lines ``skipped``; the batches are no longer needed."""
        assert self._file is not None
        if not self.kept:
            self._file.seek(0)
            self._cut(len(self._file.readline()))
        self._append({"complete": True, "skipped": skipped})
        self.skipped = skipped

    def _append(self, value: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.seek(0, os.SEEK_END)
        with naming(self.path):
            self._file.write(json_line(value).encode() + b"\n")
            self._file.flush()
            os.fsync(self._file.fileno())

    def _cut(self, end: int) -> None:
        assert self._file is not None
        self._file.truncate(end)
        self._file.flush()


def _open(path: Path, output: Path) -> BinaryIO:
    """Open and lock a journal, making it if need be."""
    try:
        file: BinaryIO = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
    except OSError as error:
        raise InputError(f"-o {output}: cannot write {path.name} beside it: {error.strerror or error}") from None
    try:
        _lock(file, output)
    except BaseException:
        file.close()
        raise
    return file


def _whole_lines(file: BinaryIO) -> list[tuple[int, Any]]:
    """The JSON objects of a file up to the first line that is torn, each with the offset of its end."""
    lines: list[tuple[int, Any]] = []
    file.seek(0)
    end = 0
    for raw in file:
        end += len(raw)
        value = parse_whole(raw)
        if value is None:
            break
        lines.append((end, value))
    return lines


def parse_whole(raw: bytes) -> dict[str, Any] | None:
    """The JSON object on a line, or None when the line is torn."""
    if not raw.endswith(b"\n"):
        return None
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_header(value: Any) -> tuple[Header, Sizes] | None:
    settings, steps = value.get("settings"), value.get("batch_sizes", value.get("batch_size"))
    if value.get("kcache") != FORMAT or not isinstance(settings, dict):
        return None
    if isinstance(steps, int):  # one size for all, as jobs had before
        steps = [[1, steps]]
    try:
        sizes = Sizes(tuple((int(tokens), int(most)) for tokens, most in steps))
    except (TypeError, ValueError):
        return None
    return (Header(str(value.get("input_sha256")), settings), sizes) if sizes.steps else None


def _lock(file: BinaryIO, output: Path) -> None:
    try:
        import fcntl
    except ImportError:  # no advisory locks on this platform: two runs at once are not detected
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise InputError(f"another kcache generate is writing {output} now; wait for it, or use another -o") from None
    except OSError:  # a file system without locks
        return

"""What ``kcache inspect`` writes and exits: rows, pictures, a page."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kcache.errors import InputError
from kcache_cli.exits import note, warn

if TYPE_CHECKING:
    from kcache.watch.frame import Frame
    from kcache.watch.source import Source
    from kcache_cli.inspect.picture import Wish


@dataclass(frozen=True)
class Files:
    """The files that are asked for."""

    csv: Path | None
    svg: Path | None
    png: Path | None
    report: Path | None

    @classmethod
    def check(
        cls, csv: str | None, svg: str | None, png: str | None, report: str | None, overwrite: bool = False
    ) -> Files:
        """Refuse a file that could not be written, or is there, before anything is opened.

        Raises
        ------
        InputError
        """
        from kcache_cli.rows.store import check_file

        given = (("--export-csv", csv), ("--export-svg", svg), ("--export-png", png), ("--report", report))
        found = [(flag, check_file(flag, file)) for flag, file in given]
        for flag, path in found:
            if path is not None and path.is_file() and not overwrite:
                raise InputError(f"{flag} {path}: exists; give another name, or add --overwrite")
        return cls(*(path for _, path in found))

    def __bool__(self) -> bool:
        return any(path is not None for path in (self.csv, self.svg, self.png, self.report))

    @property
    def pictures(self) -> bool:
        """Whether any of them is a picture, which may be of an earlier step."""
        return self.svg is not None or self.png is not None

    def write(self, source: Source, wish: Wish, name: str) -> None:
        """Write them all; ``name`` is that of the recording, empty for a live run."""
        if self.csv is not None:
            _write_rows(source, self.csv)
        if self.pictures:
            self._write_pictures(source, wish, name)
        if self.report is not None:
            from kcache_cli.report.page import write

            write(source, self.report, name or "live", wish.run)
            note(f"the run as a page: {self.report}")
        if source.closed is not None:
            warn(source.closed)

    def _write_pictures(self, source: Source, wish: Wish, name: str) -> None:
        from kcache_cli.inspect.picture import take
        from kcache_cli.pictures.png import to_png
        from kcache_cli.replace import replace

        svg = take(source, wish, f"kcache inspect {name}".strip())
        if self.svg is not None:
            replace(self.svg, svg.encode("utf-8", "replace"))
        if self.png is not None:
            replace(self.png, to_png(svg))
        note(f"a picture: {' and '.join(str(path) for path in (self.svg, self.png) if path is not None)}")


def _write_rows(source: Source, target: Path) -> None:
    """All frames of a recording; of a live run the newest."""
    from kcache_cli.inspect.values import rows
    from kcache_cli.rows.formats import comma_separated
    from kcache_cli.rows.store import Store

    table = Store(target, "csv", comma_separated)
    newest = source.latest()
    found = [newest] if source.live and newest is not None else _frames(source)
    frames = 0
    for frame in found:
        table.rows += rows(frame)
        frames = frames + 1
    table.close()
    note(f"{frames:,} frame{'' if frames == 1 else 's'} in {target}")


def _frames(source: Source) -> Iterator[Frame]:
    """The frames of a recording, up to where it can be read."""
    for index in source.span():
        try:
            yield source.frame(index)
        except IndexError:  # the source says now what is wrong
            return

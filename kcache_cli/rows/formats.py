"""Rows as Markdown, CSV, JSON and JSON lines.

JSON and CSV carry every field under its own name. What a Markdown table shows is for each command to say, as columns:
a heading and a function that writes a row's cell.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from kcache_cli.text import json_line, one_line

Format = Literal["md", "csv", "json", "jsonl"]
FORMATS: tuple[str, ...] = get_args(Format)
Row = dict[str, Any]
Column = tuple[str, Callable[[Row], str]]
Markdown = Callable[[Sequence[Row]], str]


def render(rows: Sequence[Row], form: str, markdown: Markdown) -> str:
    """Write all rows in one format, newline at the end."""
    return {"md": markdown, "csv": comma_separated, "json": json_list, "jsonl": json_lines}[form](rows)


def json_lines(rows: Sequence[Row]) -> str:
    """One object a line."""
    return "".join(json_line(row) + "\n" for row in rows)


def json_list(rows: Sequence[Row]) -> str:
    """One list, an object a line."""
    return "[\n" + ",\n".join(json_line(row) for row in rows) + "\n]\n" if rows else "[]\n"


def comma_separated(rows: Sequence[Row]) -> str:
    """A header and a line per row; fields made of several values are JSON, what was not measured is empty."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: json.dumps(value) if _is_many(value) else value for name, value in row.items()})
    return out.getvalue()


def _is_many(value: object) -> bool:
    return isinstance(value, (dict, list, tuple))


def table(rows: Sequence[Row], columns: Sequence[Column], legend: Sequence[str]) -> str:
    """A Markdown table of the columns in which any row has something to say, and lines on where and how."""
    if not rows:
        return ""
    written = [(head, [cell(row) for row in rows]) for head, cell in columns]
    written = [(head, cells) for head, cells in written if any(cells)]
    widths = [max(2, len(head), *map(len, cells)) for head, cells in written]  # 2: Markdown wants a dash and a colon
    lines = [
        _line([head.ljust(width) for (head, _), width in zip(written, widths, strict=True)]),
        _line(["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]),
    ]
    for number in range(len(rows)):
        cells = [cells[number] for _, cells in written]
        lines.append(_line([_pad(cell, width, i) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))]))
    return "\n".join([*lines, "", *legend, ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def number(row: Row, name: str, form: str, *, scale: float = 1, zero: str | None = None) -> str:
    """A figure of a row as a cell, empty where it was not measured."""
    value = row.get(name)
    if value is None:
        return ""
    return zero if zero is not None and not value else format(value if form == "d" else value * scale, form)


def cell(text: str) -> str:
    """Text as a cell of a Markdown table: one line, without what ends a cell."""
    return one_line(text).replace("|", "/")


def megabytes(row: Row, name: str) -> str:
    """Bytes over a link as a cell, empty for none."""
    return f"{row[name] / 1e6:.2f} MB" if row.get(name) else ""


def origin(row: Row, *more: str) -> str:
    """A line for a legend: model, dtype and machine, what else there is to say, versions and time."""
    return one_line(" · ".join([*_where(row), *more, *versions(row)]))


def _where(row: Row) -> list[str]:
    env = row.get("env", {})
    host_only = env.get("run") == "host-only"
    parts = [
        row["model"],
        row["dtype"],
        env.get("device", row["device"]),
        f"{env['threads']} threads" if host_only else "",
        "host-only run: both tiers are RAM" if host_only else "",
    ]
    return [part for part in parts if part]


def versions(row: Row) -> list[str]:
    """The versions a row was measured with, and when, for a legend."""
    env = row.get("env", {})
    found = [f"{name} {env[name]}" for name in ("kcache", "torch", "transformers") if name in env]
    return [*found, env["time"]] if env.get("time") else found

"""Rows as Markdown, CSV, JSON and JSON lines.

JSON and CSV carry every field under its own name; the Markdown table shows those that say something, rounded.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

from kcache_cli.text import json_line, one_line, size

Format = Literal["md", "csv", "json", "jsonl"]
FORMATS: tuple[str, ...] = get_args(Format)
BenchRow = dict[str, Any]


def render(rows: Sequence[BenchRow], form: str) -> str:
    """Write all rows in one format, newline at the end."""
    return {"md": markdown, "csv": comma_separated, "json": json_list, "jsonl": json_lines}[form](rows)


def json_lines(rows: Sequence[BenchRow]) -> str:
    """One object a line."""
    return "".join(json_line(row) + "\n" for row in rows)


def json_list(rows: Sequence[BenchRow]) -> str:
    """One list, an object a line."""
    return "[\n" + ",\n".join(json_line(row) for row in rows) + "\n]\n" if rows else "[]\n"


def comma_separated(rows: Sequence[BenchRow]) -> str:
    """A header and a line per row; ``policy`` and ``env`` are JSON, what was not measured is empty."""
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    out = io.StringIO()
    writer = csv.DictWriter(out, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: json.dumps(value) if isinstance(value, dict) else value for name, value in row.items()})
    return out.getvalue()


def markdown(rows: Sequence[BenchRow]) -> str:
    """A table of what was measured, and a line on where and how."""
    if not rows:
        return ""
    columns = [(head, cells) for head, cells in _columns(rows) if any(cells)]
    widths = [max(len(head), *map(len, cells)) for head, cells in columns]
    lines = [
        _line([head.ljust(width) for (head, _), width in zip(columns, widths, strict=True)]),
        _line(["-" * width if i == 0 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]),
    ]
    for number in range(len(rows)):
        cells = [cells[number] for _, cells in columns]
        lines.append(_line([_pad(cell, width, i) for i, (cell, width) in enumerate(zip(cells, widths, strict=True))]))
    return "\n".join([*lines, "", *_legend(rows), ""])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _pad(cell: str, width: int, column: int) -> str:
    return cell.ljust(width) if column == 0 else cell.rjust(width)


def _columns(rows: Sequence[BenchRow]) -> list[tuple[str, list[str]]]:
    table: list[tuple[str, Callable[[BenchRow], str]]] = [
        ("engine", lambda row: row["engine"]),
        ("ctx", lambda row: f"{row['ctx']:,}"),
        ("batch", lambda row: str(row["batch"])),
        ("topn", lambda row: _number(row, "topn", "d")),
        ("ms/step p50", lambda row: _spread(row, "decode_ms_p50", "decode_ms_low", "decode_ms_high", ".1f")),
        ("p99", lambda row: _number(row, "decode_ms_p99", ".1f")),
        ("tok/s", lambda row: _number(row, "decode_tok_s", ".1f")),
        ("ratio", lambda row: _spread(row, "ratio", "ratio_low", "ratio_high", ".2f")),
        ("vs then", lambda row: _number(row, "compare_ratio", ".2f")),
        ("× floor", lambda row: _number(row, "floor_multiple", ".2f")),
        ("memory bw", lambda row: _number(row, "memory_share", ".0%")),
        ("link bw", lambda row: _number(row, "link_share", ".0%", zero="")),
        ("device KV", lambda row: _bytes(row, "device_kv_bytes")),
        ("host KV", lambda row: _bytes(row, "host_kv_bytes")),
        ("peak", lambda row: _bytes(row, "peak_memory_bytes")),
        ("link/token", lambda row: _megabytes(row, "link_bytes_per_token")),
        ("hits", lambda row: _number(row, "hit_rate", ".0%", zero="")),
        ("prefill tok/s", lambda row: _number(row, "prefill_tok_s", ".0f")),
        ("TTFT s", lambda row: _number(row, "ttft_ms", ".2f", scale=1e-3)),
        ("KL", lambda row: _number(row, "kl", ".4f")),
        ("top-1", lambda row: _number(row, "top1", ".3f")),
        ("predicted tok/s", lambda row: _number(row, "predicted_tok_s", ".1f")),
        ("error", lambda row: _number(row, "prediction_error", "+.0%")),
        ("note", _note),
    ]
    return [(head, [cell(row) for row in rows]) for head, cell in table]


def _number(row: BenchRow, name: str, form: str, *, scale: float = 1, zero: str | None = None) -> str:
    value = row.get(name)
    if value is None:
        return ""
    return zero if zero is not None and not value else format(value if form == "d" else value * scale, form)


def _spread(row: BenchRow, name: str, low: str, high: str, form: str) -> str:
    if row.get(name) is None:
        return ""
    return f"{row[name]:{form}} [{row[low]:{form}}–{row[high]:{form}}]"


def _bytes(row: BenchRow, name: str) -> str:
    return size(row[name]) if row.get(name) else ""


def _megabytes(row: BenchRow, name: str) -> str:
    return f"{row[name] / 1e6:.2f} MB" if row.get(name) else ""


def _note(row: BenchRow) -> str:
    notes = []
    if row["status"] != "ok":
        notes.append(f"{row['status']}: {one_line(row['reason'] or '')}".replace("|", "/"))
    elif row["engine"] == "kcache" and row.get("mode") == "dense":
        notes.append("exact here")
    if row.get("speed_only"):
        notes.append("speed only")
    return "; ".join(notes)


def _legend(rows: Sequence[BenchRow]) -> list[str]:
    """What the columns mean here, and where it was measured."""
    first = rows[0]
    env = first.get("env", {})
    where = [
        first["model"],
        first["dtype"],
        env.get("device", first["device"]),
        f"{env['threads']} threads" if env.get("run") == "host-only" else "",
        "host-only run: both tiers are RAM" if env.get("run") == "host-only" else "",
        f"memory {env['memory_gb_s']} GB/s, rows {env['gather_gb_s']} GB/s" if "memory_gb_s" in env else "",
        *(f"{name} {env[name]}" for name in ("kcache", "torch", "transformers") if name in env),
        env.get("time", ""),
    ]
    context = {"random": "random rows", "text": "a prefilled text"}[first.get("context_from", "random")]
    ratio_to = " / ".join(dict.fromkeys(row["ratio_to"] for row in rows if row.get("ratio_to")))
    lines = [one_line(" · ".join(part for part in where if part))]
    turns = sorted({row["turns"] for row in rows if row.get("turns")}) or [0]
    count = f"{turns[0]}" if len(turns) == 1 else f"{turns[0]}–{turns[-1]}"
    how = f"{count} turns of up to {first['steps']} steps, engines alternating, after {context}"
    lines.append(f"{how}; median [lowest–highest turn]" + (f"; ratio: speed over {ratio_to}" if ratio_to else ""))
    return lines

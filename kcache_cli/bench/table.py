"""Rows of ``kcache bench`` as a Markdown table: what says something, rounded, and a line on where and how."""

from __future__ import annotations

from collections.abc import Sequence

from kcache_cli.rows.formats import Column, Row, megabytes, number, origin, table
from kcache_cli.text import one_line, size


def markdown(rows: Sequence[Row]) -> str:
    """A table of what was measured, and how."""
    return table(rows, COLUMNS, legend(rows) if rows else [])


def _spread(row: Row, name: str, low: str, high: str, form: str) -> str:
    if row.get(name) is None:
        return ""
    return f"{row[name]:{form}} [{row[low]:{form}}–{row[high]:{form}}]"


def _bytes(row: Row, name: str) -> str:
    return size(row[name]) if row.get(name) else ""


def called(row: Row) -> str:
    """The engine of a row, with its N."""
    name: str = row["engine"]
    return name if row.get("topn") is None else f"{name} N={row['topn']}"


def note(row: Row) -> str:
    """What there is to say of a row beside its figures; empty for nothing."""
    notes = []
    if row["status"] != "ok":
        notes.append(f"{row['status']}: {one_line(row['reason'] or '')}".replace("|", "/"))
    elif row["engine"] == "kcache" and row.get("mode") == "dense":
        notes.append("exact here")
    if row.get("speed_only"):
        notes.append("speed only")
    return "; ".join(notes)


def legend(rows: Sequence[Row]) -> list[str]:
    """What the columns mean here, and where it was measured."""
    first = rows[0]
    env = first.get("env", {})
    bandwidths = [f"memory {env['memory_gb_s']} GB/s, rows {env['gather_gb_s']} GB/s"] if "memory_gb_s" in env else []
    context = {"random": "random rows", "text": "a prefilled text"}[first.get("context_from", "random")]
    ratio_to = " / ".join(dict.fromkeys(row["ratio_to"] for row in rows if row.get("ratio_to")))
    lines = [origin(first, *bandwidths)]
    turns = sorted({row["turns"] for row in rows if row.get("turns")}) or [0]
    count = f"{turns[0]}" if len(turns) == 1 else f"{turns[0]}–{turns[-1]}"
    count += " turn" if count == "1" else " turns"
    how = f"{count} of up to {first['steps']} steps, engines alternating, after {context}"
    lines.append(f"{how}; median [lowest–highest turn]" + (f"; ratio: speed over {ratio_to}" if ratio_to else ""))
    return lines


COLUMNS: tuple[Column, ...] = (
    ("engine", lambda row: row["engine"]),
    ("ctx", lambda row: f"{row['ctx']:,}"),
    ("batch", lambda row: str(row["batch"])),
    ("topn", lambda row: number(row, "topn", "d")),
    ("ms/step p50", lambda row: _spread(row, "decode_ms_p50", "decode_ms_low", "decode_ms_high", ".1f")),
    ("p99", lambda row: number(row, "decode_ms_p99", ".1f")),
    ("tok/s", lambda row: number(row, "decode_tok_s", ".1f")),
    ("ratio", lambda row: _spread(row, "ratio", "ratio_low", "ratio_high", ".2f")),
    ("vs then", lambda row: number(row, "compare_ratio", ".2f")),
    ("× floor", lambda row: number(row, "floor_multiple", ".2f")),
    ("memory bw", lambda row: number(row, "memory_share", ".0%")),
    ("link bw", lambda row: number(row, "link_share", ".0%", zero="")),
    ("device KV", lambda row: _bytes(row, "device_kv_bytes")),
    ("host KV", lambda row: _bytes(row, "host_kv_bytes")),
    ("peak", lambda row: _bytes(row, "peak_memory_bytes")),
    ("link/token", lambda row: megabytes(row, "link_bytes_per_token")),
    ("hits", lambda row: number(row, "hit_rate", ".0%", zero="")),
    ("prefill tok/s", lambda row: number(row, "prefill_tok_s", ".0f")),
    ("TTFT s", lambda row: number(row, "ttft_ms", ".2f", scale=1e-3)),
    ("KL", lambda row: number(row, "kl", ".4f")),
    ("top-1", lambda row: number(row, "top1", ".3f")),
    ("predicted tok/s", lambda row: number(row, "predicted_tok_s", ".1f")),
    ("error", lambda row: number(row, "prediction_error", "+.0%")),
    ("note", note),
)

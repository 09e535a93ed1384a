"""What ``kcache tune`` tried, as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence

from kcache_cli.evaluate import fidelity_table
from kcache_cli.rows.formats import Column, Row, megabytes, number, table, versions, where
from kcache_cli.text import one_line

COMMAND = "kcache tune"
NAMES = fidelity_table.NAMES | {"reaches_target"}
"""Fields every row has."""

_COLUMNS: list[Column] = [
    ("policy", lambda row: one_line(row["policy_name"]).replace("|", "/")),
    ("N", lambda row: number(row, "topn", "d")),
    ("rows/KV head", lambda row: number(row, "rows_per_kv_head", ".0f", zero="exact")),
    ("link/token", lambda row: megabytes(row, "bytes_h2d_per_token")),
    ("KL", lambda row: number(row, "kl_mean", ".4f")),
    ("± s.e.", lambda row: number(row, "kl_se", ".4f")),
    ("top-1", lambda row: number(row, "top1", ".3f")),
    ("device V", lambda row: number(row, "device_overhead", ".1%")),
    (
        "places",
        lambda row: str(row["places"]) if fidelity_table.is_whole(row) else f"{row['places']}/{len(row['starts'])}",
    ),
    (
        "",
        lambda row: (
            "cheapest" if row.get("chosen") else {True: "reaches", None: "stopped"}.get(row["reaches_target"], "misses")
        ),
    ),
]


def markdown(rows: Sequence[Row]) -> str:
    """What was tried, in order, and how it was measured."""
    return table(rows, _COLUMNS, _legend(rows[0]) if rows else [])


def _legend(first: Row) -> list[str]:
    return [
        one_line(" · ".join([*where(first), *versions(first)])),
        f"{first['steps']} teacher-forced steps after {first['ctx']:,} tokens at each place of "
        f"{one_line(first['text'])}; "
        f"KL at most {first['target_kl']:g} nats and device V at most {first['most_device_overhead']:.1%} of a full KV "
        "cache were wanted; measured at fewer places than there are: what is left could not save it",
    ]

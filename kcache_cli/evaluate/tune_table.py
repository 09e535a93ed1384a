"""What ``kcache tune`` tried, as a Markdown table."""

from __future__ import annotations

from collections.abc import Sequence

from kcache_cli.evaluate import fidelity_table
from kcache_cli.rows.formats import Column, Row, origin, table
from kcache_cli.text import one_line

COMMAND = "kcache tune"
NAMES = fidelity_table.NAMES | {"reaches_target"}
"""Fields every row has."""

_SHOWN = ("policy", "N", "rows/KV head", "link/token", "KL", "± s.e.", "top-1", "device V", "places")
_COLUMNS: list[Column] = [
    *(column for column in fidelity_table.COLUMNS if column[0] in _SHOWN),
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
        origin(first),
        f"{first['steps']} teacher-forced steps after {first['ctx']:,} tokens at each place of "
        f"{one_line(first['text'])}; "
        f"KL at most {first['target_kl']:g} nats and device V at most {first['most_device_overhead']:.1%} of a full KV "
        "cache were wanted; measured at fewer places than there are: what is left could not save it",
    ]

"""Rows of ``kcache eval fidelity``: what makes two the same measurement, and the Markdown table."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kcache_cli.rows.formats import Column, Row, cell, megabytes, number, origin, table
from kcache_cli.text import one_line

if TYPE_CHECKING:
    from kcache.evaluate.figures import Figures

COMMAND = "kcache eval fidelity"
NAMES = {"model", "policy", "ctx", "steps", "starts", "places", "by_place"}
"""Fields every row has."""
_SETTINGS = ("model", "text_sha256", "ctx", "steps", "dtype", "device", "policy")


def settings_of(row: Row) -> str:
    """How each place of the row was measured: figures of rows that agree in it may be put together."""
    return json.dumps([row.get(name) for name in _SETTINGS], sort_keys=True)


def identity(row: Row) -> str:
    """What the row measures: the same at the same places."""
    return settings_of(row) + json.dumps(row["starts"])


def is_whole(row: Row) -> bool:
    """Whether every place asked for has been measured."""
    return row["places"] == len(row["starts"])


def figures_there(rows: Sequence[Row], wanted: Row) -> list[Figures]:
    """Figures that rows measured in the same way hold of the places that ``wanted`` asks for.

    Raises
    ------
    InputError
        If what a row holds is something else.
    """
    from kcache.evaluate.figures import Figures

    alike = [row for row in rows if settings_of(row) == settings_of(wanted)]
    found = [Figures.from_dict(each) for row in alike for each in row["by_place"]]
    return list({each.start: each for each in found if each.start in wanted["starts"]}.values())


def markdown(rows: Sequence[Row]) -> str:
    """A table of the sweep, and how it was measured."""
    return table(rows, _columns(rows), _legend(rows) if rows else [])


def _worst(row: Row) -> str:
    """The three layers with the largest error."""
    errors = sorted(enumerate(row["per_layer_error"]), key=lambda pair: -pair[1])[:3]
    return ", ".join(f"{layer} ({error:.2f})" for layer, error in errors if error)


COLUMNS: tuple[Column, ...] = (
    ("policy", lambda row: cell(row["policy_name"])),
    ("N", lambda row: number(row, "topn", "d")),
    ("rows/KV head", lambda row: number(row, "rows_per_kv_head", ".0f", zero="exact")),
    ("link/token", lambda row: megabytes(row, "bytes_h2d_per_token")),
    ("KL", lambda row: number(row, "kl_mean", ".4f")),
    ("± s.e.", lambda row: number(row, "kl_se", ".4f")),
    ("KL p99", lambda row: number(row, "kl_p99", ".3f")),
    ("top-1", lambda row: number(row, "top1", ".3f")),
    ("ppl", lambda row: number(row, "ppl_kcache", ".2f")),
    ("ppl full", lambda row: number(row, "ppl_full", ".2f")),
    ("mass", lambda row: number(row, "mass", ".3f")),
    ("device V", lambda row: number(row, "device_overhead", ".1%")),
    ("worst layers", _worst),
    ("places", lambda row: str(row["places"]) if is_whole(row) else f"{row['places']}/{len(row['starts'])}"),
)


def _columns(rows: Sequence[Row]) -> list[Column]:
    """With one for each of model, text and context that differs."""
    more = [(name, lambda row, name=name: cell(str(row[name]))) for name in various(rows)]
    return [COLUMNS[0], *more, *COLUMNS[1:]]


def various(rows: Sequence[Row]) -> list[str]:
    """Which of model, text and context are not the same in all rows."""
    return [name for name in ("model", "text", "ctx") if len({row[name] for row in rows}) > 1]


def _legend(rows: Sequence[Row]) -> list[str]:
    first = rows[0]
    texts = ", ".join(dict.fromkeys(one_line(row["text"]) for row in rows))
    contexts = " / ".join(f"{ctx:,}" for ctx in sorted({row["ctx"] for row in rows}))
    return [
        origin(first),
        f"{first['steps']} teacher-forced steps after {contexts} tokens at each place of {texts}; KL in nats from full "
        "attention; device V: what the cache keeps on the device beside K, of a full KV cache",
    ]

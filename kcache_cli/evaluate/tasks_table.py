"""Rows of ``kcache eval tasks`` as a table: scores with their standard errors, and agreement question by question."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict

from kcache_cli.rows.formats import Column, Row, number, origin, table

COMMAND = "kcache eval tasks"
NAMES = {"task", "doc", "digest", "scores"}


def _score(row: Row) -> str:
    error = "" if math.isnan(row["stderr"]) else f" ± {row['stderr']:.3f}"  # one question has none
    return f"{row['score']:.3f}{error}"


_COLUMNS: list[Column] = [
    ("task", lambda row: row["task"]),
    ("metric", lambda row: f"{row['metric']}, {row['filter']}"),
    ("engine", lambda row: "dense" if row["topn"] is None else f"N={row['topn']}"),
    ("questions", lambda row: str(row["questions"])),
    ("score", _score),
    ("no answer", lambda row: str(row["unanswered"] or "")),
    ("same answer", lambda row: number(row, "same_answer", "d")),
    ("same reply", lambda row: number(row, "same_reply", "d")),
    ("lost", lambda row: number(row, "lost", "d")),
    ("won", lambda row: number(row, "won", "d")),
]


def markdown(rows: Sequence[Row]) -> str:
    """One line per task, metric and N; rows that lm-eval has not judged yet are only counted."""
    from kcache.evaluate.agreement import summarise

    if not rows:
        return ""
    waiting = sum(not row["scores"] for row in rows)
    legend = [
        origin(rows[0]),
        "same answer, same reply: questions answered as full attention does, by the answer read out of the reply and "
        "to the letter; lost, won: questions that score lower and higher than with it",
    ]
    if waiting:
        legend.append(f"{waiting} rows are not judged yet; --resume finishes the run")
    return table([asdict(line) for line in summarise(rows)], _COLUMNS, legend)

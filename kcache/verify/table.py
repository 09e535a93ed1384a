"""The table of verdicts as Markdown: written by ``kcache models --verify``, read back by the test that guards it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from kcache.verify.verdict import KINDS, Verdict

_HEAD = ("model type", "class", "verdict", "reason")


def markdown(verdicts: Sequence[Verdict]) -> str:
    """The rows as a Markdown table, newline at the end."""
    rows = [(each.model_type, f"`{each.model_class}`", each.kind, _cell(each)) for each in verdicts]
    lines = [_line(_HEAD), _line(["---"] * len(_HEAD)), *map(_line, rows)]
    return "\n".join(lines) + "\n"


def summary(verdicts: Sequence[Verdict]) -> str:
    """One line: how many of each verdict."""
    counts = Counter(verdict.kind for verdict in verdicts)
    exact = [verdict for verdict in verdicts if verdict.exact]
    tiered = sum(1 for verdict in exact if verdict.tiered)
    parts = [f"{counts[kind]} {kind}" for kind in KINDS if counts[kind]]
    served = f"{len(exact)} are served exactly, {tiered} of them with tiered layers"
    if len(verdicts) == 1:
        return f"1 entry: {parts[0]}."
    return f"{len(verdicts)} entries: {'; '.join(parts)}. {served}."


def read(text: str) -> dict[str, str]:
    """Model type to verdict, from a table that :func:`markdown` wrote."""
    rows = [
        [cell.strip() for cell in line.strip("|").split(" | ")] for line in text.splitlines() if line.startswith("|")
    ]
    return {row[0]: row[2] for row in rows if len(row) == len(_HEAD) and row[2] in KINDS}


def _cell(verdict: Verdict) -> str:
    if verdict.kind == "exact, stock layers" and verdict.tiered:
        return f"{verdict.tiered} of {verdict.layers} layers tiered; stock: {verdict.reason}"
    return verdict.reason


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '/') for cell in cells)} |"

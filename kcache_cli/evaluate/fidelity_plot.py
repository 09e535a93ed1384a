"""A chart of a sweep: KL from full attention against bytes over the link per token, a line per policy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kcache_cli.evaluate.fidelity_table import various
from kcache_cli.rows.chart import save
from kcache_cli.rows.formats import Row


def draw(rows: Sequence[Row], path: Path) -> None:
    """Draw the rows that fetched something, each point with its N; the kind of file is that of the name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    lines = _lines(rows)
    for name, points in lines.items():
        megabytes = [row["bytes_h2d_per_token"] / 1e6 for row in points]
        kl, spread = [row["kl_mean"] for row in points], [row["kl_se"] or 0.0 for row in points]
        axes.errorbar(megabytes, kl, yerr=spread, marker="o", markersize=4, capsize=3, label=name)
        for row, x, y in zip(points, megabytes, kl, strict=True):
            axes.annotate(str(row["topn"]), (x, y), textcoords="offset points", xytext=(5, 5), fontsize=7)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("MB over the link per token (points: N)")
    axes.set_ylabel("KL from full attention (nats)")
    axes.grid(alpha=0.3)
    if lines:
        axes.legend(fontsize=8)
        axes.set_title(_title(rows), fontsize=9)
    save(figure, path)


def _lines(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Rows by policy, and by text and model where there are several, in order of bytes."""
    fields = ("policy_name", *various(rows))
    found: dict[str, list[Row]] = {}
    for row in rows:
        if row["bytes_h2d_per_token"] > 0 and row["kl_mean"] > 0:
            name = ", ".join(str(row[field]) for field in fields)
            found.setdefault(name, []).append(row)
    return {name: sorted(points, key=lambda row: row["bytes_h2d_per_token"]) for name, points in found.items()}


def _title(rows: Sequence[Row]) -> str:
    parts = {name: dict.fromkeys(str(row[name]) for row in rows) for name in ("model", "text", "dtype")}
    contexts = sorted({row["ctx"] for row in rows})
    shown = [next(iter(values)) for values in parts.values() if len(values) == 1]
    return " · ".join(shown + ([f"context {contexts[0]:,}"] if len(contexts) == 1 else []))

"""The answer of ``kcache plan`` as a table with bars, as plain values, and as a picture."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kcache_cli.console import answers, plain_table, put
from kcache_cli.rows.chart import save
from kcache_cli.text import one_line, size, tokens

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from kcache.planning.plan import Method
    from kcache_cli.plan_run import Answer

TITLES = {"full": "full KV", "kcache": "KCache"}
_BAR = 28
_DECADES = 2.5


def to_dict(answer: Answer) -> dict[str, Any]:
    """Everything as plain values."""
    planner, question = answer.planner, answer.question
    return {
        "model": question.model.name,
        "ctx": answer.ctx,
        "batch": question.batch or "auto",
        "model_ctx": answer.context,
        "policy": planner.policy.to_dict(),
        "dtype_bytes": planner.shape.dtype_bytes,
        "device": {
            "name": answer.machine,
            "source": answer.source,
            "device_bytes": planner.pools.device_bytes,
            "host_bytes": planner.pools.host_bytes,
            "memory_gb_s": planner.speeds.memory_gb_s,
            "gather_gb_s": planner.speeds.gather_gb_s,
            "compute_tflops": planner.speeds.compute_tflops,
        },
        "hit_rate": planner.hit_rate,
        "methods": {name: _method(method) for name, method in answer.methods.items()},
        "curve": [
            {"ctx": ctx, **{f"{name}_tok_s_predicted": answer.curves[name][at] for name in answer.methods}}
            for at, ctx in enumerate(answer.ctxs)
        ],
        "notes": answer.notes,
    }


def _method(method: Method) -> dict[str, Any]:
    need, fit, predicted = method.need, method.fit, method.predicted
    return {
        "fits": fit.short is None,
        "short_of": fit.short,
        "batch": method.batch,
        "weights_bytes": method.weights_bytes,
        "k_bytes": need.k_bytes,
        "v_bytes": need.v_bytes,
        "resident_v_bytes": need.resident_v_bytes,
        "tail_bytes": need.overhead_bytes,
        "scratch_bytes": fit.scratch_bytes,
        "overhead_bytes": need.overhead_bytes + fit.scratch_bytes,
        "activation_bytes": fit.activation_bytes,
        "unused_bytes": fit.unused_bytes,
        "device_kv_bytes": need.device_bytes,
        "device_bytes": method.device_bytes,
        "host_bytes": method.host_bytes,
        "resident_layers": need.resident_layers,
        "layers": need.layers,
        "max_batch": method.max_batch,
        "max_ctx": method.max_ctx,
        "tok_s_predicted": None if predicted is None else predicted.tok_s,
        "step_ms_predicted": None if predicted is None else predicted.step_ms,
        "predicted": None if predicted is None else asdict(predicted),
    }


def show(answer: Answer) -> None:
    """Print the answer."""
    console = answers()
    batch = "the fastest batch that fits" if answer.question.batch is None else f"batch {answer.question.batch}"
    if answer.question.batch is None and not any(method.max_batch for method in answer.methods.values()):
        batch = "no batch fits"
    console.print(f"{one_line(answer.question.model.name)} · {answer.ctx:,} tokens · {batch}", style="bold")
    console.print(_machine_line(answer), style="dim")
    console.print()
    console.print(_table(answer))
    console.print()
    _bars(console, answer)
    for note in answer.notes:
        put(console, f"note: {note}", "yellow")


def _machine_line(answer: Answer) -> str:
    planner = answer.planner
    pools, speeds = planner.pools, planner.speeds
    if pools.device_bytes is None:
        memory = f"RAM {size(pools.host_bytes)} for both tiers"
    else:
        here = " (free here now; --host for another machine's)" if answer.question.host is None else ""
        memory = f"device {size(pools.device_bytes)}, host {size(pools.host_bytes)}{here}"
    return (
        f"{answer.machine} · {memory} · memory {speeds.memory_gb_s:,.0f} GB/s, gather {speeds.gather_gb_s:,.1f} GB/s "
        f"({answer.source})"
    )


def _table(answer: Answer) -> Table:
    table = plain_table()
    table.add_column("")
    for name in answer.methods:
        table.add_column(TITLES[name], justify="right", overflow="fold")
    ctx, asked = answer.ctx, answer.question.batch
    methods = list(answer.methods.values())

    def row(label: str, values: list[str], style: str | None = None) -> None:
        table.add_row(label, *values, style=style)

    row("batch", [f"{method.batch:,}" for method in methods])
    row("weights", [size(method.weights_bytes) for method in methods])
    row("K", [size(method.need.k_bytes) for method in methods])
    row("V on the device", [size(method.need.resident_v_bytes) for method in methods])
    row("policy: tail of V, scratch", [size(m.need.overhead_bytes + m.fit.scratch_bytes) for m in methods])
    row("activations", [size(method.fit.activation_bytes) for method in methods])
    row("device, all", [size(method.device_bytes) for method in methods], "bold")
    if any(method.fit.unused_bytes for method in methods):
        row("and kept free, at least", [size(method.fit.unused_bytes) for method in methods])
    row("host: V", [size(method.host_bytes) for method in methods], "bold")
    row("layers whose V stays", [_resident(method) for method in methods])
    row("fits", [f"no: {m.fit.short} memory" if m.fit.short else "yes" for m in methods])
    row(f"largest batch at {ctx:,}", [f"{method.max_batch:,}" for method in methods])
    row(f"longest context at batch {asked or 1}", [_longest(method) for method in methods])
    row("predicted: a step", [_milliseconds(method) for method in methods])
    row("predicted: link per token", [_link(method) for method in methods])
    row("predicted: tok/s", [_speed(method) for method in methods], "bold")
    return table


def _resident(method: Method) -> str:
    need = method.need
    if not need.layers:
        return "-"
    if need.resident_layers in (0, need.layers):
        return f"{'all' if need.resident_layers else 'none'} of {need.layers}"
    return f"0-{need.resident_layers - 1} of {need.layers}" if need.resident_layers > 1 else f"0 of {need.layers}"


def _longest(method: Method) -> str:
    from kcache.planning.fitting import MOST_TOKENS

    return f"{method.max_ctx:,}" if method.max_ctx < MOST_TOKENS - 1 else "any"


def _milliseconds(method: Method) -> str:
    predicted = method.predicted
    return "-" if predicted is None else f"{predicted.step_ms:,.2f} ms ({predicted.bound})"


def _link(method: Method) -> str:
    return "-" if method.predicted is None else f"{method.predicted.link_bytes / method.batch / 1e6:.2f} MB"


def _speed(method: Method) -> str:
    return "-" if method.predicted is None else f"{method.predicted.tok_s:,.1f}"


def _bars(console: Console, answer: Answer) -> None:
    """Bars of tokens per second on a logarithmic scale, full attention and KCache under each context."""
    from rich.table import Table

    values = [value for curve in answer.curves.values() for value in curve if value]
    if not values:
        return
    top = max(values)
    block = "#" if console.options.ascii_only else "█"
    batch = "each at its fastest batch" if answer.question.batch is None else f"batch {answer.question.batch}"
    console.print(f"predicted tok/s by context, {batch} (log scale)", style="bold")
    table = Table(box=None, pad_edge=False, show_header=False)
    for column in ("right", "left", "left", "right", "right"):
        table.add_column(justify=column, no_wrap=True)  # type: ignore[arg-type]
    for at, ctx in enumerate(answer.ctxs):
        full = answer.curves["full"][at]
        for name, curve in answer.curves.items():
            value = curve[at]
            ratio = f"×{value / full:.2f}" if name == "kcache" and value and full else ""
            shown = "does not fit" if value is None else f"{value:,.1f}"
            bar = block * _length(value, top)
            label = tokens(ctx) if name == "full" else ""
            table.add_row(label, TITLES[name], bar, shown, ratio, style="cyan" if name == "kcache" else None)
    console.print(table)


def _length(value: float | None, top: float) -> int:
    """Cells of a bar: each decade below the fastest takes the same part of it away, down to one cell."""
    if not value:
        return 0
    return max(1, round(_BAR * (1 + math.log10(value / top) / _DECADES)))


def draw(answer: Answer, path: Path) -> None:
    """Draw the curves; the kind of file is that of the name."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for name, curve in answer.curves.items():
        axes.plot(answer.ctxs, [math.nan if value is None else value for value in curve], "o-", label=TITLES[name])
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(answer.ctxs, [tokens(ctx) for ctx in answer.ctxs])
    axes.set_xlabel("context, tokens")
    axes.set_ylabel("predicted tok/s")
    axes.set_title(f"{one_line(answer.question.model.name)} on {answer.machine}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)

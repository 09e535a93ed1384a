"""``kcache inspect --once`` for people: the state of a run as tables."""

from __future__ import annotations

from kcache.watch.frame import Frame, LayerFrame
from kcache.watch.source import Source
from kcache_cli.console import answers, plain_table
from kcache_cli.text import one_line, size

_SHOWN_SEQUENCES = 16
_LONGEST_NAME = 32
_LEGEND = (
    "rows in all: V rows that decode steps have fetched · link in all: their bytes, and those of V that prompts read "
    "back · attn: share of attention that the picks of the last step hold · reuse: share of them that the step before "
    "had picked, too"
)


def show(source: Source, frame: Frame | None, index: int | None = None) -> None:
    """Print the state of a source at a frame, which has that index or is the newest; there is none before its first."""
    console = answers()
    info = source.info
    where = "host-only run: both tiers are RAM" if info.host_only else info.device
    console.print(one_line(f"{info.model} · kcache {info.command}, process {info.pid} · {where}"), style="bold")
    if source.closed is not None:
        console.print(one_line(source.closed), style="yellow")
    if frame is None:
        console.print("no step yet")
        return
    for line in _summary(frame, info.host_only, info.weights_bytes):
        console.print(line)
    names = source.names(index)
    if frame.began > 1 or names:
        console.print(_sequences(frame, names))
    if frame.layers:
        console.print()
        console.print(_table(frame.layers))
        console.print()
        console.print(_LEGEND, style="dim")


def _summary(frame: Frame, host_only: bool, weights: int) -> list[str]:
    totals, speed = frame.totals, frame.speed
    tier = "device tier (RAM)" if host_only else "device"
    figures = [f"{frame.phase} · run {frame.run} · {frame.tokens:,} tokens · step {frame.step:,}"]
    if frame.job is not None:
        figures[0] += f" · {frame.job[0]:,} of {frame.job[1]:,} prompts"
    if speed.tok_s is not None:
        figures[0] += f" · decode {speed.tok_s:.1f} tok/s"
    if speed.ttft_ms is not None:
        figures[0] += f" · TTFT {speed.ttft_ms / 1e3:.1f} s"
    figures.append(
        f"cache: {tier} {size(totals.device_bytes)} · host tier {size(totals.host_bytes)} · "
        f"a full one {size(totals.full_kv_bytes)} · beside it the weights, {size(weights)}"
    )
    hits = f" · {totals.hot_hits / totals.rows_fetched:.0%} hot" if totals.hot_hits else ""
    figures.append(
        f"link in all: {size(totals.bytes_h2d)} in, {size(totals.bytes_d2h)} out · {totals.rows_fetched:,} rows{hits}"
    )
    return figures


def _sequences(frame: Frame, names: tuple[str, ...]) -> str:
    """How far the sequences are, by their names or numbers, and of a large batch how many of them are not told."""
    told = []
    for at, sequence in enumerate(frame.sequences[:_SHOWN_SEQUENCES]):
        name = one_line(names[at]) if at < len(names) else f"sequence {at}"
        name = name if len(name) <= _LONGEST_NAME else f"{name[: _LONGEST_NAME - 1]}…"
        told.append(f"{name} {sequence.completion_tokens:,}{' done' if sequence.done else ''}")
    left = len(frame.sequences) - len(told)
    return "new tokens: " + " · ".join([*told, *([f"and of {left:,} more"] if left else [])])


def _table(layers: tuple[LayerFrame, ...]) -> object:

    table = plain_table()
    headings = ("layer", "kind", "mode", "device", "host", "link in all", "rows in all", "attn", "reuse")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="left" if number in (1, 2) else "right")
    for layer in layers:
        stats = layer.stats
        table.add_row(
            str(layer.index),
            layer.kind,
            layer.mode,
            size(stats.device_bytes),
            size(stats.host_bytes),
            size(stats.bytes_h2d),
            f"{stats.rows_fetched:,}",
            "" if layer.mass is None else f"{layer.mass.mean():.2f}",
            "" if layer.overlap is None else f"{layer.overlap:.2f}",
        )
    return table

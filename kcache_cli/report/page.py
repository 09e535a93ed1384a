"""A run as a page: everything that is shown, gathered and handed to the template."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import kcache
from kcache.errors import InputError
from kcache.watch.frame import HALF_LIFE_STEPS, Frame
from kcache.watch.source import Source
from kcache_cli.report.charts import Axis
from kcache_cli.report.colours import picture, ramp
from kcache_cli.report.heat import Heat, Maps
from kcache_cli.report.samples import Samples, frames
from kcache_cli.report.tables import figures, job_figures, layer_table, memory_bars, run_rows, turn_rows
from kcache_cli.report.text import turns
from kcache_cli.report.timeline import charts, clock, readout, x_ticks
from kcache_cli.text import one_line, printable, size

if TYPE_CHECKING:
    from jinja2 import Environment


@dataclass(frozen=True)
class Read:
    """A source, read once: its samples, its heat maps, the last frame, and the last frame of each run."""

    samples: Samples
    maps: Maps | None
    last: Frame
    ends: list[tuple[int, Frame]]


def read(source: Source, run: int | None = None) -> Read:
    """Read all frames of a source, and the heat maps of one run or the latest that has any.

    Raises
    ------
    InputError
        If there is none.
    """
    samples, heat = Samples(), Heat()
    before: Frame | None = None
    began_s = 0.0
    ends: list[tuple[int, Frame]] = []
    for index, frame in frames(source):
        began_s = frame.time_s if before is None else began_s
        samples.add(frame, before, began_s)
        if run in (None, frame.run):
            heat.add(frame)
        if ends and ends[-1][1].run == frame.run:
            ends.pop()
        ends.append((index, frame))
        before = frame
    if before is None:
        raise InputError("there is nothing to report: no step was recorded")
    return Read(samples, heat.maps(), before, ends)


def write(source: Source, target: Path, name: str, run: int | None = None) -> None:
    """Write the page of a source through a temporary file; ``name`` says what it is of."""
    from kcache_cli.replace import replace

    replace(target, page(source, name, run).encode("utf-8", "replace"))


def page(source: Source, name: str, run: int | None = None) -> str:
    """The page of a source, as HTML; what is of one cache is of that ``run``, or of the latest.

    Raises
    ------
    InputError
        If there is nothing to show, or no such run.
    """
    environment = _environment()
    script, style = (_asset(environment, asset) for asset in ("page.js", "page.css"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    html: str = environment.get_template("page.html").render(
        **_shown(source, read(source, run), name, run), script=script, style=style, script_digest=digest
    )
    return html


def _shown(source: Source, found: Read, name: str, run: int | None) -> dict[str, Any]:
    """Everything the template names."""
    info, samples, maps = source.info, found.samples, found.maps
    axis = Axis(len(samples))
    index, frame = _end_of(found, run if run is not None else maps.run if maps is not None else found.last.run)
    names = [source.names(at) for at, _ in found.ends]
    heat = None if maps is None else maps.history.mean(0)
    headings, layers = layer_table(frame)
    drawn = charts(samples, axis, info.host_only)
    return {
        "version": kcache.__version__,
        "name": one_line(name),
        "info": info,
        "tier": "device tier (RAM)" if info.host_only else "device",
        "began": _date(info.started_s),
        "lasted": clock(samples.seconds[-1]),
        "problem": source.closed,
        "several_runs": len(found.ends) > 1,
        "frame": frame,
        "job": job_figures(samples, found.ends),
        "figures": figures(samples, frame, maps),
        "bars": memory_bars(frame, info.weights_bytes),
        "charts": drawn,
        "x_ticks": x_ticks(samples, axis),
        "prefills": axis.bands([phase == "prefill" for phase in samples.phase]),
        "begins": _begins(samples, axis),
        "data": {
            "charts": {chart.name: [{"label": s.label, "values": s.values} for s in chart.shapes] for chart in drawn},
            "readout": readout(samples, axis),
            "rows": {} if maps is None else _row_names(maps),
            "bucket": 1 if maps is None else maps.bucket_tokens,
            "tokens": frame.tokens,
        },
        "maps": maps,
        "pictures": None if maps is None else _pictures(maps),
        "ramps": (ramp(dark=False), ramp(dark=True)),
        "half_life": HALF_LIFE_STEPS,
        "marks": _marks(frame),
        "headings": headings,
        "layers": layers,
        "turns": turn_rows(frame),
        "runs": run_rows(samples, found.ends, names),
        "names": source.names(index),
        "text": turns(source, index, frame, heat),
        "policy": {str(key): "" if value is None else str(value) for key, value in info.policy.items()},
        "environment": {**info.environment, "device": info.device, "weights": size(info.weights_bytes)},
        "memory": {key: size(value) for key, value in asdict(frame.memory).items() if value},
    }


def _end_of(found: Read, run: int) -> tuple[int, Frame]:
    """The last frame of a run, with its index."""
    for index, frame in reversed(found.ends):
        if frame.run == run:
            return index, frame
    runs = [frame.run for _, frame in found.ends]
    raise InputError(f"--run {run}: no such run; there are runs {min(runs)} to {max(runs)}")


def _date(seconds: float) -> str:
    try:
        return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):  # no date, whatever the recording says
        return ""


def _begins(samples: Samples, axis: Axis) -> list[float]:
    """Where a prompt begins to be read, in percent."""
    phases = ["", *samples.phase]
    return [
        axis.at(at) - 50 / axis.count
        for at in range(1, len(samples))
        if samples.phase[at] == "prefill" and phases[at] != "prefill"
    ]


def _pictures(maps: Maps) -> dict[str, Any]:
    return {name: picture(getattr(maps, name), maps.held[name]) for name in ("last", "history", "steps")}


def _row_names(maps: Maps) -> dict[str, list[str]]:
    layers = [f"layer {index}" for index in maps.layers]
    steps = range(maps.first_step, maps.first_step + len(maps.steps) * maps.steps_per_row, maps.steps_per_row)
    return {"last": layers, "history": layers, "steps": [f"step {step:,}" for step in steps]}


def _marks(frame: Frame) -> list[dict[str, Any]]:
    """Turn boundaries on the axis of a heat map, in percent."""
    span = frame.buckets * frame.bucket_tokens
    return [{"at": 100 * mark.start / span, "role": mark.role, "start": mark.start} for mark in frame.marks if span]


def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("kcache_cli.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["size"] = size
    environment.finalize = _finalize
    return environment


def _finalize(value: object) -> object:
    """Drop control characters from text; what the template itself marks as HTML is left alone."""
    return printable(value) if type(value) is str else value


def _asset(environment: Environment, name: str) -> str:
    assert environment.loader is not None
    source, _, _ = environment.loader.get_source(environment, name)
    return source

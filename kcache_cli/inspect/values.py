"""The state of a run as plain values, for scripts, and frames as rows, for tables elsewhere."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from kcache.telemetry import Stats
from kcache.watch.frame import Frame, LayerFrame
from kcache.watch.source import Source


def state(source: Source, frame: Frame | None, index: int | None = None) -> dict[str, Any]:
    """The state of a source at a frame, which has that index or is the newest; counters are 0 before its first."""
    info = source.info
    names = source.names(index)
    totals = asdict(Stats() if frame is None else frame.totals)
    return {
        "pid": info.pid,
        "model": info.model,
        "command": info.command,
        "device": info.device,
        "host_only": info.host_only,
        "live": source.live,
        "problem": source.closed,
        **(_moment(frame, names) if frame is not None else {}),
        **totals,
        "weights_bytes": info.weights_bytes,
        "policy": info.policy,
        "layers": [] if frame is None else [_layer(layer) for layer in frame.layers],
    }


def rows(frame: Frame) -> list[dict[str, Any]]:
    """A row for each layer, without histograms and mass of single heads."""
    return [
        {
            **{name: value for name, value in _moment(frame).items() if name not in ("memory", "job", "sequences")},
            **{name: value for name, value in _layer(layer).items() if name not in ("histogram", "held", "mass")},
            "mean_mass": None if layer.mass is None else round(float(layer.mass.mean()), 4),
        }
        for layer in frame.layers
    ]


def _moment(frame: Frame, names: tuple[str, ...] = ()) -> dict[str, Any]:
    named = names if len(names) == len(frame.sequences) else (None,) * len(frame.sequences)
    return {
        "time_s": round(frame.time_s, 3),
        "run": frame.run,
        "phase": frame.phase,
        "batch": frame.batch,
        "bucket_tokens": frame.bucket_tokens,
        **asdict(frame.speed),
        "memory": asdict(frame.memory),
        "job": frame.job,
        "sequences": [
            {"name": name, **asdict(sequence)} for name, sequence in zip(named, frame.sequences, strict=True)
        ],
    }


def _layer(layer: LayerFrame) -> dict[str, Any]:
    return {
        "index": layer.index,
        "kind": layer.kind,
        "mode": layer.mode,
        **asdict(layer.stats),
        "overlap": layer.overlap,
        "mass": None if layer.mass is None else [round(float(share), 4) for share in layer.mass],
        "histogram": layer.histogram.tolist(),
        "held": None if layer.held is None else [round(float(share), 6) for share in layer.held],
    }

"""Turning live layers into the immutable pictures of :mod:`kcache.telemetry`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from kcache.layers.tiered import TieredLayer
from kcache.telemetry import LayerSnapshot, Stats


def layer_snapshot(index: int, layer: Any, picks: bool) -> LayerSnapshot:
    """Picture one layer of a cache, tiered or stock; ``picks`` copies the last step's picks to the host."""
    if isinstance(layer, TieredLayer):
        return LayerSnapshot(
            index=index,
            kind=layer.kind,
            mode=layer.mode,
            stats=layer.stats(),
            picks=_frozen(layer.picks, torch.int32) if picks else None,
            mass=_frozen(layer.mass, torch.float32) if picks else None,
            weights=_frozen(layer.weights, torch.float32) if picks else None,
        )
    keys, values = getattr(layer, "keys", None), getattr(layer, "values", None)
    k_bytes, held = _nbytes(keys), sum(_nbytes(value) for value in vars(layer).values())
    stats = Stats(
        device_bytes=held,
        k_bytes=k_bytes,
        resident_v_bytes=_nbytes(values),
        overhead_bytes=held - k_bytes - _nbytes(values),
        full_kv_bytes=held,
        tokens=layer.get_seq_length() if hasattr(layer, "get_seq_length") else 0,
    )
    return LayerSnapshot(index=index, kind="stock", mode="idle", stats=stats)


def total(layers: Iterable[Stats]) -> Stats:
    """Add up layers; ``steps`` and ``tokens`` are the largest of any layer."""
    layers = list(layers)
    sums = {
        name: sum(getattr(stats, name) for stats in layers)
        for name in Stats.__dataclass_fields__
        if name not in ("steps", "tokens")
    }
    return Stats(
        **sums,
        steps=max((stats.steps for stats in layers), default=0),
        tokens=max((stats.tokens for stats in layers), default=0),
    )


def _nbytes(value: object) -> int:
    if isinstance(value, torch.Tensor):
        return value.nbytes if value.dim() else 0
    if isinstance(value, dict):
        return sum(_nbytes(item) for item in value.values())
    return 0


def _frozen(tensor: torch.Tensor | None, dtype: torch.dtype) -> np.ndarray | None:
    if tensor is None:
        return None
    array = tensor.to(dtype=dtype, device="cpu").numpy().copy()
    array.flags.writeable = False
    return array

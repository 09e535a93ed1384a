"""Heat maps of a run: where each layer looked last, over the answer, and at every step.

Everything is in shares of a layer's picks, so that layers that fetch more rows do not outshine the others. Arrays are
``[layers, buckets]`` or ``[steps, buckets]``; buckets are those of the last frame of the run that is shown.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from kcache.watch.frame import HALF_LIFE_STEPS, Frame

MOST_ROWS = 240
"""Rows of the picture of steps; of a longer answer, several steps share one."""


@dataclass(frozen=True)
class Maps:
    """What :class:`Heat` found.

    Attributes
    ----------
    last, history : ndarray ``[layers, buckets]``
        Shares of each layer's picks at the last step, and decayed over the steps before.
    steps : ndarray ``[rows, buckets]``
        Mean over layers, a row for ``steps_per_row`` steps from ``first_step`` on.
    held : dict of str to ndarray
        The attention that those picks hold, for each of ``last``, ``history`` and ``steps``; NaN where a recording does
        not say.
    first_step, steps_per_row : int
    run, tokens, bucket_tokens : int
        Of the frame the buckets are those of.
    layers : list of int
        Indices of the layers that pick, a row of ``last`` and ``history`` each.
    would : bool
        They attended exactly, and this is what would have been picked.
    """

    last: np.ndarray
    history: np.ndarray
    steps: np.ndarray
    held: dict[str, np.ndarray]
    first_step: int
    steps_per_row: int
    run: int
    tokens: int
    bucket_tokens: int
    layers: list[int]
    would: bool


class Heat:
    """Takes the frames of a run in order; a new run begins anew once it picks something."""

    def __init__(self) -> None:
        self._latest: Frame | None = None
        self._history = _Decaying(0, (0, 0))
        self._held = _Decaying(0, (0, 0))
        self._rows: list[tuple[int, int, np.ndarray]] = []

    def add(self, frame: Frame) -> None:
        """Take in a frame."""
        heat = frame.heat
        if not frame.step or not heat.any():
            return
        before = self._latest
        if before is None or before.run != frame.run or before.tokens > frame.tokens + before.bucket_tokens:
            self._history, self._held = _Decaying(frame.step - 1, heat.shape), _Decaying(frame.step - 1, heat.shape)
            self._rows, before = [], None
        if before is not None and frame.step == before.step:
            self._latest = frame
            return
        shares, held = _normal(heat.astype(np.float64)), _held_in(frame)
        if before is not None:
            for past in (self._history, self._held):
                past.sums = rebucketed(past.sums, before.bucket_tokens, frame.bucket_tokens, frame.buckets)
        self._history.add(frame.step, shares)
        if not np.isnan(held).any():
            self._held.add(frame.step, held)
        self._latest = frame
        row = np.stack([shares, held])[:, heat.any(1)].mean(1).astype(np.float32)
        self._rows.append((frame.step, frame.bucket_tokens, row))

    def maps(self) -> Maps | None:
        """What was found; None where nothing was picked."""
        frame = self._latest
        if frame is None:
            return None
        width, buckets = frame.bucket_tokens, frame.buckets
        picking = [index for index in range(len(frame.layers)) if self._history.sums[index].any()]
        rows = np.stack([rebucketed(row, old, width, buckets) for _, old, row in self._rows])
        each = -(-len(rows) // MOST_ROWS)
        starts = np.arange(0, len(rows), each)
        sizes = np.diff(np.append(starts, len(rows)))
        steps = np.add.reduceat(rows, starts, axis=0) / sizes[:, None, None]
        held = {"last": _held_in(frame)[picking], "history": self._held.mean()[picking], "steps": steps[:, 1]}
        return Maps(
            last=_normal(frame.heat.astype(np.float64))[picking],
            history=_normal(self._history.sums)[picking],
            steps=steps[:, 0],
            held=held,
            first_step=self._rows[0][0],
            steps_per_row=each,
            run=frame.run,
            tokens=frame.tokens,
            bucket_tokens=width,
            layers=[frame.layers[index].index for index in picking],
            would=all(frame.layers[index].mode == "dense" for index in picking),
        )


class _Decaying:
    """A mean over steps from ``step`` on that weighs older ones less."""

    def __init__(self, step: int, shape: tuple[int, ...]) -> None:
        self.sums = np.zeros(shape)
        self._step, self._weight = step, 0.0

    def add(self, step: int, values: np.ndarray) -> None:
        decay = 0.5 ** ((step - self._step) / HALF_LIFE_STEPS)
        self.sums = decay * self.sums + (1 - decay) * values
        self._weight = decay * self._weight + (1 - decay)
        self._step = step

    def mean(self) -> np.ndarray:
        """NaN before the first step."""
        return self.sums / (self._weight or np.nan)


def _held_in(frame: Frame) -> np.ndarray:
    """Shares of attention ``[layers, buckets]``; NaN where a layer picked and does not say."""
    unknown = np.where(frame.heat.any(1, keepdims=True), np.nan, np.zeros(frame.heat.shape))
    rows = [row if layer.held is None else layer.held for layer, row in zip(frame.layers, unknown, strict=True)]
    return np.stack(rows).astype(np.float64)


def _normal(heat: np.ndarray) -> np.ndarray:
    """Each row over its sum."""
    total = heat.sum(-1, keepdims=True)
    return np.divide(heat, total, out=np.zeros_like(heat), where=total > 0)


def rebucketed(values: np.ndarray, width: int, wanted: int, buckets: int) -> np.ndarray:
    """Values per bucket of ``width`` positions as values per bucket of ``wanted``, ``[..., buckets]``.

    Widths are powers of two. Values are sums: narrow buckets are added up, a wide one is spread evenly.
    """
    if wanted < width:
        values = np.repeat(values, width // wanted, axis=-1) / (width // wanted)
    elif wanted > width:
        factor = wanted // width
        padding = -values.shape[-1] % factor
        values = np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, padding)])
        values = values.reshape(*values.shape[:-1], -1, factor).sum(-1)
    found = np.zeros((*values.shape[:-1], buckets), values.dtype)
    shared = min(buckets, values.shape[-1])
    found[..., :shared] = values[..., :shared]
    return found

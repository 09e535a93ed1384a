"""What each offloaded layer shows while a text is forced through it: mass captured, and error of its attention."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch

from kcache.attention.handles import AttentionCall
from kcache.backends import dense
from kcache.layers.attending import AttendingLayer

_EVERY = 8
"""The error is looked at in one of so many steps: exact attention beside each would double the time."""


class LayerLook:
    """Sums over the TopN steps of each layer, kept on its device; see :meth:`KCache.stepwise`."""

    def __init__(self) -> None:
        self.steps: Counter[int] = Counter()
        self._looked: Counter[int] = Counter()
        self._mass: defaultdict[int, torch.Tensor | float] = defaultdict(float)
        self._error: defaultdict[int, torch.Tensor | float] = defaultdict(float)

    def __call__(self, layer: AttendingLayer, call: AttentionCall, out: torch.Tensor) -> None:
        """Take in one step of one layer."""
        if layer.mode != "topn" or layer.mass is None:
            return
        index = layer.index
        self._mass[index] = self._mass[index] + layer.mass.mean()
        if self.steps[index] % _EVERY == 0:
            self._error[index] = self._error[index] + attention_error(layer, call, out)
            self._looked[index] += 1
        self.steps[index] += 1

    def mass(self) -> float | None:
        """Probability the picks held, averaged over steps, layers and query heads; None without a TopN step."""
        steps = self.steps.total()
        return float(sum(float(mass) for mass in self._mass.values())) / steps if steps else None

    def errors(self, layers: int) -> list[float]:
        """Mean error of each of so many layers; 0 for those that attended exactly."""
        return [float(self._error[i]) / self._looked[i] if self._looked[i] else 0.0 for i in range(layers)]


def attention_error(layer: AttendingLayer, call: AttentionCall, out: torch.Tensor) -> torch.Tensor:
    """Distance of ``out`` ``[1, Hq, 1, Dv]`` from exact attention over the same rows, over the length of the latter.

    The rows as the cache keeps them: what keeping them in 8 bits costs is in neither.
    """
    assert layer.keys is not None and layer.values is not None
    values = layer.values.to(out.device)
    exact = dense.attend(call.query, layer.keys, values, None, call.scaling, call.softcap, call.sinks)
    return (out - exact).float().norm() / exact.float().norm()

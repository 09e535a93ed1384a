"""What is measured at one place of a text, and what several places come to."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from kcache.errors import InputError


@dataclass(frozen=True)
class Figures:
    """One policy at one place, beside full attention.

    Attributes
    ----------
    start : int
        Where in the text, in tokens.
    nll_full, nll : float
        Mean negative log-likelihood of the text's next token, in nats, by full attention and under the policy.
    kl : list of float
        KL divergence of each step's prediction from full attention's, in nats.
    top1 : float
        Share of steps with the same likeliest token.
    mass : float or None
        Probability the picked rows held; None if no step picked any.
    rows_per_kv_head : float
        V rows fetched per KV head and step, over the layers that picked; those found on the device count too.
    bytes_h2d_per_token : float
        Bytes over the link per step.
    device_overhead : float
        What the cache held on the device beside K, as a share of a full KV cache.
    layer_error : list of float
        Error of each layer's attention (:func:`~kcache.evaluate.layers.attention_error`); 0 where it is exact. Rows in
        8 bits are taken for what they are there; what they cost shows in ``kl``.
    """

    start: int
    nll_full: float
    nll: float
    kl: list[float]
    top1: float
    mass: float | None
    rows_per_kv_head: float
    bytes_h2d_per_token: float
    device_overhead: float
    layer_error: list[float]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, in order."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Any) -> Figures:
        """Read what :meth:`to_dict` wrote.

        Raises
        ------
        InputError
            If it is something else.
        """
        names = {field.name for field in fields(cls)}
        if not isinstance(data, dict) or set(data) != names:
            raise InputError(f"not the figures of a place: {str(data)[:60]}; they have {', '.join(sorted(names))}")
        return cls(**data)


def summary(places: Sequence[Figures]) -> dict[str, Any]:
    """Perplexities, KL and the rest over all steps of ``places``, of which there is at least one.

    ``kl_se`` is the standard error of the mean over places, None where there is only one.
    """
    means = [statistics.fmean(place.kl) for place in places]
    masses = [place.mass for place in places if place.mass is not None]
    layers = zip(*(place.layer_error for place in places), strict=True)
    return {
        "ppl_full": math.exp(_mean(places, "nll_full")),
        "ppl_kcache": math.exp(_mean(places, "nll")),
        "kl_mean": statistics.fmean(means),
        "kl_se": statistics.stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
        "kl_p99": float(np.percentile([kl for place in places for kl in place.kl], 99)),
        "top1": _mean(places, "top1"),
        "mass": statistics.fmean(masses) if masses else None,
        "rows_per_kv_head": _mean(places, "rows_per_kv_head"),
        "bytes_h2d_per_token": _mean(places, "bytes_h2d_per_token"),
        "device_overhead": _mean(places, "device_overhead"),
        "per_layer_error": [statistics.fmean(errors) for errors in layers],
    }


def _mean(places: Sequence[Figures], name: str) -> float:
    return statistics.fmean(getattr(place, name) for place in places)

"""A moment as the engine hands it over: the counters of each layer, and the picks of a step on their way to the host.

The picks of all layers are put together, one tensor for each stretch of layers on one device. Whoever makes a frame of
them waits for them; the engine does not.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from kcache.cache import KCache
from kcache.layers.counted import Picked
from kcache.layers.snapshots import layer_snapshot
from kcache.layers.tiered import TieredLayer
from kcache.machine.arriving import Arriving
from kcache.watch.columns import KINDS, MODES, STATS
from kcache.watch.frame import Phase

MOST_PICKS = 65_536
"""Picks looked at per step; of a larger batch only the first sequences are observed."""
_KIND = {kind: code for code, kind in enumerate(KINDS)}
_MODE = {mode: code for code, mode in enumerate(MODES)}


@dataclass(frozen=True, slots=True)
class Picks:
    """Picks, what each weighs, and mass of the observed sequences of all layers, flat, layer after layer.

    ``shapes`` has per layer the shape of its picks ``[S, Hkv, N]`` or ``[S, Hkv, G, N]``, which heads that picked
    fewer fill up with -1; ``heads`` its query heads; ``()`` and 0 where it picked nothing.
    """

    step: tuple[int, int]
    observed: int
    shapes: tuple[tuple[int, ...], ...]
    heads: tuple[int, ...]
    positions: tuple[torch.Tensor, ...]
    mass: tuple[torch.Tensor, ...]
    weights: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True)
class Captured:
    """A moment as the engine hands it over: counters of each layer (the fields of Stats), and picks under way.

    ``phase`` is that of the forward that has ended, or idle after the last token; None for a moment in between, which
    the publisher's thread knows better. ``told`` is how much had been said of forwards by then.
    """

    run: int
    time_s: float
    batch: int
    counts: list[tuple[int, ...]]
    kinds: bytes
    modes: bytes
    picks: Picks | None = None
    positions: tuple[Arriving, ...] = ()
    mass: tuple[Arriving, ...] = ()
    weights: tuple[Arriving, ...] = ()
    before: tuple[Arriving, ...] = ()
    shapes_before: tuple[tuple[int, ...], ...] = ()
    phase: Phase | None = None
    told: int = 0


def picks_of(cache: KCache, run: int) -> Picks | None:
    """Put the picks of all layers together; None where no layer has any."""
    layers = [layer.picked if isinstance(layer, TieredLayer) else None for layer in cache.layers]
    picking = [picked for picked in layers if picked is not None]
    if not picking:
        return None
    batch = cache.batch_size
    total = sum(picked.picks.numel() for picked in picking)
    observed = max(1, min(batch, MOST_PICKS * batch // max(1, total)))
    if observed < batch:
        picking = [Picked(*(tensor[:observed] for tensor in picked)) for picked in picking]
    positions, mass, weights = zip(*picking, strict=True)
    shapes = iter([tuple(tensor.shape) for tensor in positions])
    heads = iter([math.prod(tensor.shape[1:]) for tensor in mass])
    return Picks(
        step=(run, max(layer.steps for layer in cache.tiered_layers)),
        observed=observed,
        shapes=tuple(() if picked is None else next(shapes) for picked in layers),
        heads=tuple(0 if picked is None else next(heads) for picked in layers),
        positions=_together(positions),
        mass=_together(mass),
        weights=_together(weights),
    )


def _together(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Flatten and join, one tensor for each stretch of layers on one device."""
    joined: list[torch.Tensor] = []
    start = 0
    for end in range(1, len(tensors) + 1):
        if end == len(tensors) or tensors[end].device != tensors[start].device:
            joined.append(torch.cat([tensor.reshape(-1) for tensor in tensors[start:end]]))
            start = end
    return tuple(joined)


def moment_of(
    cache: KCache, run: int, picks: Picks | None, before: Picks | None, told: int, phase: Phase | None = None
) -> Captured:
    """Read the counters, and send the picks on their way; see :class:`Captured` for ``told`` and ``phase``."""
    counts: list[tuple[int, ...]] = []
    kinds, modes = bytearray(), bytearray()
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, TieredLayer):
            counts.append(layer.counts())
            kinds.append(_KIND[layer.kind])
            modes.append(_MODE[layer.mode])
        else:
            shot = layer_snapshot(index, layer, picks=False)
            counts.append(tuple(getattr(shot.stats, name) for name in STATS))
            kinds.append(_KIND[shot.kind])
            modes.append(_MODE[shot.mode])
    follows = (
        picks is not None
        and before is not None
        and before.step == (picks.step[0], picks.step[1] - 1)
        and [shape[:-1] for shape in before.shapes] == [shape[:-1] for shape in picks.shapes]
    )
    return Captured(
        run,
        time.time(),
        cache.batch_size,
        counts,
        bytes(kinds),
        bytes(modes),
        picks,
        () if picks is None else _sent(picks.positions, torch.int32),
        () if picks is None else _sent(picks.mass, torch.float32),
        () if picks is None else _sent(picks.weights, torch.float32),
        _sent(before.positions, torch.int32) if follows and before is not None else (),
        before.shapes if follows and before is not None else (),
        phase,
        told,
    )


def _sent(tensors: tuple[torch.Tensor, ...], dtype: torch.dtype) -> tuple[Arriving, ...]:
    return tuple(Arriving(tensor.to(dtype)) for tensor in tensors)

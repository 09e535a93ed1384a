"""A block of teacher-forced tokens in one forward, each of them a decode step of its own inside every layer.

With several new tokens at once the weights are read once for all of them, but a layer would attend them as a prompt:
exactly. :meth:`KCache.stepwise <kcache.cache.KCache.stepwise>` makes an offloaded layer replay them one by one
instead, storing a row and answering its query before it takes the next, by the same ``update`` and ``attend`` that a
decode loop calls. A layer whose V stays on the device attends the block exactly, which is what its steps would do.

A layer takes all steps of the block before the next layer takes its first. Where layers depend on each other from step
to step (``spread="need"``) that would be something else than decoding, so blocks are refused then; single tokens are
replayed under any policy.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from kcache.attention.handles import AttentionCall
from kcache.errors import CacheStateError
from kcache.layers.attending import AttendingLayer

Look = Callable[[AttendingLayer, AttentionCall, torch.Tensor], None]
"""Shown each step of each replaying layer: the layer as the step left it, its call, the result ``[1, Hq, 1, Dv]``."""


def no_look(layer: AttendingLayer, call: AttentionCall, out: torch.Tensor) -> None:
    """Look at nothing."""


@dataclass(frozen=True, slots=True)
class Block:
    """What ``update`` hands to the attention function for a block: rows that are stored when their turn comes."""

    layer: AttendingLayer
    start: int

    def attend(self, module: torch.nn.Module, call: AttentionCall) -> torch.Tensor:
        """Answer the attention function's call row by row; returns ``[1, Hq, Q, Dv]``.

        Raises
        ------
        CacheStateError
            If the block is more than one sequence without padding, the policy does not let layers step apart, or the
            cache changed since ``update``.
        """
        layer, shared = self.layer, self.layer.shared
        shared.check_owner(module)
        shared.check_whole(layer, self.start)
        if layer.length != self.start:
            raise CacheStateError(
                f"layer {layer.index} of this cache was changed between update and attention ({layer.length} rows, "
                f"expected {self.start}); use one cache per forward"
            )
        if call.query.shape[0] != 1 or call.mask is not None:
            raise CacheStateError(
                f"stepwise replays one sequence without padding, and was given {call.query.shape[0]}"
                f"{'' if call.mask is None else ' with a mask'}; feed the tokens without it"
            )
        if call.query.shape[2] > 1 and not shared.layers_apart:
            raise CacheStateError(
                "under this policy what a layer fetches depends on what all layers fetched in the step before, so a "
                "block cannot be replayed layer by layer; feed the tokens one by one"
            )
        look, shared.look = shared.look or no_look, None
        try:
            return torch.cat([self._step(call, row, look) for row in range(call.query.shape[2])], 2)
        finally:
            shared.look = look

    def _step(self, call: AttentionCall, row: int, look: Look) -> torch.Tensor:
        query, key, value = (rows[:, :, row : row + 1] for rows in (call.query, call.key, call.value))
        step = replace(call, query=query, key=key, value=value)
        self.layer.update(key, value)
        out = self.layer.attend(step)
        look(self.layer, step, out)
        return out

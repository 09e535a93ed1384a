"""What ``update`` hands to the attention function for rows that it has stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kcache.attention.handles import AttentionCall
from kcache.errors import CacheStateError
from kcache.layers.attending import AttendingLayer


@dataclass(frozen=True, slots=True)
class Chunk:
    """The usual :class:`~kcache.attention.handles.Handle`: which rows of which layer."""

    layer: AttendingLayer
    end: int

    def attend(self, module: torch.nn.Module, call: AttentionCall) -> torch.Tensor:
        """Answer the attention function's call; returns ``[B, Hq, Q, Dv]``."""
        self.layer.shared.check_owner(module)
        if self.end != self.layer.length:
            raise CacheStateError(
                f"layer {self.layer.index} of this cache was changed between update and attention "
                f"({self.layer.length} rows, expected {self.end}); use one cache per forward"
            )
        self.layer.shared.check_whole(self.layer, self.end - call.key.shape[2])
        return self.layer.attend(call)

"""What the common things of a cache's layers ask of one of them: the plan of memory, checks, what a step changes."""

from __future__ import annotations

from typing import Protocol

import torch

from kcache.backends.base import HotStore
from kcache.telemetry import Stats


class Layer(Protocol):
    """A layer that keeps K on its device and V in either tier (:class:`~kcache.layers.tiered.TieredLayer`)."""

    index: int
    device: torch.device
    length: int
    is_initialized: bool
    waits_for_attention: bool

    @property
    def offloaded(self) -> bool:
        """Whether V lives in the host tier."""

    @property
    def hot(self) -> HotStore | None:
        """Its store of hot rows, once it has one."""

    def spill(self) -> None:
        """Move V to the host tier."""

    def stats(self) -> Stats:
        """Counters and bytes."""

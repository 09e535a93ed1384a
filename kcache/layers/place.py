"""One device of those a cache lies on: the layers there, and how many rows fit for how many of them.

:class:`~kcache.layers.residency.Residency` plans over all of them.
"""

from __future__ import annotations

import torch

from kcache.layers.protocol import Layer
from kcache.planning.sizes import TierSizes


class Place:
    """The layers on one device, and what they may take there.

    Attributes
    ----------
    device : torch.device
    layers : list of Layer
    least, resident : int
        How many of the first of them keep V there whatever the budget, and how many do.
    sizes : TierSizes
    budget : int or None
        Bytes; None where only RAM bounds them.
    working : int
        Bytes of the budget that V which may leave does not get.
    """

    sizes: TierSizes

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.layers: list[Layer] = []
        self.least = self.resident = self.working = 0
        self.budget: int | None = None

    def fits(self, rows: int, resident: int) -> bool:
        """Whether ``rows`` rows fit with V of ``resident`` layers there."""
        return self.budget is None or self.sizes.device(rows, resident) <= self.budget

    @property
    def room(self) -> int | None:
        """Bytes for V that might as well leave, and all else of the cache."""
        return None if self.budget is None else max(0, self.budget - self.working)

    @property
    def bounds(self) -> tuple[int, ...]:
        """The budget and the room; nothing where only RAM bounds them."""
        return () if self.budget is None or self.room is None else (self.budget, self.room)

    def longest(self, below: int) -> int:
        """The most rows that fit with as little V there as may be."""
        return below if self.budget is None else self.sizes.longest(self.least, self.budget, below)

    def keeps(self, rows: int, young: int) -> bool:
        """Whether ``young`` rows of the other layers, whose V has not left, fit too."""
        extra = self.sizes.young(young, self.resident)
        return self.room is None or self.sizes.device(rows, self.resident) + extra <= self.room

    def in_ram(self, rows: int) -> int:
        """Bytes of RAM at ``rows`` rows: the host tier, and the other tier where the device is the host."""
        here = self.sizes.device(rows, self.resident) if self.device.type == "cpu" else 0
        return self.sizes.host(rows, self.resident) + here

    def host_bytes(self, rows: int) -> list[int]:
        """Bytes of the host tier at ``rows`` rows, for each layer that may have one."""
        away = len(self.layers) - self.resident
        return [self.sizes.host(rows, len(self.layers) - 1)] * away

    @property
    def held_in_ram(self) -> int:
        """Bytes of RAM its layers hold now."""
        held = [layer.stats() for layer in self.layers]
        return sum(stats.host_bytes + (stats.device_bytes if self.device.type == "cpu" else 0) for stats in held)

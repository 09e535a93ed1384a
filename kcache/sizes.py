"""Bytes of tiered layers, and how many of them keep V on the device: the arithmetic that plans and caches share.

:mod:`kcache.memory` asks it with sizes from a config, :mod:`kcache.residency` with those of the tensors that arrive.
"""

from __future__ import annotations

from dataclasses import dataclass

from kcache.policy import Policy

LEAST_RESERVE = 512 * 2**20


@dataclass(frozen=True)
class TierSizes:
    """Bytes of the tiered layers at a number of rows.

    Attributes
    ----------
    layers : int
    k_row, v_row : int
        Bytes of one token's K and V in one layer, all sequences.
    block : int or None
        Rows per block of the tail; None without a tail.
    """

    layers: int
    k_row: int
    v_row: int
    block: int | None

    def tail(self, length: int, resident: int) -> int:
        """Bytes of the tail with V of ``resident`` layers on the device."""
        return 0 if self.block is None else (self.layers - resident) * self.v_row * -(-length // self.block)

    def device(self, length: int, resident: int) -> int:
        """Bytes on the device at ``length`` rows with V of ``resident`` layers there."""
        return (self.layers * self.k_row + resident * self.v_row) * length + self.tail(length, resident)

    def host(self, length: int, resident: int) -> int:
        """Bytes in the host tier."""
        return (self.layers - resident) * self.v_row * length

    def longest(self, resident: int, budget: int, below: int) -> int:
        """The most rows, at most ``below``, whose device bytes stay within ``budget``."""
        low, high = 0, below
        while low < high:
            middle = (low + high + 1) // 2
            if self.device(middle, resident) <= budget:
                low = middle
            else:
                high = middle - 1
        return low


def tail_block(policy: Policy) -> int | None:
    """Rows per block of the policy's tail; None without one."""
    return policy.tail_block if policy.tail == "block" else None


def least_resident(policy: Policy, layers: int) -> int:
    """Leading layers whose V stays on the device whatever the budget."""
    if policy.offload == "none":
        return layers
    return min(layers, max(policy.dense_layers, policy.resident_layers or 0))


def resident_layers(sizes: TierSizes, policy: Policy, length: int, budget: int | None) -> int:
    """Leading layers whose V stays on the device at ``length`` rows.

    Parameters
    ----------
    sizes : TierSizes
    policy : Policy
    length : int
    budget : int or None
        Bytes the tiered layers may take on the device; None where only RAM bounds them.
    """
    least = least_resident(policy, sizes.layers)
    if budget is None or policy.offload != "auto" or policy.resident_layers is not None:
        return least
    fits = (count for count in range(sizes.layers, least, -1) if sizes.device(length, count) <= budget)
    return next(fits, least)


def reserve(free: int) -> int:
    """Bytes of a device's free memory that a cache leaves to everything else."""
    return max(LEAST_RESERVE, free // 20)


def in_units(size: int) -> str:
    """Write a number of bytes for an error message."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"

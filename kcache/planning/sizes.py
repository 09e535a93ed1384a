"""Bytes of tiered layers, and how many of them keep V on the device: the arithmetic that plans and caches share.

:mod:`kcache.planning.need` asks it with sizes from a config, :mod:`kcache.layers.residency` with those of the tensors
that arrive.
"""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass

from kcache.policy import Policy

LEAST_RESERVE = 512 * 2**20
SCALE_BYTES = 4  # of a row in 8 bits
CENTRE_BYTES = 4  # of a number of a head of K in 8 bits
_MOST_HOT_ROWS = 4096
_MOST_GROUP = 16
_HEAD_SIZES = range(16, 257)
HOT_WAYS = 8  # hot rows that a position may be kept in place of


@dataclass(frozen=True)
class TierSizes:
    """Bytes of the tiered layers at a number of rows.

    Attributes
    ----------
    layers : int
    k_row, v_row : int
        Bytes of one token's K and V in one layer, all sequences.
    tail_row : int
        Bytes of one token's tail in one layer, all sequences.
    tail_fixed : int
        Bytes of the tail in one layer at any length.
    k_left, v_left : int or None
        Bytes of one token's K and V in one layer once V has left for the host; None for ``k_row`` and ``v_row``.
    k_fixed : int
        Bytes of K's centres in one layer at any length, once V has left.
    """

    layers: int
    k_row: int
    v_row: int
    tail_row: int = 0
    tail_fixed: int = 0
    k_left: int | None = None
    v_left: int | None = None
    k_fixed: int = 0

    @classmethod
    def of(
        cls, policy: Policy, layers: int, k_row: int, v_row: int, dim: int, itemsize: int, hot: bool = False
    ) -> TierSizes:
        """Sizes under a policy, for heads of ``dim`` values of ``itemsize`` bytes; ``hot`` if hot rows are kept."""
        heads = v_row // (dim * itemsize)
        scales = SCALE_BYTES * heads
        k_left, k_fixed = k_row, 0
        if policy.key_planes:
            k_left, k_fixed = policy.key_planes * k_row // itemsize + scales, CENTRE_BYTES * k_row // itemsize
        v_left = v_row // itemsize if policy.v_bits == 8 else v_row
        tail_row, tail_fixed = tail_unit(policy, v_row, dim, heads)
        tail_row += scales if policy.v_bits == 8 else 0
        tail_fixed += hot_bytes(policy, v_left, heads) if hot else 0
        return cls(layers, k_row, v_row, tail_row, tail_fixed, k_left, v_left, k_fixed)

    def k(self, length: int, resident: int) -> int:
        """Bytes of all K at ``length`` rows with V of ``resident`` layers on the device."""
        left = self.k_row if self.k_left is None else self.k_left
        others = self.layers - resident
        return (resident * self.k_row + others * left) * length + others * self.k_fixed

    def tail(self, length: int, resident: int) -> int:
        """Bytes of the tail with V of ``resident`` layers on the device."""
        return (self.layers - resident) * (self.tail_row * length + self.tail_fixed)

    def device(self, length: int, resident: int) -> int:
        """Bytes on the device at ``length`` rows with V of ``resident`` layers there."""
        return self.k(length, resident) + resident * self.v_row * length + self.tail(length, resident)

    def young(self, length: int, resident: int) -> int:
        """Bytes that ``length`` rows of the other layers take beside until V leaves: V, and K before it is narrowed."""
        k_row = 0 if self.k_left in (None, self.k_row) else self.k_row
        return (self.layers - resident) * (self.v_row + k_row) * length

    def host(self, length: int, resident: int) -> int:
        """Bytes in the host tier."""
        left = self.v_row if self.v_left is None else self.v_left
        return (self.layers - resident) * left * length

    def longest(self, resident: int, budget: int, below: int) -> int:
        """The most rows, at most ``below``, whose device bytes stay within ``budget``."""
        return max(0, bisect_right(range(below + 1), budget, key=lambda length: self.device(length, resident)) - 1)


def tail_unit(policy: Policy, v_row: int, dim: int, heads: int = 0) -> tuple[int, int]:
    """What the tail takes in one layer.

    Parameters
    ----------
    policy : Policy
    v_row : int
        Bytes of a token's V.
    dim, heads : int
        Size of a head, and how many there are in all sequences.

    Returns
    -------
    int, int
        Bytes per token, and bytes at any length: base and basis in fp32.
    """
    rank = rank_of(policy.tail_rank, dim) if policy.tail == "lowrank" else 0
    return v_row * rank // dim, heads * (rank + 1) * dim * 4 if rank else 0


def hot_rows_of(policy: Policy) -> int:
    """Hot rows that a policy asks for per KV head: eight times what a step fetches, unless it says; see docs/log.md."""
    if policy.select == "head":
        return 0
    return min(8 * policy.topn, _MOST_HOT_ROWS) if policy.hot_rows is None else policy.hot_rows


def hot_capacity(rows: int) -> int:
    """Rows in a store of hot rows: a power of two, and at least one set."""
    return max(HOT_WAYS, 1 << max(0, rows - 1).bit_length())


def hot_bytes(policy: Policy, v_row: int, heads: int) -> int:
    """Bytes of one layer's hot rows, for so many heads in all sequences: V, position, age; claims, some numbers."""
    wanted = hot_rows_of(policy)
    if not wanted:
        return 0
    rows = hot_capacity(wanted)
    return rows * (v_row + 8 * heads) + heads * (rows // HOT_WAYS * 4 + 28)


def beyond_kernels(group: int, dim: int, dim_v: int) -> str | None:
    """Why our kernels decode no layer of ``group`` query heads per KV head and heads of these sizes, or None."""
    if not 1 <= group <= _MOST_GROUP:
        return f"{group} query heads per KV head, the kernels take 1 to {_MOST_GROUP}"
    if dim not in _HEAD_SIZES or dim_v not in _HEAD_SIZES:
        return f"head size {max(dim, dim_v)}, the kernels take {_HEAD_SIZES[0]} to {_HEAD_SIZES[-1]}"
    return None


def rank_of(rank: int | None, dim: int) -> int:
    """Directions of a low-rank tail for heads of ``dim``: as many as the policy says, or a sixteenth."""
    return max(1, dim // 16) if rank is None else min(rank, dim)


def least_resident(policy: Policy, layers: int) -> int:
    """Leading layers whose V stays on the device whatever the budget."""
    if policy.offload == "none":
        return layers
    return min(layers, max(policy.dense_layers, policy.resident_layers or 0))


def resident_layers(sizes: TierSizes, policy: Policy, length: int, budget: int | None, least: int | None = None) -> int:
    """Leading layers whose V stays on the device at ``length`` rows.

    Parameters
    ----------
    sizes : TierSizes
    policy : Policy
    length : int
    budget : int or None
        Bytes the tiered layers may take on the device; None where only RAM bounds them.
    least : int, optional
        How many stay whatever the budget, where ``sizes`` are those of one of several devices.
    """
    least = least_resident(policy, sizes.layers) if least is None else least
    if budget is None or policy.offload != "auto" or policy.resident_layers is not None:
        return least
    fits = (count for count in range(sizes.layers, least, -1) if sizes.device(length, count) <= budget)
    return next(fits, least)


def reserve(free: int) -> int:
    """Bytes of a device's free memory that a cache leaves to everything else."""
    return max(LEAST_RESERVE, free // 20)


def in_units(size: int) -> str:
    """Write a number of bytes for an error message."""
    if size < 2**16:
        return f"{size:,} byte{'' if size == 1 else 's'}"
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"

"""Scratch memory of a decode step.

A workspace is made once for a shape and a capacity and serves every layer of that shape in turn, so that a step
allocates its results alone. The scores are the largest part, fp32 ``[B, Hq, capacity]``, and with a threshold the lists
of rows above it, int64 ``[B, Hkv, capacity]``.
"""

from __future__ import annotations

import torch

from kcache.backends.base import MOST
from kcache.backends.triton.common import chip_of, choose_splits, cut, interpreted, power_of_two
from kcache.backends.triton.tuning import Tuning
from kcache.planning.sizes import beyond_kernels, rank_of
from kcache.policy import Select, Spread, Tail

_MOST_CANDIDATES = 32768
_MOST_BLOCKS = 8192
_LEAST_BLOCK = 16
_REGISTERS = 65536
_SCORE_WAVES = 8


def select_block(capacity: int) -> int:
    """Rows per block that select searches by its maximum: few enough blocks for one program."""
    block = _LEAST_BLOCK
    while -(-capacity // block) > _MOST_BLOCKS:
        block *= 2
    return block


def unsupported(capacity: int, group: int, dim: int, dim_v: int, topn: int, spread: Spread = "even") -> str | None:
    """Say why the TopN kernels cannot serve these sizes, or None when they can."""
    reason = beyond_kernels(group, dim, dim_v)
    if reason is not None:
        return reason
    block = select_block(capacity)
    if spread == "even" and power_of_two(topn) * block > _MOST_CANDIDATES:
        return f"topn={topn} with {block}-row blocks, the kernels search at most {_MOST_CANDIDATES} rows"
    return None


class DeviceLength:
    """The length of a step as a tensor on the device."""

    def __init__(self, device: torch.device) -> None:
        self.length = torch.zeros(1, dtype=torch.int32, device=device)
        self._written = 0

    def length_tensor(self, length: int | torch.Tensor) -> torch.Tensor:
        """``length`` as an int32 tensor on the device; a Python number is copied there once per value.

        A captured graph needs a tensor: a number would be copied at capture only.
        """
        if isinstance(length, torch.Tensor):
            return length
        if length != self._written:
            self.length.fill_(length)
            self._written = length
        return self.length


class Workspace(DeviceLength):
    """Scratch of :func:`~kcache.backends.triton.step.triton_decode`.

    Parameters
    ----------
    batch, kv_heads, group : int
        B, Hkv and G = Hq / Hkv.
    dim, dim_v : int
        Sizes of a K row and of a V row.
    capacity : int
        Rows the longest step may have; rounded up to a multiple of 64.
    topn : int
        N.
    device : torch.device
    select, tail, tail_rank, spread
        As in :class:`~kcache.policy.Policy`; with ``spread="need"`` steps come with a threshold.
    itemsize : int
        Bytes of a number of K: tiles of 16 bits may be larger.
    tuning : Tuning or None

    Attributes
    ----------
    width : int
        Picks a row of work may have: N, or M of them with a threshold.
    """

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        group: int,
        dim: int,
        dim_v: int,
        capacity: int,
        topn: int,
        device: torch.device,
        *,
        select: Select = "group",
        tail: Tail = "lowrank",
        tail_rank: int | None = None,
        spread: Spread = "even",
        itemsize: int = 4,
        tuning: Tuning | None = None,
    ) -> None:
        reason = unsupported(capacity, group, dim, dim_v, topn, spread)
        if reason is not None:
            raise ValueError(f"the Triton decode step does not support {reason}")
        super().__init__(device)
        self.tuning = tune = tuning or Tuning()
        self.device, self.batch, self.kv_heads, self.query_group = device, batch, kv_heads, group
        self.dim, self.dim_v = dim, dim_v
        self.select, self.tail, self.spread = select, tail, spread
        self.rank = rank_of(tail_rank, dim_v) if tail == "lowrank" else 0
        self.capacity = -(-capacity // 64) * 64
        # A compile-time constant of the kernels: a power of two while the capacity bounds it, for few variants.
        self.width = min(MOST * topn, power_of_two(self.capacity)) if spread == "need" else topn
        self.heads, self.group, self.repeat = (
            (kv_heads, group, 1) if select == "group" else (kv_heads * group, 1, group)
        )
        self.upcast = interpreted()
        self.warps = tune.warps
        self.chip = tune.chip or chip_of(device)
        self.slots = self.chip.multiprocessors * tune.residency
        self._plan_select(tune)
        self._plan_scores(tune, itemsize)
        self._plan_fetch(tune)
        self._plan_tail(tune)
        self._allocate()

    def _plan_select(self, tune: Tuning) -> None:
        """Sizes of blocks and tiles that rows are selected by."""
        self.block = _LEAST_BLOCK if self.spread == "need" else select_block(self.capacity)
        self.blocks = -(-self.capacity // (16 * self.block)) * 16  # wide loads
        # Sums of a lane: AT_ONCE directions of every head, in a few registers each.
        self.tail_tile = max(16, min(tune.tail_tile, 2048 // power_of_two(self.group)))
        self.select_tile = max(self.block, min(tune.select_tile, 4096 // power_of_two(self.group)))
        # Probabilities of the candidates are held 32 to a thread at most.
        candidates = power_of_two(self.width) * self.block if self.spread == "even" else 0
        self.select_warps = min(16, max(tune.select_warps, candidates // 256))
        self.heads_at_once = max(1, min(power_of_two(self.group), 1024 * self.select_warps // max(1, candidates)))

    def _plan_scores(self, tune: Tuning, itemsize: int) -> None:
        """Programs that rows of work are cut into, the tiles of K they read, and the registers they may take."""
        rows, chip = self.batch * self.heads, self.chip
        row_bytes, stages = itemsize * power_of_two(self.dim), tune.score_stages
        block = tune.score_block or (128 if row_bytes <= 256 else 64)
        if not tune.score_block and itemsize == 1 and row_bytes <= 128 and chip.capability // 10 == 9:
            # Of K in 8 bits as many bytes: Hopper multiplies a tile of them where it lies, other cards in registers.
            block = 256
        # The largest tiles of which as many programs fit as of any.
        choices = [(block, stages), (block // 2, stages), (block // 2, 2), (block // 4, 2)]
        fits = {each: chip.resident(tune.residency, chip.tiles_held(each[1]) * each[0] * row_bytes) for each in choices}
        rows_of_tile, self.score_stages = max(choices, key=fits.__getitem__)
        resident = max(1, fits[rows_of_tile, self.score_stages])
        self.score_block = max(self.block, rows_of_tile)
        tiles = -(-self.capacity // self.score_block)
        # In several waves, so that most rows are fetched while others are scored.
        self.score_splits = tune.score_splits or max(
            choose_splits(rows, tiles, chip.multiprocessors * resident),
            cut(rows, tiles, _SCORE_WAVES * self.slots, least_tiles=8),
        )
        # What a program that fetches would like to have is more than lets as many score at a time.
        self.registers = min(255, _REGISTERS // (32 * self.warps * resident) // 8 * 8)

    def _plan_fetch(self, tune: Tuning) -> None:
        """Rows that are read, weighed and scored again at once."""
        most = min(power_of_two(self.width), 8192 // power_of_two(self.dim_v))  # 32 numbers to a thread
        self.gather_rows = max(16, min(tune.gather_rows, most))
        # All directions of every head, 32 numbers to a thread.
        lanes = 1024 * self.warps // (power_of_two(self.group) * power_of_two(self.rank))
        self.weigh_tile = max(16, min(tune.weigh_tile, power_of_two(self.width), lanes))
        # Rows of two planes that leave registers to the query's digits, and 2 scores to a thread.
        most = min(128 if self.dim <= 128 else 32, 64 * self.warps // power_of_two(self.group))
        self.refine_tile = max(16, min(power_of_two(self.width), most))

    def _plan_tail(self, tune: Tuning) -> None:
        """Programs that sum the tail, and how many rows of work are scored before it."""
        # Tiles of scores are written, and read by the tail, as a whole.
        whole = max(self.block, self.tail_tile, self.score_block)
        self.stride = -(-self.capacity // whole) * whole
        # As many as leave their scores in two thirds of the cache, and more than are being scored at a time.
        row_bytes = 4 * self.group * self.stride
        fit = 2 * self.chip.cached_bytes // 3 // row_bytes
        self.ahead = tune.ahead or max(fit, 2 * self.slots // self.score_splits)
        rows, tiles = self.batch * self.heads, -(-self.capacity // self.tail_tile)
        self.tail_splits = 0
        if self.rank:
            # More than fit at a time, so that some begin while the last pieces of K are scored.
            self.tail_splits = tune.tail_splits or cut(rows, tiles, 7 * self.slots // 5, least_tiles=2)

    def _allocate(self) -> None:
        rows, heads, parts = self.batch * self.heads, self.group, 1 + self.tail_splits

        def floats(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=self.device)

        def integers(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.scores = floats(rows, heads, self.stride)
        self.part_max, self.part_sum = floats(rows, self.score_splits, heads), floats(rows, self.score_splits, heads)
        self.grown = floats(rows, heads)
        self.lse, self.block_top = floats(rows, heads), floats(rows, heads, self.blocks)
        self.listed = integers(rows, self.blocks)
        self.found = integers(*((rows, self.stride) if self.spread == "need" else (1, 1)), dtype=torch.int64)
        self.partial, self.weights = floats(rows, heads, self.dim_v), floats(rows, heads, self.width)
        self.shares, self.held = (
            floats(rows, parts, heads, max(16, power_of_two(self.rank))),
            floats(rows, parts, heads),
        )
        self.done, self.tickets = integers(rows), integers(rows)
        self.hot_slots = integers(rows, 2, self.width)

    def set_back(self) -> None:
        """Set the counters back after a step of which not all was launched; a whole one does so itself."""
        self.done.zero_()
        self.tickets.zero_()

    @property
    def nbytes(self) -> int:
        """Bytes of scratch on the device."""
        return sum(item.nbytes for item in vars(self).values() if torch.is_tensor(item))

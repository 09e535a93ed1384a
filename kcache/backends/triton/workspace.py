"""Scratch memory of a decode step, and the numbers that tune its kernels.

A workspace is made once for a shape and a capacity and serves every layer of that shape in turn, so a step allocates
nothing and can be captured in a CUDA graph. The scores are the largest part: fp32 ``[B, Hq, capacity]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from kcache.backends.triton.common import choose_splits, interpreted, multiprocessors, power_of_two
from kcache.policy import Select, Tail

_MOST_CANDIDATES = 32768
_MOST_BLOCKS = 8192
_SHARED_BYTES = 227 * 1024
_WORTH_SLICING = 256 * 2**20  # K that takes longer to read than the launches of a second slice


@dataclass(frozen=True)
class Tuning:
    """Launch parameters; the results do not depend on them.

    Attributes
    ----------
    score_block, score_warps, score_stages, score_residency : int
        Rows of K per tile (0 chooses by head size), warps per program, tiles in flight, most programs per
        multiprocessor (fewer where shared memory says so).
    weight_chunk, weight_warps : int
        Rows per program of the second pass over the scores.
    select_warps : int
        Warps of the one program per row of work that selects.
    gather_rows, gather_warps : int
        Picked rows per program that reads over the link.
    tail_tile, tail_stages, tail_residency : int
        Block means per tile, tiles in flight, and programs per multiprocessor that stream them.
    dense_block, dense_warps, dense_stages, dense_residency : int
        The same for the dense decode of resident layers.
    slices : int
        Pieces the batch is cut into, so that the link works for one piece while K is read for the next; 0 chooses.
    processors : int
        Multiprocessors to plan for; 0 asks the device.
    """

    score_block: int = 0
    score_warps: int = 4
    score_stages: int = 3
    score_residency: int = 3
    weight_chunk: int = 1024
    weight_warps: int = 4
    select_warps: int = 8
    gather_rows: int = 32
    gather_warps: int = 4
    tail_tile: int = 32
    tail_stages: int = 3
    tail_residency: int = 3
    dense_block: int = 0
    dense_warps: int = 4
    dense_stages: int = 3
    dense_residency: int = 3
    slices: int = 0
    processors: int = 0


def _residency(most: int, tiles: int, rows: int, dim: int) -> int:
    """Programs per multiprocessor, with ``tiles`` 16-bit tiles ``[rows, dim]`` each in shared memory."""
    return max(1, min(most, _SHARED_BYTES // (tiles * rows * power_of_two(dim) * 2 + 9216)))


def select_block(capacity: int, tail: Tail, tail_block: int) -> int:
    """Rows per block that select searches by its maximum: whole tail blocks, and few enough blocks for one program."""
    block = max(16, tail_block) if tail == "block" else 16
    while -(-capacity // block) > _MOST_BLOCKS:
        block *= 2
    return block


def unsupported(capacity: int, group: int, dim: int, dim_v: int, topn: int, tail: Tail, tail_block: int) -> str | None:
    """Say why the TopN kernels cannot serve these sizes, or None when they can."""
    if not 1 <= group <= 16:
        return f"{group} query heads per KV head, the kernels take 1 to 16"
    if not 16 <= dim <= 256 or not 16 <= dim_v <= 256:
        return f"head size {max(dim, dim_v)}, the kernels take 16 to 256"
    if tail == "block" and tail_block != power_of_two(tail_block):
        return f"tail_block={tail_block}, the kernels take powers of two"
    if tail == "block" and tail_block > 1024:
        return f"tail_block={tail_block}, the kernels take at most 1024"
    block = select_block(capacity, tail, tail_block)
    if power_of_two(topn) * block > _MOST_CANDIDATES:
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
    select, tail, tail_block
        As in :class:`~kcache.policy.Policy`.
    tuning : Tuning or None

    Attributes
    ----------
    out : Tensor ``[B, Hq, Dv]`` fp32, unused when the caller brings its own
    picks : Tensor ``[R, N]`` int32, -1 past the length
    mass : Tensor ``[R, G']`` fp32
        R = B * Hkv and G' = G, or, picked per query head, R = B * Hq and G' = 1.
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
        tail: Tail = "block",
        tail_block: int = 16,
        tuning: Tuning | None = None,
    ) -> None:
        reason = unsupported(capacity, group, dim, dim_v, topn, tail, tail_block)
        if reason is not None:
            raise ValueError(f"the Triton decode step does not support {reason}")
        super().__init__(device)
        self.tuning = tune = tuning or Tuning()
        self.device, self.batch, self.kv_heads, self.query_group = device, batch, kv_heads, group
        self.dim, self.dim_v, self.topn = dim, dim_v, topn
        self.select, self.tail = select, tail
        self.tail_block = tail_block if tail == "block" else 16
        self.capacity = -(-capacity // 64) * 64
        self.heads, self.group, self.repeat = (
            (kv_heads, group, 1) if select == "group" else (kv_heads * group, 1, group)
        )
        self.upcast = interpreted()
        self.block = select_block(self.capacity, tail, tail_block)
        self.blocks = -(-self.capacity // self.block)
        self.tail_blocks = -(-self.capacity // self.tail_block) if tail == "block" else 1
        self.chunk = max(self.block, min(tune.weight_chunk, 8192 // power_of_two(self.group)))
        # Probabilities of the candidates are held 32 to a thread at most.
        candidates = power_of_two(topn) * self.block
        self.select_warps = min(16, max(tune.select_warps, candidates // 256))
        self.heads_at_once = max(1, min(power_of_two(self.group), 1024 * self.select_warps // candidates))
        k_bytes = batch * kv_heads * self.capacity * dim * 2
        self.slices = tune.slices or (2 if device.type == "cuda" and batch >= 2 and k_bytes >= _WORTH_SLICING else 1)

        per_slice = -(-batch // self.slices) * self.heads
        processors = tune.processors or multiprocessors(device)
        self.score_block = tune.score_block or (128 if dim <= 64 else 64)
        tiles = -(-self.capacity // self.score_block)
        resident = _residency(tune.score_residency, tune.score_stages, self.score_block, dim)
        self.score_splits = choose_splits(per_slice, tiles, processors * resident)
        self.gather_rows = max(16, min(tune.gather_rows, power_of_two(topn)))
        self.pick_splits = -(-topn // self.gather_rows)
        tail_tiles = -(-self.tail_blocks // tune.tail_tile)
        self.tail_splits = (
            choose_splits(per_slice, tail_tiles, processors * tune.tail_residency, least_tiles=2)
            if tail == "block"
            else 0
        )

        rows, heads = batch * self.heads, self.group
        parts = self.pick_splits + self.tail_splits

        def floats(*shape: int) -> torch.Tensor:
            return torch.empty(shape, dtype=torch.float32, device=device)

        def integers(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        self.stride = -(-self.capacity // self.chunk) * self.chunk
        self.scores = floats(rows, heads, self.stride)
        self.part_max, self.part_sum = floats(rows, self.score_splits, heads), floats(rows, self.score_splits, heads)
        self.lse, self.mass = floats(rows, heads), floats(rows, heads)
        self.block_top = floats(rows, self.blocks)
        self.tail_weight = floats(rows, heads, self.tail_blocks)
        self.candidates, self.picks = integers(rows, topn), integers(rows, topn)
        self.coefficients = floats(rows, heads, topn)
        self.partial = floats(rows, parts, heads, dim_v)
        self.counters = integers(rows)
        self.hot_slots, self.hot_inserts = integers(rows, topn), integers(rows, topn)
        self.side = torch.cuda.Stream(device, priority=-1) if device.type == "cuda" and self.slices > 1 else None

    @property
    def nbytes(self) -> int:
        """Bytes of scratch on the device."""
        return sum(item.numel() * item.element_size() for item in vars(self).values() if torch.is_tensor(item))


class DenseWorkspace(DeviceLength):
    """Scratch of :func:`~kcache.backends.triton.step.dense_decode`; parameters as for :class:`Workspace`."""

    def __init__(
        self,
        batch: int,
        kv_heads: int,
        group: int,
        dim: int,
        dim_v: int,
        capacity: int,
        device: torch.device,
        *,
        tuning: Tuning | None = None,
    ) -> None:
        super().__init__(device)
        self.tuning = tune = tuning or Tuning()
        rows = batch * kv_heads
        processors = tune.processors or multiprocessors(device)
        self.block = tune.dense_block or (64 if max(dim, dim_v) <= 128 else 32)
        tiles = -(-capacity // self.block)
        resident = _residency(tune.dense_residency, tune.dense_stages + 1, self.block, max(dim, dim_v))
        self.device, self.capacity, self.upcast = device, capacity, interpreted()
        self.splits = choose_splits(rows, tiles, processors * resident)
        self.part_max = torch.empty(rows, self.splits, group, dtype=torch.float32, device=device)
        self.part_sum = torch.empty_like(self.part_max)
        self.partial = torch.empty(rows, self.splits, group, dim_v, dtype=torch.float32, device=device)
        self.counters = torch.zeros(rows, dtype=torch.int32, device=device)

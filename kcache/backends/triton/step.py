"""The Triton decode step of a tiered layer: score, select, fetch and combine.

Nothing waits for the host, so a step can be captured in a CUDA graph with the length as a device tensor. Rows are
selected and fetched on a side stream, beside the sums of the tail and, with more than one slice of the batch, while K
of the next slice is scored: the link and the device's memory then work at the same time.
"""

from __future__ import annotations

from itertools import pairwise

import torch

from kcache.backends.triton.above import above_kernel
from kcache.backends.triton.common import on_device, power_of_two, reduction_step
from kcache.backends.triton.gather import gather_kernel
from kcache.backends.triton.hot import HotRows
from kcache.backends.triton.inputs import Results, StepInputs
from kcache.backends.triton.score import score_kernel
from kcache.backends.triton.select import select_kernel
from kcache.backends.triton.tail import DIRECTIONS, tail_kernel
from kcache.backends.triton.workspace import Workspace
from kcache.lowrank import LowRank

_HOT_TILE = 256


class SliceStep:
    """One slice of the batch: its inputs, and the scratch rows and hot rows that belong to it."""

    def __init__(
        self, ws: Workspace, first: int, last: int, inputs: StepInputs, results: Results, hot: HotRows | None = None
    ) -> None:
        self.ws, self.hot = ws, hot
        self.count = (last - first) * ws.heads
        self.rows = slice(first * ws.heads, last * ws.heads)
        self.inputs = inputs.of(first, last)
        self.picks, self.mass = results.picks[self.rows], results.mass[self.rows]
        self.weights = results.weights[self.rows]
        self.hot_store = None if hot is None else hot.store[first:last]

    def run(self) -> None:
        """All of it, one after the other."""
        self.score()
        self.fetch()
        self.tail()

    def fetch(self) -> None:
        """Select the rows, and bring them."""
        self.select()
        self.gather()

    def score(self) -> None:
        """Stream K once; leave scores, their maxima by block and partial sums of exponentials in the workspace."""
        ws, tune, rows, given = self.ws, self.ws.tuning, self.rows, self.inputs
        mask = given.length.view(1, -1) if given.mask is None else given.mask
        scales = given.query if given.key_scales is None else given.key_scales
        score_kernel[(self.count * ws.score_splits,)](
            given.query, given.keys, scales, mask, ws.scores[rows], ws.block_top[rows], ws.part_max[rows],
            ws.part_sum[rows], given.length,
            given.query.stride(0), given.query.stride(1),
            given.keys.stride(0), given.keys.stride(1), given.keys.stride(2),
            scales.stride(0), scales.stride(1), mask.stride(0),
            ws.stride, ws.blocks, given.scaling, given.softcap or 1.0, ws.score_splits,
            HEADS=ws.heads, REPEAT=ws.repeat, G=ws.group, GP=16, D=ws.dim, BLOCK_D=power_of_two(ws.dim),
            BLOCK_L=ws.score_block, BLOCK=ws.block, STAGES=tune.score_stages, HAS_MASK=given.mask is not None,
            HAS_SOFTCAP=given.softcap is not None, HAS_SCALES=given.key_scales is not None, UPCAST=ws.upcast,
            num_warps=tune.score_warps, num_stages=tune.score_stages,
        )  # fmt: skip

    def tail(self) -> None:
        """Sum all rows along the tail's directions."""
        ws, rows, given = self.ws, self.rows, self.inputs
        if not ws.tail_splits:
            return
        assert given.lowrank is not None
        tail, at_once = given.lowrank, min(DIRECTIONS, power_of_two(ws.rank))
        tail_kernel[(self.count * ws.tail_splits, -(-ws.rank // at_once))](
            ws.scores[rows], ws.part_max[rows], ws.part_sum[rows], given.length if given.sinks is None else given.sinks,
            tail.coefficients, tail.base, tail.basis, ws.partial[rows], ws.shares[rows], ws.held[rows],
            ws.counters[rows], ws.counts[rows], given.out, self.mass, given.length,
            *tail.coefficients.stride()[:3], given.out.stride(0), given.out.stride(1), ws.stride, ws.score_splits,
            ws.tail_splits, self._tickets,
            SP=power_of_two(ws.score_splits), AT_ONCE=at_once, BLOCK_T=ws.tail_tile, HAS_SINKS=given.sinks is not None,
            ALIGNED=is_aligned(tail.coefficients), num_warps=ws.tuning.tail_warps, **self._sizes,
        )  # fmt: skip

    def select(self) -> None:
        """The picked rows, how many there are, and where hot rows are; log-sum-exps on the way."""
        ws, rows, hot, given = self.ws, self.rows, self.hot, self.inputs
        none = given.length
        scored = (
            ws.scores[rows], ws.block_top[rows], ws.part_max[rows], ws.part_sum[rows],
            none if given.sinks is None else given.sinks,
        )  # fmt: skip
        stored = (
            none if hot is None else hot.tags[rows], none if hot is None else hot.stamps[rows],
            none if hot is None else hot.clock[rows], none if hot is None else hot.claims[rows],
            ws.hot_slots[rows], ws.hot_inserts[rows], none if hot is None else hot.hits.view(-1)[rows],
            ws.stride, ws.blocks, ws.score_splits,
        )  # fmt: skip
        sizes = {
            "HEADS": ws.heads, "G": ws.group, "GP": power_of_two(ws.group), "SP": power_of_two(ws.score_splits),
            "BLOCK": ws.block, "HAS_SINKS": given.sinks is not None, "HOT_SETS": 1 if hot is None else hot.sets,
            "HOT_WAYS": 0 if hot is None else hot.ways, "HOT_TILE": min(_HOT_TILE, power_of_two(ws.width)),
            "num_warps": ws.select_warps,
        }  # fmt: skip
        if ws.spread == "even":
            select_kernel[(self.count,)](
                *scored, ws.lse[rows], ws.candidates[rows], self.picks, ws.counts[rows], given.length, *stored,
                GS=ws.heads_at_once, N=ws.width, NP=power_of_two(ws.width), BP=power_of_two(ws.blocks), **sizes,
            )  # fmt: skip
            return
        self._above(
            *scored, given.threshold, ws.lse[rows], ws.listed[rows], ws.found[rows], self.picks, ws.counts[rows],
            none if given.tally is None else given.tally, given.length, *stored,
            MOST=ws.width, TILE=ws.select_tile, HAS_TALLY=given.tally is not None, **sizes,
        )  # fmt: skip

    def gather(self) -> None:
        """Fetch the picked rows, weigh them, add the tail, write the output."""
        ws, rows, given = self.ws, self.rows, self.inputs
        unused = LowRank(ws.lse, ws.lse, ws.lse.view(1, 1, *ws.lse.shape))
        tail = unused if given.lowrank is None else given.lowrank
        scales = given.query if given.value_scales is None else given.value_scales
        gather_kernel[(self.count * ws.pick_splits,)](
            given.values, scales, ws.scores[rows], ws.lse[rows], tail.coefficients, tail.base, tail.basis,
            self.picks, self.weights, ws.counts[rows], ws.partial[rows], ws.shares[rows], ws.held[rows],
            ws.counters[rows], given.out, self.mass,
            given.query if self.hot_store is None else self.hot_store, ws.hot_slots[rows], ws.hot_inserts[rows],
            *given.values.stride()[:3], *scales.stride()[:2], *tail.coefficients.stride()[:3],
            given.out.stride(0), given.out.stride(1), ws.stride, self.count, ws.tail_splits, self._tickets,
            GP=16, WIDTH=ws.width, HOT_ROWS=0 if self.hot is None else self.hot.rows,
            HAS_SCALES=given.value_scales is not None, UPCAST=ws.upcast, num_warps=ws.tuning.gather_warps,
            **self._sizes,
        )  # fmt: skip

    def _above(self, *arguments: object, **sizes: object) -> None:
        above_kernel[(self.count,)](*arguments, **sizes)

    @property
    def _tickets(self) -> int:
        """Programs of the tail that add to a row's output."""
        ws = self.ws
        return ws.tail_splits * -(-ws.rank // min(DIRECTIONS, power_of_two(ws.rank))) if ws.tail_splits else 0

    @property
    def _sizes(self) -> dict[str, object]:
        """Compile-time constants of both kernels that may finish a row."""
        ws = self.ws
        group2, block_d = power_of_two(ws.group), power_of_two(ws.dim_v)
        return {
            "HEADS": ws.heads, "REPEAT": ws.repeat, "G": ws.group, "G2": group2, "ROWS": ws.gather_rows,
            "PARTS": ws.pick_splits, "D": ws.dim_v, "BLOCK_D": block_d, "RANK": ws.rank, "RP": ws.shares.shape[3],
            "STEP": reduction_step(group2 * block_d, ws.pick_splits + ws.tail_splits),
            "RANK_STEP": reduction_step(group2 * block_d, max(1, ws.rank)), "RENORMALISE": ws.tail == "renormalise",
        }  # fmt: skip


def is_aligned(coefficients: torch.Tensor) -> bool:
    """Whether the rows ``[B, Hkv, r, capacity]`` of coefficients begin at, and have room for, multiples of 16."""
    return coefficients.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in coefficients.stride()[:3])


def run_slices(steps: list[SliceStep], side: torch.cuda.Stream | None) -> None:
    """Run the slices: on one stream scores and tails, which keep the device's memory busy, on ``side`` the rest."""
    if side is None:
        for step in steps:
            step.run()
        return
    main = torch.cuda.current_stream(side.device)
    for step in steps:
        step.score()
        side.wait_stream(main)
        with torch.cuda.stream(side):
            step.fetch()
    for step in steps:
        step.tail()
    main.wait_stream(side)


def triton_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: int | torch.Tensor,
    *,
    scaling: float,
    workspace: Workspace,
    lowrank: LowRank | None = None,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    threshold: torch.Tensor | None = None,
    tally: torch.Tensor | None = None,
    key_scales: torch.Tensor | None = None,
    value_scales: torch.Tensor | None = None,
    hot: HotRows | None = None,
    out: torch.Tensor | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score, select, fetch and combine for one layer and one new token. N and tail are the workspace's.

    Parameters
    ----------
    query : Tensor ``[B, Hq, D]``
    keys : Tensor ``[B, Hkv, capacity, D]`` on the device
        A row is contiguous; any other strides.
    values : Tensor ``[B, Hkv, capacity, Dv]``
        In pinned host memory (or on the device), laid out like ``keys``.
    length : int or Tensor ``[1]`` int32 on the device
        Rows in the cache, the new token's included; at most ``workspace.capacity``.
    scaling : float
    workspace : Workspace
        One step at a time may use it.
    lowrank : LowRank, needed by the low-rank tail
    mask : Tensor ``[B, >= length]`` bool or None
    softcap : float or None
    sinks : Tensor ``[Hq]`` or None
    threshold : Tensor ``[B]`` fp32, needed by a workspace with ``spread="need"``
    tally : Tensor ``[B]`` int64 or None
        With a threshold, the rows picked for each sequence are added to it.
    key_scales, value_scales : Tensor ``[B, Hkv, capacity]`` fp32 on the device, or None
        What rows of int8 ``keys`` and ``values`` are multiplied by.
    hot : HotRows or None
    out : Tensor ``[B, Hq, Dv]`` or None
        Written and returned; by default a new tensor in the query's dtype.
    weights : Tensor like ``picks`` fp32 or None
        Gets what each pick holds, mean over the heads it was made for; where there is none it stays as it is.

    Returns
    -------
    out : Tensor ``[B, Hq, Dv]``
    picks : Tensor ``[B, Hkv, workspace.width]`` int32, or ``[B, Hkv, G, workspace.width]`` picked per query head
        Not sorted, filled up with -1.
    mass : Tensor ``[B, Hkv, G]`` fp32
    """
    ws = workspace
    if (ws.tail == "lowrank") != (lowrank is not None):
        raise ValueError(f"a workspace for tail={ws.tail!r} was given {'a' if lowrank else 'no'} low-rank tail")
    if (ws.spread == "need") != (threshold is not None):
        raise ValueError(
            f"a workspace with spread={ws.spread!r} was given {'no' if threshold is None else 'a'} threshold"
        )
    if out is None:
        out = query.new_empty(query.shape[0], query.shape[1], ws.dim_v)
    inputs = StepInputs(
        query, keys, values, ws.length_tensor(length), scaling, out, lowrank, mask, softcap, sinks, threshold, tally,
        key_scales, value_scales,
    )  # fmt: skip
    rows = ws.batch * ws.heads
    if weights is None:
        weights = query.new_empty(rows, ws.width, dtype=torch.float32)
    results = Results(
        query.new_empty(rows, ws.width, dtype=torch.int32),
        query.new_empty(rows, ws.group, dtype=torch.float32),
        weights.view(rows, ws.width),
    )
    bounds = [round(ws.batch * piece / ws.slices) for piece in range(ws.slices + 1)]
    steps = [SliceStep(ws, first, last, inputs, results, hot) for first, last in pairwise(bounds) if last > first]
    with on_device(query.device):
        run_slices(steps, ws.side)
    per_head = (ws.batch, ws.kv_heads, ws.query_group, ws.width)
    picks = results.picks.view((ws.batch, ws.kv_heads, ws.width) if ws.select == "group" else per_head)
    return out, picks, results.mass.view(ws.batch, ws.kv_heads, ws.query_group)

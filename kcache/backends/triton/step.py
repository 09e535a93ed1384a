"""The Triton decode steps: score, select, fetch and combine for one tiered layer, and dense attention for one.

Nothing is allocated and nothing waits for the host, so a step can be captured in a CUDA graph with the length as a
device tensor. With more than one slice of the batch, select and fetch of a slice run on a side stream while K of the
next slice is scored: the link and the device's memory then work at the same time.
"""

from __future__ import annotations

from itertools import pairwise

import torch
import triton

from kcache.backends.triton.common import on_device, power_of_two
from kcache.backends.triton.decode import decode_kernel
from kcache.backends.triton.gather import gather_kernel
from kcache.backends.triton.hot import HotRows
from kcache.backends.triton.score import score_kernel, weight_kernel
from kcache.backends.triton.select import select_kernel
from kcache.backends.triton.workspace import DenseWorkspace, Workspace

_TAIL = {"none": 0, "renormalise": 1, "block": 2}


class SliceStep:
    """One slice of the batch: the tensors of ``triton_decode`` and the scratch rows that belong to it."""

    def __init__(
        self,
        ws: Workspace,
        first: int,
        last: int,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        length: torch.Tensor,
        scaling: float,
        means: torch.Tensor | None,
        mask: torch.Tensor | None,
        softcap: float | None,
        sinks: torch.Tensor | None,
        hot: HotRows | None,
        out: torch.Tensor,
    ) -> None:
        self.ws, self.batch = ws, last - first
        self.rows = slice(first * ws.heads, last * ws.heads)
        self.query, self.keys, self.values = query[first:last], keys[first:last], values[first:last]
        self.out, self.length, self.scaling = out[first:last], length, scaling
        self.means = None if means is None else means[first:last]
        self.mask = None if mask is None else mask[first:last]
        self.softcap, self.sinks = softcap, sinks
        self.hot = hot
        self.hot_store = None if hot is None else hot.store[first:last]

    @property
    def count(self) -> int:
        """Rows of work."""
        return self.batch * self.ws.heads

    def mask_or_dummy(self) -> tuple[torch.Tensor, int]:
        """The mask and its stride, or any tensor where there is none."""
        return (self.length, 0) if self.mask is None else (self.mask, self.mask.stride(0))

    def run(self) -> None:
        """All four verbs, one after the other."""
        self.score()
        self.finish()

    def finish(self) -> None:
        """What follows the read of K."""
        self.weigh()
        self.select()
        self.gather()

    def score(self) -> None:
        """Stream K once; leave scores and partial sums of exponentials in the workspace."""
        ws, tune, rows = self.ws, self.ws.tuning, self.rows
        mask, stride_mask = self.mask_or_dummy()
        score_kernel[(self.count * ws.score_splits,)](
            self.query, self.keys, mask, ws.scores[rows], ws.part_max[rows], ws.part_sum[rows], self.length,
            self.query.stride(0), self.query.stride(1),
            self.keys.stride(0), self.keys.stride(1), self.keys.stride(2), stride_mask,
            ws.stride, self.scaling, self.softcap or 1.0, ws.score_splits,
            HEADS=ws.heads, REPEAT=ws.repeat, G=ws.group, GP=16, D=ws.dim, BLOCK_D=power_of_two(ws.dim),
            BLOCK_L=ws.score_block, STAGES=tune.score_stages, HAS_MASK=self.mask is not None,
            HAS_SOFTCAP=self.softcap is not None, UPCAST=ws.upcast,
            num_warps=tune.score_warps, num_stages=tune.score_stages,
        )  # fmt: skip

    def weigh(self) -> None:
        """Scores to log-sum-exps, block maxima of the group's summed probabilities and block probabilities."""
        ws, tune, rows = self.ws, self.ws.tuning, self.rows
        weight_kernel[(self.count, triton.cdiv(ws.capacity, ws.chunk))](
            ws.scores[rows], ws.part_max[rows], ws.part_sum[rows], self.length if self.sinks is None else self.sinks,
            ws.lse[rows], ws.block_top[rows], ws.tail_weight[rows], self.length,
            ws.stride, ws.blocks, ws.tail_blocks, ws.score_splits,
            HEADS=ws.heads, G=ws.group, GP=power_of_two(ws.group), SP=power_of_two(ws.score_splits), CHUNK=ws.chunk,
            BLOCK=ws.block, TAIL_BLOCK=ws.tail_block, HAS_SINKS=self.sinks is not None, HAS_TAIL=ws.tail == "block",
            num_warps=tune.weight_warps,
        )  # fmt: skip

    def select(self) -> None:
        """The TopN rows, their coefficients, and where hot rows are."""
        ws, rows, hot = self.ws, self.rows, self.hot
        none = self.length
        select_kernel[(self.count,)](
            ws.scores[rows], ws.lse[rows], ws.block_top[rows], ws.tail_weight[rows], ws.candidates[rows],
            ws.picks[rows], ws.coefficients[rows], ws.mass[rows], self.length,
            none if hot is None else hot.tags[rows], none if hot is None else hot.stamps[rows],
            none if hot is None else hot.clock[rows], none if hot is None else hot.claims[rows],
            ws.hot_slots[rows], ws.hot_inserts[rows], none if hot is None else hot.hits.view(-1)[rows],
            ws.stride, ws.blocks, ws.tail_blocks,
            G=ws.group, GS=ws.heads_at_once, N=ws.topn, NP=power_of_two(ws.topn), BP=power_of_two(ws.blocks),
            BLOCK=ws.block, TAIL_BLOCK=ws.tail_block, TAIL=_TAIL[ws.tail],
            HOT_SETS=1 if hot is None else hot.sets, HOT_WAYS=0 if hot is None else hot.ways,
            num_warps=ws.select_warps,
        )  # fmt: skip

    def gather(self) -> None:
        """Fetch the picked rows, weigh them, add the tail, write the output."""
        ws, tune, rows = self.ws, self.ws.tuning, self.rows
        means = self.query.unsqueeze(2) if self.means is None else self.means
        group2, block_d = power_of_two(ws.group), power_of_two(ws.dim_v)
        gather_kernel[(self.count * (ws.pick_splits + ws.tail_splits),)](
            self.values, means, ws.picks[rows], ws.coefficients[rows], ws.tail_weight[rows], ws.partial[rows],
            ws.counters[rows], self.out, self.length,
            self.query if self.hot_store is None else self.hot_store, ws.hot_slots[rows], ws.hot_inserts[rows],
            self.values.stride(0), self.values.stride(1), self.values.stride(2),
            means.stride(0), means.stride(1), means.stride(2), self.out.stride(0), self.out.stride(1),
            ws.tail_blocks, self.count, ws.tail_splits,
            HEADS=ws.heads, REPEAT=ws.repeat, G=ws.group, G2=group2, GP=16, N=ws.topn, ROWS=ws.gather_rows,
            PICK_SPLITS=ws.pick_splits, D=ws.dim_v, BLOCK_D=block_d, TAIL_BLOCK=ws.tail_block,
            BLOCK_T=tune.tail_tile, STAGES=tune.tail_stages, HAS_TAIL=ws.tail_splits > 0,
            HOT_ROWS=0 if self.hot is None else self.hot.rows,
            STEP=reduction_step(group2 * block_d, ws.pick_splits + ws.tail_splits), UPCAST=ws.upcast,
            num_warps=tune.gather_warps,
        )  # fmt: skip


def reduction_step(width: int, parts: int) -> int:
    """Partial sums of ``width`` numbers to load at once: few round trips, without spilling."""
    return min(power_of_two(parts), max(1, 8192 // width))


def triton_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: int | torch.Tensor,
    *,
    scaling: float,
    workspace: Workspace,
    means: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    hot: HotRows | None = None,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Score, select, fetch and combine for one layer and one new token. N, pick and tail are the workspace's.

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
    means : Tensor ``[B, Hkv, nb, Dv]``, needed by the block tail
    mask : Tensor ``[B, >= length]`` bool or None
    softcap : float or None
    sinks : Tensor ``[Hq]`` or None
    hot : HotRows or None
    out : Tensor ``[B, Hq, Dv]`` or None
        Written and returned; by default a new tensor in the query's dtype.

    Returns
    -------
    out : Tensor ``[B, Hq, Dv]``
    picks : Tensor ``[B, Hkv, N]`` int32, or ``[B, Hkv, G, N]`` picked per query head
        Not sorted; -1 past the length. The workspace's own memory, as is ``mass``.
    mass : Tensor ``[B, Hkv, G]`` fp32
    """
    ws = workspace
    if ws.tail == "block" and means is None:
        raise ValueError("the block tail needs the block means")
    if out is None:
        out = query.new_empty(query.shape[0], query.shape[1], ws.dim_v)
    lengths = ws.length_tensor(length)
    bounds = [round(ws.batch * piece / ws.slices) for piece in range(ws.slices + 1)]
    steps = [
        SliceStep(ws, first, last, query, keys, values, lengths, scaling, means, mask, softcap, sinks, hot, out)
        for first, last in pairwise(bounds)
        if last > first
    ]
    with on_device(query.device):
        if ws.side is None or len(steps) == 1:
            for step in steps:
                step.run()
        else:
            main = torch.cuda.current_stream(query.device)
            ws.side.wait_stream(main)
            for step in steps[:-1]:
                step.score()
                ws.side.wait_stream(main)
                with torch.cuda.stream(ws.side):
                    step.finish()
            steps[-1].run()
            main.wait_stream(ws.side)
    per_head = (ws.batch, ws.kv_heads, ws.query_group, ws.topn)
    picks = ws.picks.view(ws.batch, ws.kv_heads, ws.topn) if ws.select == "group" else ws.picks.view(per_head)
    return out, picks, ws.mass.view(ws.batch, ws.kv_heads, ws.query_group)


def dense_decode(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    length: int | torch.Tensor,
    *,
    scaling: float,
    workspace: DenseWorkspace,
    mask: torch.Tensor | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Dense attention of one new token over ``length`` rows; parameters as for :func:`triton_decode`.

    Returns
    -------
    Tensor ``[B, Hq, Dv]``
        In the query's dtype. A sequence with every row masked gives zeros.
    """
    ws, tune = workspace, workspace.tuning
    batch, kv_heads, _, dim = keys.shape
    group, dim_v = query.shape[1] // kv_heads, values.shape[-1]
    if out is None:
        out = query.new_empty(batch, query.shape[1], dim_v)
    lengths = ws.length_tensor(length)
    valid = lengths.view(1, -1) if mask is None else mask
    group2, block_v = power_of_two(group), power_of_two(dim_v)
    with on_device(query.device):
        decode_kernel[(batch * kv_heads * ws.splits,)](
            query, keys, values, valid, lengths if sinks is None else sinks,
            ws.part_max, ws.part_sum, ws.partial, ws.counters, out, lengths,
            query.stride(0), query.stride(1), keys.stride(0), keys.stride(1), keys.stride(2),
            values.stride(0), values.stride(1), values.stride(2), valid.stride(0),
            out.stride(0), out.stride(1), scaling, softcap or 1.0, ws.splits,
            HEADS=kv_heads, G=group, G2=group2, GP=16, SP=power_of_two(ws.splits), D=dim, BLOCK_D=power_of_two(dim),
            DV=dim_v, BLOCK_DV=block_v, BLOCK_L=ws.block, STAGES=tune.dense_stages,
            STEP=reduction_step(group2 * block_v, ws.splits), HAS_MASK=mask is not None,
            HAS_SOFTCAP=softcap is not None, HAS_SINKS=sinks is not None, UPCAST=ws.upcast,
            num_warps=tune.dense_warps, num_stages=tune.dense_stages,
        )  # fmt: skip
    return out

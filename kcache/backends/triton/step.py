"""The Triton decode step of a tiered layer: score, select, fetch and combine.

Nothing waits for the host, so a step can be captured in a CUDA graph with the length as a device tensor.
"""

from __future__ import annotations

import torch

from kcache.backends.base import LowRank, NarrowKeys
from kcache.backends.triton.above import pick_above
from kcache.backends.triton.common import LOG2E, on_device, power_of_two, reduction_step
from kcache.backends.triton.hot import HotRows
from kcache.backends.triton.inputs import Results, StepInputs
from kcache.backends.triton.select import pick_most
from kcache.backends.triton.tail import DIRECTIONS
from kcache.backends.triton.topn import fetch_kernel, step_kernel
from kcache.backends.triton.workspace import Workspace

_LEAST_DIMS = 32
"""Of a product of whole numbers."""


class Step:
    """One step of one layer, ready to be launched: its inputs, its scratch memory and its hot rows.

    Parameters
    ----------
    workspace : Workspace
    inputs : StepInputs
    results : Results
    hot : HotRows or None

    Attributes
    ----------
    pick, source, source_at
        How rows are picked: a function like :func:`~.above.pick_above`, and a tensor and a number for it alone.
    """

    def __init__(self, workspace: Workspace, inputs: StepInputs, results: Results, hot: HotRows | None = None) -> None:
        self.ws, self.inputs, self.results, self.hot = workspace, inputs, results, hot
        self.rows = workspace.batch * workspace.heads
        self.pick = pick_above if workspace.spread == "need" else pick_most
        self.source, self.source_at = inputs.length, 0

    def run(self) -> None:
        """Launch it: all at once, or with select and fetch for themselves."""
        ws = self.ws
        # Comparing for the N largest takes registers that a program which scores has not got.
        at_once = ws.spread == "need"
        try:
            self.launch(self.shares, at_once)
            if not at_once:
                fetch_kernel[(self.rows,)](
                    self.inputs.length, *self._tensors, *self._strides, ws.stride, ws.blocks, *self._scoring,
                    ws.score_splits, ws.tail_splits, self.shares + 1, **self._sizes, num_warps=ws.select_warps,
                    num_stages=1, enable_fp_fusion=True,
                )  # fmt: skip
        except BaseException:  # an interrupt between two launches, too: the next step would wait for ever
            ws.set_back()
            raise

    def launch(self, shares: int, fetches: bool) -> None:
        """Launch what scores, with so many ``shares`` of a row's tail; whether it ``fetches`` as well."""
        ws = self.ws
        ahead = min(ws.ahead, self.rows) if shares else self.rows
        step_kernel[(self.rows * (ws.score_splits + shares),)](
            self._mask, self.inputs.length, *self._tensors, self._mask.stride(0), *self._strides, ws.stride, ws.blocks,
            *self._scoring, ws.score_splits, ws.tail_splits, self.shares + 1, self.rows, ahead, shares,
            **self._sizes, **self._score_sizes, FETCHES=fetches,
            num_warps=ws.warps, num_stages=1, maxnreg=ws.registers, enable_fp_fusion=True,
        )  # fmt: skip

    @property
    def _scoring(self) -> tuple[float, float]:
        return self.inputs.scaling, self.inputs.softcap or 1.0

    @property
    def _mask(self) -> torch.Tensor:
        return self.inputs.length.view(1, -1) if self.inputs.mask is None else self.inputs.mask

    @property
    def _narrow(self) -> NarrowKeys:
        given = self.inputs
        return given.narrow or NarrowKeys(given.query, given.query)

    @property
    def _value_scales(self) -> torch.Tensor:
        return self.inputs.query if self.inputs.value_scales is None else self.inputs.value_scales

    @property
    def _tail(self) -> LowRank:
        lse = self.ws.lse
        return self.inputs.lowrank or LowRank(lse, lse, lse.view(1, 1, *lse.shape))

    @property
    def shares(self) -> int:
        """Programs that sum a row's tail."""
        ws = self.ws
        return ws.tail_splits * -(-ws.rank // self._directions) if ws.tail_splits else 0

    @property
    def _directions(self) -> int:
        return min(DIRECTIONS, power_of_two(self.ws.rank))

    @property
    def _tensors(self) -> tuple[object, ...]:
        """What both kernels are given."""
        ws, given, results, tail, hot = self.ws, self.inputs, self.results, self._tail, self.hot
        none = given.length
        stored = (none,) * 7 if hot is None else (
            hot.store, hot.tags, hot.stamps, hot.clock, hot.claims, hot.counts, hot.order,
        )  # fmt: skip
        narrow = self._narrow
        lower = given.keys if narrow.lower is None else narrow.lower
        return (
            given.query, given.keys, lower, narrow.scales, narrow.centre, given.values, self._value_scales,
            tail.coefficients, tail.base, tail.basis, none if given.sinks is None else given.sinks,
            none if given.threshold is None else given.threshold, ws.scores, ws.block_top, ws.part_max, ws.part_sum,
            ws.lse, ws.listed, ws.found, ws.done, ws.partial, ws.shares, ws.held, ws.tickets, results.picks,
            results.weights, ws.weights, given.out, results.mass, ws.grown,
            none if given.tally is None else given.tally, *stored, ws.hot_slots, none if hot is None else hot.hits,
            self.source, self.source_at,
        )  # fmt: skip

    @property
    def _strides(self) -> tuple[int, ...]:
        given, tail = self.inputs, self._tail
        return (
            *given.query.stride()[:2], *given.keys.stride()[:3], *self._narrow.scales.stride()[:2],
            *given.values.stride()[:3], *self._value_scales.stride()[:2], *tail.coefficients.stride()[:3],
            *given.out.stride()[:2],
        )  # fmt: skip

    @property
    def _score_sizes(self) -> dict[str, object]:
        """Compile-time constants of scoring and of the tail."""
        ws, given = self.ws, self.inputs
        return {
            "BLOCK_L": ws.score_block, "STAGES": ws.score_stages,
            "AT_ONCE": self._directions, "BLOCK_T": ws.tail_tile, "TAIL_STAGES": ws.tuning.tail_stages,
            "HAS_MASK": given.mask is not None,
            "IS_NARROW": given.narrow is not None,
            "ALIGNED": is_aligned(self._tail.coefficients),
        }  # fmt: skip

    @property
    def _sizes(self) -> dict[str, object]:
        """Compile-time constants of both kernels."""
        ws, given, hot = self.ws, self.inputs, self.hot
        group2, block_dv = power_of_two(ws.group), power_of_two(ws.dim_v)
        # What picks above a threshold looks at a tile of blocks at a time: one variant for however many there are.
        blocks = power_of_two(ws.blocks) if ws.spread == "even" else 1
        return {
            "PICK": self.pick, "HEADS": ws.heads, "REPEAT": ws.repeat, "G": ws.group, "G2": group2, "GP": 16,
            "D": ws.dim, "BLOCK_D": max(1 if given.narrow is None else _LEAST_DIMS, power_of_two(ws.dim)),
            "SP": power_of_two(ws.score_splits), "BLOCK": ws.block, "MOST": ws.width, "TILE": ws.select_tile,
            "MP": power_of_two(ws.width), "BP": blocks, "GS": ws.heads_at_once,
            "REFINED": ws.refine_tile, "WEIGHED": ws.weigh_tile, "ROWS": ws.gather_rows, "DV": ws.dim_v,
            "BLOCK_DV": block_dv, "RANK": ws.rank, "RQ": power_of_two(ws.rank), "RP": ws.shares.shape[3],
            "STEP": reduction_step(group2 * ws.shares.shape[3], 1 + ws.tail_splits),
            "RANK_STEP": reduction_step(group2 * block_dv, max(1, ws.rank)),
            "HOT_SETS": 1 if hot is None else hot.sets, "HOT_WAYS": 0 if hot is None else hot.ways,
            "HAS_SOFTCAP": given.softcap is not None, "HAS_LOWER": self._narrow.lower is not None,
            "HAS_SINKS": given.sinks is not None,
            "HAS_TALLY": given.tally is not None, "HAS_SCALES": given.value_scales is not None,
            "RENORMALISE": ws.tail == "renormalise", "UPCAST": ws.upcast,
        }  # fmt: skip


def is_aligned(coefficients: torch.Tensor) -> bool:
    """Whether the rows ``[B, Hkv, r, capacity]`` of coefficients begin at, and have room for, multiples of 16."""
    return coefficients.data_ptr() % 16 == 0 and all(stride % 16 == 0 for stride in coefficients.stride()[:3])


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
    narrow: NarrowKeys | None = None,
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
        A row is contiguous, any other strides; the rows of a head lie within 2**31 numbers.
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
    narrow : NarrowKeys or None
        What belongs to int8 ``keys``.
    value_scales : Tensor ``[B, Hkv, capacity]`` fp32 on the device, or None
        What rows of int8 ``values`` are multiplied by.
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
    if narrow is not None and narrow.lower is not None and narrow.lower.stride() != keys.stride():
        raise ValueError("the planes of K lie differently in memory")
    if out is None:
        out = query.new_empty(query.shape[0], query.shape[1], ws.dim_v)
    inputs = StepInputs(
        query, keys, values, ws.length_tensor(length), scaling, out, lowrank, mask, softcap, sinks, threshold, tally,
        narrow, value_scales,
    )  # fmt: skip
    rows = ws.batch * ws.heads
    if weights is None:
        weights = query.new_empty(rows, ws.width, dtype=torch.float32)
    results = Results(
        query.new_empty(rows, ws.width, dtype=torch.int32),
        query.new_empty(rows, ws.group, dtype=torch.float32),
        weights.view(rows, ws.width),
    )
    with on_device(query.device):
        Step(ws, inputs, results, hot).run()
        if sinks is not None and ws.tail == "renormalise":  # what a sink takes stays with it
            rows_share = 1.0 - torch.exp2(sinks.float() * LOG2E.value - ws.lse.view(ws.batch, -1))
            out.mul_(rows_share.unsqueeze(2))
    per_head = (ws.batch, ws.kv_heads, ws.query_group, ws.width)
    picks = results.picks.view((ws.batch, ws.kv_heads, ws.width) if ws.select == "group" else per_head)
    return out, picks, results.mass.view(ws.batch, ws.kv_heads, ws.query_group)

"""Launch every kernel once at given sizes, on stand-in tensors that are never read when nothing really runs."""

from __future__ import annotations

import torch

from kcache.backends.base import LowRank, NarrowKeys
from kcache.backends.triton import Chip, DenseWorkspace, HotRows, Tuning, Workspace, append, dense_decode, triton_decode
from kcache.backends.triton.narrow import narrow, widen
from kcache.backends.triton.pointwise import gated, rms_norm, rotate
from kcache.backends.triton.prompt import attend_prompt
from kcache.planning.sizes import rank_of


def launch_all(
    batch: int,
    kv_heads: int,
    group: int,
    dim: int,
    topn: int,
    capacity: int,
    dtype: torch.dtype = torch.bfloat16,
    select: str = "group",
    tail: str = "lowrank",
    spread: str = "need",
    softcap: float | None = None,
    sinks: bool = False,
    padded: bool = False,
    hot: int = 0,
    rank: int | None = None,
    bits: int | str = 16,
    tuning: Tuning | None = None,
) -> None:
    """Run append, one TopN step, one dense step and what lies between products."""
    tuning = tuning or Tuning(chip=Chip())
    cpu = torch.device("cpu")
    query = torch.empty(batch, kv_heads * group, dim, dtype=dtype)
    new = torch.empty(batch, kv_heads, dim, dtype=dtype)
    keys = torch.empty(batch, kv_heads, capacity, dim, dtype=dtype)
    rank = rank_of(rank, dim)
    coefficients = torch.empty(batch, kv_heads, rank, capacity, dtype=dtype)
    lowrank = LowRank(torch.empty(batch, kv_heads, dim), torch.empty(batch, kv_heads, rank, dim), coefficients)
    mask = torch.ones(batch, capacity, dtype=torch.bool) if padded else None
    length = torch.full((1,), capacity, dtype=torch.int32)
    heads = kv_heads if select == "group" else kv_heads * group
    sink = torch.zeros(kv_heads * group) if sinks else None
    scales = narrowed = None
    if bits != 16:
        keys, scales = keys.to(torch.int8), torch.empty(batch, kv_heads, capacity)
        centre = torch.empty(batch, kv_heads, dim)
        narrowed = NarrowKeys(scales, centre, torch.empty_like(keys) if bits == "8+8" else None)
    values, value_scales = (new.new_empty(keys.shape), None) if bits == "8+8" else (keys, scales)
    above = spread == "need"
    append(
        new, new, keys, values, length, offset=-1, lowrank=lowrank, mask=mask, narrow=narrowed,
        value_scales=value_scales,
    )  # fmt: skip
    triton_decode(
        query, keys, values, length, scaling=dim**-0.5, lowrank=lowrank if tail == "lowrank" else None, mask=mask,
        softcap=softcap, sinks=sink, hot=HotRows(batch, heads, hot, dim, values.dtype, cpu) if hot else None,
        narrow=narrowed, value_scales=value_scales,
        threshold=torch.empty(batch) if above else None,
        tally=torch.empty(batch, dtype=torch.int64) if above else None,
        workspace=Workspace(
            batch, kv_heads, group, dim, dim, capacity, topn, cpu, select=select, tail=tail, spread=spread,
            tail_rank=rank, itemsize=keys.element_size(), tuning=tuning,
        ),
    )  # fmt: skip
    if narrowed is not None:
        prompt = query[:, :kv_heads, None]
        upper, steps, rest = narrow(prompt, 2 if bits == "8+8" else 1, narrowed.centre)
        widen(upper, steps, prompt, rest, narrowed.centre)
    keys = keys.to(dtype)
    dense_decode(
        query, keys, keys, length, scaling=dim**-0.5, mask=mask, softcap=softcap, sinks=sink,
        workspace=DenseWorkspace(
            batch, kv_heads, group, dim, dim, capacity, cpu, itemsize=keys.element_size(), tuning=tuning
        ),
    )  # fmt: skip
    hidden, inner = torch.empty(batch, 1, 32 * dim, dtype=dtype), torch.empty(batch, 1, 112 * dim, dtype=dtype)
    rms_norm(hidden, hidden[0, 0], 1e-5, "rounded")
    rotate(query, new, query[:, 0], query[:, 0], rounded=True)
    gated(inner, inner, "silu")
    if dtype.itemsize == 2:
        allowed = torch.ones(batch, 1, 64, capacity, dtype=torch.bool) if padded else None
        asked = torch.empty(batch, kv_heads * group, 64, dim, dtype=dtype)
        attend_prompt(asked, keys, keys, allowed, dim**-0.5, softcap, sink, tuning.chip)

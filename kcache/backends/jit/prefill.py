"""What exact attention on the CPU calls for a prompt: tensors in, packed for the tiles, the region run, the result out.

Shapes: query ``[B, Hq, Q, D]``, keys ``[B, Hkv, L, D]``, values ``[B, Hkv, L, Dv]``, mask ``[B, 1, Q, L]`` bool.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F

from kcache.backends.jit.steps import Call, floats
from kcache.backends.jit.team import find_team
from kcache.backends.jit.tiles import COLUMNS, LANES, can_assemble, let_assemble

_LEAST = 32
"""Queries for which it is worth packing K and V."""
_LOG2E = 1.4426950408889634


@lru_cache
def is_served() -> bool:
    """Whether this machine's registers are the ones that the tiles are written for."""
    return can_assemble()


def compile_prompt(dtype: torch.dtype) -> None:
    """Compile the region for rows of ``dtype``, or read it from disk."""
    if dtype == torch.bfloat16 and is_served():
        _region()


def serves(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> bool:
    """Whether :func:`attend_prompt` can attend this."""
    if not all(rows.dtype == torch.bfloat16 and rows.device.type == "cpu" for rows in (query, keys, values)):
        return False
    fits = mask is None or (mask.dtype == torch.bool and mask.shape[1:] == (1, query.shape[2], keys.shape[2]))
    sizes = keys.shape[3] % 2 == 0 and values.shape[3] % LANES == 0
    if query.shape[2] < _LEAST or not fits or not sizes or scaling <= 0 or not is_served():
        return False
    learns = torch.is_grad_enabled() and any(rows.requires_grad for rows in (query, keys, values))
    if learns or torch.compiler.is_compiling():
        return False  # there is neither a gradient nor a graph of it
    return find_team().parallel is not None or torch.get_num_threads() == 1  # one thread does not beat many of torch's


def attend_prompt(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Exact attention ``[B, Hq, Q, Dv]`` bf16, without a mask causal and aligned to the end.

    Sums are fp32, weights are rounded to bf16 before they are multiplied with V, as flash attention does.
    """
    from kcache.backends.jit.prompt import FIELDS, ROWS

    batch, heads, count, dim = query.shape
    length, dim_v, team = keys.shape[2], values.shape[3], find_team()
    out = floats(batch, heads, count, dim_v)
    packed = _padded(query, ROWS).contiguous(), *_packed(keys, values)
    call = Call(
        threads=team.threads,
        number=team.number,
        size=team.size,
        items=batch * heads,
        heads=heads,
        group=heads // keys.shape[1],
        count=count,
        length=length,
        past=length - count,
        blocks=packed[1].shape[2],
        half=dim // 2,
        dim_v=dim_v,
    )
    call.point(query=packed[0], keys=packed[1], values=packed[2], out=out)
    call.point(scale=torch.tensor([scaling * _LOG2E], dtype=torch.float32, device="cpu"))
    if mask is not None:
        mask = (mask if mask.stride(3) == 1 else mask.contiguous()).view(torch.uint8)
        call.set(mask_batch=0 if mask.shape[0] == 1 else mask.stride(0), mask_row=mask.stride(2))
        call.point(mask=mask)
    if sinks is not None:
        call.point(sinks=sinks.float().contiguous())
    numbers = call.numbers(FIELDS)
    team.run(_region(), numbers.ctypes.data, team.threads)
    return out.to(query.dtype)


def _region() -> int:
    from kcache.backends.jit.entries import compiled

    let_assemble()
    return compiled("prompt", torch.bfloat16)


def _padded(rows: torch.Tensor, multiple: int) -> torch.Tensor:
    """``[B, H, T, D]`` with rows of zeros up to a multiple."""
    missing = -rows.shape[2] % multiple
    return F.pad(rows, (0, 0, 0, missing)) if missing else rows


def _packed(keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """K as ``[B, Hkv, blocks, D / 2, 64]`` words and V as ``[B, Hkv, pairs, Dv]`` words."""
    keys, values = _padded(keys, COLUMNS), _padded(values, COLUMNS)
    words = keys.contiguous().view(torch.int32).unflatten(2, (-1, COLUMNS)).transpose(3, 4).contiguous()
    pairs = values.unflatten(2, (-1, 2)).transpose(3, 4).contiguous().view(torch.int32).squeeze(4)
    return words, pairs

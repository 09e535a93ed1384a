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
from kcache.backends.traced import is_ordinary

_LEAST = 32
"""Queries for which it is worth packing K and V."""
_FAINT = 1e-30
"""Scaling from which an exponent of 2 is a number."""
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
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> bool:
    """Whether :func:`attend_prompt` can attend this."""
    if softcap is not None or not is_ordinary(query, keys, values, mask, sinks):
        return False
    if query.device.type != "cpu" or query.dtype != torch.bfloat16:
        return False
    count, dim = query.shape[2:]
    if count < _LEAST or dim % 2 or values.shape[3] % LANES or scaling < _FAINT or not is_served():
        return False
    return find_team().parallel is not None or torch.get_num_threads() == 1  # one thread does not beat many of torch's


def attend_prompt(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Exact attention ``[B, Hq, Q, Dv]`` bf16, without a mask causal and aligned to the end.

    Sums are fp32, weights are rounded to bf16 before they are multiplied with V, as flash attention does.
    """
    from kcache.backends.jit.prompt import FIELDS, ROWS

    batch, heads, count, dim = query.shape
    length, dim_v, team = keys.shape[2], values.shape[3], find_team()
    out = floats(batch, heads, count, dim_v)
    missing = -count % ROWS
    asked = F.pad(query, (0, 0, 0, missing)) if missing else query.contiguous()
    packed = asked, _packed_keys(keys), _packed_values(values)
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


def _packed_keys(keys: torch.Tensor) -> torch.Tensor:
    """K as words ``[B, Hkv, blocks, D / 2, 64]``, rows of zeros behind the last."""
    batch, heads, length, dim = keys.shape
    if keys.storage_offset() % 2 or keys.stride(3) != 1 or any(step % 2 for step in keys.stride()[:3]):
        keys = keys.clone(memory_format=torch.contiguous_format)
    rows, whole = keys.view(torch.int32).transpose(2, 3), length // COLUMNS
    words = rows.new_empty(batch, heads, -(-length // COLUMNS), dim // 2, COLUMNS)
    words[:, :, :whole] = rows[..., : whole * COLUMNS].unflatten(3, (whole, COLUMNS)).transpose(2, 3)
    if whole < words.shape[2]:
        words[:, :, whole, :, length % COLUMNS :] = 0
        words[:, :, whole, :, : length % COLUMNS] = rows[..., whole * COLUMNS :]
    return words


def _packed_values(values: torch.Tensor) -> torch.Tensor:
    """V as words ``[B, Hkv, pairs, Dv]``, rows of zeros behind the last."""
    batch, heads, length, dim = values.shape
    pairs = values.new_empty(batch, heads, -(-length // COLUMNS) * COLUMNS // 2, dim, 2)
    for half in range(2):
        rows = values[:, :, half::2]
        pairs[:, :, : rows.shape[2], :, half] = rows
        pairs[:, :, rows.shape[2] :, :, half] = 0
    return pairs.view(torch.int32).squeeze(4)

"""What exact attention on a GPU calls for a prompt that torch's flash kernel does not take.

The kernel is tried once for each kind of call, on a small prompt beside attention written out in fp32. Where it does
not compile, or comes to other numbers, torch goes on as before and a warning says so.

Shapes: query ``[B, Hq, Q, D]``, keys ``[B, Hkv, L, D]``, values ``[B, Hkv, L, Dv]``, mask ``[B or 1, 1, Q, L]`` bool.
"""

from __future__ import annotations

import warnings
from functools import lru_cache

import torch

from kcache.backends.plain import plain
from kcache.backends.traced import is_ordinary
from kcache.backends.triton.prompt import attend_prompt

__all__ = ["attend_prompt", "serves"]

_WIDEST = 256
_MOST_PROGRAMS = 65535
"""Along the second dimension of a launch, which CUDA allows."""
_TRIAL = (130, 410)
"""Queries, and rows before them, of the prompt it is tried on: no multiples of any tile, and several tiles whole."""
_NEAR = 0.03


def serves(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> bool:
    """Whether :func:`attend_prompt` attends this, and torch has nothing faster."""
    if mask is None and softcap is None and sinks is None:
        return False
    if query.dtype.itemsize != 2 or not is_ordinary(query, keys, values, mask, sinks):
        return False
    batch, heads, _, dim = query.shape
    kv_heads, dim_v = keys.shape[1], values.shape[3]
    if batch * kv_heads > _MOST_PROGRAMS or (sinks is not None and sinks.numel() != heads):
        return False
    if not 16 <= min(dim, dim_v) <= max(dim, dim_v) <= _WIDEST:
        return False
    if query.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return False  # neither a trial nor a kernel's first call can be part of a graph
    kind = (query.dtype, heads // kv_heads, dim, dim_v, mask is not None, softcap is not None, sinks is not None)
    return holds(query.device, *kind)


@lru_cache
def holds(
    device: torch.device, dtype: torch.dtype, group: int, dim: int, dim_v: int, masked: bool, capped: bool, sunk: bool
) -> bool:
    """Whether the kernel comes to what attention written out does, for calls of this kind."""
    try:
        with torch.autocast(device.type, enabled=False):
            given = *_tried_on(device, dtype, group, dim, dim_v, masked), dim**-0.5, 3.0 if capped else None
            sinks = torch.linspace(-1, 1, 2 * group, device=device).to(dtype) if sunk else None
            off = float((attend_prompt(*given, sinks).float() - plain(*given, sinks).float()).abs().max())
    except torch.OutOfMemoryError:
        raise  # another time it may fit, so this is not remembered
    except Exception as error:
        warnings.warn(f"prompts are attended by torch: our kernel fails on {device} ({error})", stacklevel=2)
        return False
    if not off < _NEAR:
        warnings.warn(f"prompts are attended by torch: our kernel is off by {off:.3g} on {device}", stacklevel=2)
        return False
    return True


def _tried_on(
    device: torch.device, dtype: torch.dtype, group: int, dim: int, dim_v: int, masked: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Query, keys, values, mask: a sequence with padding before the prompt, one with padding within, one with holes."""
    draw, (count, past) = torch.Generator().manual_seed(0), _TRIAL
    length = count + past

    def randn(*shape: int) -> torch.Tensor:  # on the CPU, whatever the default device is
        return torch.randn(shape, generator=draw, device="cpu").to(device, dtype)

    query, keys, values = randn(3, 2 * group, count, dim), randn(3, 2, length, dim), randn(3, 2, length, dim_v)
    if not masked:
        return query, keys, values, None
    mask = torch.ones(count, length, dtype=torch.bool, device="cpu").tril(past).expand(3, 1, -1, -1).clone()
    mask[0, ..., :90] = False
    mask[1, ..., : past + 20] = False
    mask[2, ..., 80:] &= torch.rand(count, length - 80, generator=draw, device="cpu") < 0.5
    return query, keys, values, mask.to(device)

"""Exact attention over K and V, for prefill, resident layers and short contexts, on any device.

One function serves all of them and honours what stock SDPA ignores or refuses: attention sinks and logit
soft-capping. New rows come after the past, so "no mask" means causal and aligned to the end. On the CPU a chunk that
follows a past is attended in two parts, past (unmasked) and chunk (causal), merged by log-sum-exp, so no
``[Q, L]`` mask is ever made.

Shapes: query ``[B, Hq, Q, D]``, keys ``[B, Hkv, L, D]``, values ``[B, Hkv, L, Dv]``, mask ``[B, 1, Q, L]`` bool (True =
attend) or additive float, result ``[B, Hq, Q, Dv]``.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from kcache.backends.jit import has_numba
from kcache.backends.plain import plain, repeat
from kcache.machine.devices import is_too_old, runs_kernels

_REPEATED_BYTES = 256 * 2**20


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Exact attention; see the module docstring for shapes."""
    if (out := compiled(query, keys, values, mask, scaling, softcap, sinks)) is not None:
        return out
    if softcap is not None or sinks is not None:
        return plain(query, keys, values, mask, scaling, softcap, sinks)
    if query.shape[2] == 1:
        return _one_token(query, keys, values, mask, scaling)
    past = keys.shape[2] - query.shape[2]
    if query.device.type == "cpu" and mask is None and past > 0:
        if keys.shape[3] != values.shape[3]:
            return plain(query, keys, values, mask, scaling, softcap, sinks)
        return _past_and_chunk(query, keys, values, past, scaling)
    if query.shape[1] != keys.shape[1] and not _knows_groups(query, values, mask):
        return _some_heads_at_a_time(query, keys, values, mask, scaling)
    return _fused(query, keys, values, mask, scaling)


def compiled(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """Attention of a prompt by a kernel of our own, or None where none serves.

    They leave out what a mask excludes, as that of a sliding window does most rows. On some CPUs ours is twice as fast
    as torch's; on a GPU torch's is taken for plain causal prompts, and ours for all others.
    """
    if query.shape[2] == 1 or torch.compiler.is_compiling():  # a step, of every layer and token
        return None
    kernels = _kernels_for(query)
    if kernels is None or not kernels.serves(query, keys, values, mask, scaling, softcap, sinks):
        return None
    out: torch.Tensor = kernels.attend_prompt(query, keys, values, mask, scaling, softcap, sinks)
    return out


def _kernels_for(query: torch.Tensor) -> Any:
    """The module of kernels for prompts on the query's device, if there is one for numbers of its type."""
    if query.device.type == "cpu" and query.dtype == torch.bfloat16:
        return importlib.import_module("kcache.backends.jit.prefill") if has_numba() else None
    if query.device.type == "cuda" and query.dtype.itemsize == 2 and runs_kernels(query.device):
        return importlib.import_module("kcache.backends.triton.prefill")
    return None


def _fused(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """Whatever kernel torch has for it; without a mask causal, aligned to the end."""
    grouped, first = query.shape[1] != keys.shape[1], query.shape[2] == keys.shape[2]
    if mask is None and not first:
        mask = causal_lower_right(query.shape[2], keys.shape[2])
    return F.scaled_dot_product_attention(
        query, keys, values, mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
    )


def _knows_groups(query: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> bool:
    """Whether torch has a kernel that needs no copy of K and V for each query head, and keeps no scores.

    On CUDA that is flash attention alone: 16 bits, heads of up to 256, no mask, cards from Ampere on. What takes the
    rest writes all scores down when it is given groups.
    """
    if query.device.type == "cpu":
        return True
    if mask is not None:
        return False
    if query.device.type != "cuda":
        return True
    return query.dtype.itemsize == 2 and max(query.shape[3], values.shape[3]) <= 256 and not is_too_old(query.device)


def _some_heads_at_a_time(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """With K and V repeated for each query head, of as many KV heads as that takes little memory for."""
    batch, kv_heads, length, dim = keys.shape
    group = query.shape[1] // kv_heads
    one = batch * group * length * (dim + values.shape[3]) * keys.element_size()
    step = max(1, _REPEATED_BYTES // one)
    out = query.new_empty(*query.shape[:3], values.shape[3])
    for start in range(0, kv_heads, step):
        here, asking = slice(start, start + step), slice(start * group, (start + step) * group)
        part, seen = query[:, asking], mask if mask is None or mask.shape[1] == 1 else mask[:, asking]
        out[:, asking] = _fused(part, repeat(keys[:, here], part), repeat(values[:, here], part), seen, scaling)
    return out


def _one_token(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None, scaling: float
) -> torch.Tensor:
    """One query per sequence: the query heads of a group become the query rows of its KV head."""
    batch, _, _, dim = query.shape
    packed = query.reshape(batch, keys.shape[1], -1, dim)
    if mask is not None and mask.shape[1] != 1:
        return F.scaled_dot_product_attention(query, repeat(keys, query), repeat(values, query), mask, scale=scaling)
    out = F.scaled_dot_product_attention(packed, keys, values, mask, scale=scaling)
    return out.reshape(batch, -1, 1, values.shape[-1])


def _past_and_chunk(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, past: int, scaling: float
) -> torch.Tensor:
    """Attend the past and the chunk apart and merge by log-sum-exp (Milakov & Gimelshein, 2018)."""
    old, old_lse = _with_lse(query, keys[:, :, :past], values[:, :, :past], False, scaling)
    new, new_lse = _with_lse(query, keys[:, :, past:], values[:, :, past:], True, scaling)
    share = torch.sigmoid(old_lse - new_lse).unsqueeze(-1)
    return (old.float() * share + new.float() * (1 - share)).to(query.dtype)


def _with_lse(
    query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, causal: bool, scaling: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention and the log-sum-exp of its scores ``[B, Hq, Q]`` fp32, on the CPU."""
    keys, values = repeat(keys, query), repeat(values, query)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, keys, values, 0.0, causal, scale=scaling
    )
    return out, lse.float()

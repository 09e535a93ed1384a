"""Whether a call may be answered by code of our own, or somebody looks on who wants torch's operators."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import is_in_torch_dispatch_mode


def is_ordinary(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    sinks: torch.Tensor | None,
) -> bool:
    """Whether a prompt's tensors are as :mod:`kcache.backends.dense` says, on one device, and nobody looks on.

    Rows are of one type, and the mask, if there is one, is of booleans and the same for all heads.
    """
    given = [tensor for tensor in (query, keys, values, mask, sinks) if tensor is not None]
    if wants_operators(given) or any(tensor.device != query.device for tensor in given):
        return False
    batch, heads, count, dim = query.shape
    kv_heads, length = keys.shape[1:3]
    fit = keys.shape == (batch, kv_heads, length, dim) and values.shape[:3] == keys.shape[:3] and heads % kv_heads == 0
    if mask is not None:
        fit = fit and mask.shape[0] in (1, batch) and mask.shape[1:] == (1, count, length) and mask.dtype == torch.bool
    return fit and query.dtype == keys.dtype == values.dtype


def wants_operators(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether what is done to these is traced, learnt from or stood in for: what has no address cannot be read."""
    if torch.compiler.is_compiling():
        return True
    internals: Any = torch._C
    if internals._get_tracing_state() is not None or internals._are_functorch_transforms_active():
        return True
    if is_in_torch_dispatch_mode():
        return True
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return True  # there is no gradient of it
    return any(type(tensor) not in (torch.Tensor, torch.nn.Parameter) for tensor in tensors)

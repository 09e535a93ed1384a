"""The attention function registered with transformers as ``kcache``, and its mask function.

A cache never sees the queries and an attention function never sees the cache, so both are needed: ``KCache.update``
leaves a handle on the V tensor and :func:`attention` finds it there. V without a handle belongs to some other cache
and is answered by the model's original attention.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, cast

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kcache.attention.gradients import without_gradient
from kcache.attention.handles import AttentionCall, Handle
from kcache.backends import dense
from kcache.errors import CacheStateError

_HANDLED = ("softcap", "s_aux")
_HARMLESS = ("position_ids", "s_aux", "cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")

Watcher = Callable[..., tuple[torch.Tensor, torch.Tensor | None]]
WATCHER: ContextVar[Watcher | None] = ContextVar("kcache_watcher", default=None)
"""Who answers attention's calls instead of it, in this thread: the probe, while it looks at a model."""


def not_understood(kwargs: dict[str, Any]) -> list[str]:
    """The arguments of a call of attention that change its result in a way that a tiered layer does not know."""
    return [name for name, value in kwargs.items() if isinstance(value, torch.Tensor) and name not in _HARMLESS]


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *args: Any,
    fallback: str = "sdpa",
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend, as transformers calls it: query ``[B, Hq, Q, D]``, result ``[B, Q, Hq, Dv]`` and no weights."""
    watcher = WATCHER.get()
    if watcher is not None:
        return watcher(module, query, key, value, attention_mask, *args, fallback=fallback, **kwargs)
    handle = getattr(value, "_kcache", None)
    if handle is None:
        return original(module, query, key, value, attention_mask, *args, fallback=fallback, **kwargs)
    if torch.compiler.is_compiling():
        return _answer_uncompiled(handle, module, query, key, value, attention_mask, kwargs)
    return _answer(handle, module, query, key, value, attention_mask, kwargs)


def _answer(
    handle: Handle,
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[torch.Tensor, None]:
    """Attend with what the handle stands for."""
    _refuse_what_is_not_made(module, kwargs)
    scaling = kwargs.get("scaling")
    out = handle.attend(
        module,
        AttentionCall(
            query=query.detach(),
            key=key.detach(),
            value=value.detach(),
            mask=attention_mask,
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
        ),
    )
    return without_gradient(out, query, key, value).transpose(1, 2).contiguous(), None


_answer_uncompiled = torch.compiler.disable(_answer)
"""For compiled models: what a layer does is decided in Python, anew for each step."""


def _refuse_what_is_not_made(module: torch.nn.Module, kwargs: dict[str, Any]) -> None:
    """Raise for a call of attention whose answer would lack what was asked for."""
    if unknown := not_understood(kwargs):
        raise CacheStateError(f"attention with {unknown[0]} cannot be tiered; the layer should have stayed stock")
    if kwargs.get("dropout"):
        raise CacheStateError(
            f"{type(module).__name__} asks for dropout in its attention, and a KCache drops nothing; call model.eval()"
        )
    if _wants_weights(module, kwargs):
        raise CacheStateError(
            "output_attentions=True, and a KCache keeps no attention weights; cache.snapshot() has the picks of a step "
            "and what they hold. For all weights use the model's own cache, with eager attention"
        )


def original(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    *args: Any,
    fallback: str,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attend as the model did before it was attached, for V that is not ours."""
    causal = kwargs.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    count, length = query.shape[2], key.shape[2]
    special = any(kwargs.get(name) is not None for name in _HANDLED)
    scaling = kwargs.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    given = query, key, value, mask, scaling, kwargs.get("softcap"), kwargs.get("s_aux")
    out: torch.Tensor | None = None
    eager = getattr(sys.modules[type(module).__module__], "eager_attention_forward", None)
    if fallback == "eager" and eager is not None:
        if special and causal and not _is_more_wanted(module, kwargs):  # the only attention that knows these
            out = dense.compiled(*given)
        if out is None:
            return _eager(eager, module, query, key, value, mask, causal, *args, **kwargs)
    elif kwargs.get("position_bias") is None:
        if causal and (special or (mask is None and 1 < count < length)):
            out = dense.attend(*given)
        elif not special and not kwargs.get("dropout") and (causal or mask is not None):
            out = dense.compiled(*given)
    if out is not None:
        return out.transpose(1, 2).contiguous(), None
    if causal and mask is None and 1 < count < length:
        mask = _causal(count, length, query.device)
    result: tuple[torch.Tensor, None] = sdpa_attention_forward(module, query, key, value, mask, *args, **kwargs)
    return result


def _is_more_wanted(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether attention is asked for its weights, too, or for what only its author knows."""
    return bool(_wants_weights(module, kwargs) or kwargs.get("dropout") or not_understood(kwargs))


def _wants_weights(module: torch.nn.Module, kwargs: dict[str, Any]) -> bool:
    """Whether attention's weights are wanted, as far as its arguments and the model's config tell."""
    return bool(kwargs.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False))


def _eager(
    eager: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    causal: bool,
    *args: Any,
    **kwargs: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Call the model's own eager attention, which wants an additive mask."""
    count, length = query.shape[2], key.shape[2]
    if mask is None and causal and count > 1:
        mask = _causal(count, length, query.device)
    if mask is not None and mask.dtype == torch.bool:
        zero = torch.zeros((), dtype=query.dtype, device=query.device)
        mask = torch.where(mask, zero, torch.finfo(query.dtype).min)
    result: tuple[torch.Tensor, torch.Tensor | None] = eager(module, query, key, value, mask, *args, **kwargs)
    return result


def _causal(count: int, length: int, device: torch.device) -> torch.Tensor:
    """The mask ``[1, 1, Q, L]`` of ``count`` new rows at the end of ``length``."""
    return torch.ones(count, length, dtype=torch.bool, device=device).tril(length - count)[None, None]


def mask_function(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    allow_is_causal_skip: bool = True,
    **kwargs: Any,
) -> torch.Tensor | None:
    """Make a bool mask ``[B, 1, Q, L]``, or None for plain causal attention aligned to the end.

    Reads the padding mask's values only where that costs no wait: on the CPU, or once per prefill.
    """
    plain = allow_is_causal_skip and isinstance(q_offset, int) and q_offset + q_length == kv_offset + kv_length
    # Rows within a sliding window are all attended; the rows of a chunk's length can lie in two chunks.
    chunked = getattr(kwargs.get("config"), "attention_chunk_size", None) is not None and kv_offset > 0
    if plain and (local_size is None or (kv_length <= local_size and not chunked)):
        if attention_mask is None:
            return None
        rows = attention_mask[:, kv_offset : kv_offset + kv_length].to(torch.bool)
        if rows.shape[1] == kv_length:
            on_device = attention_mask.device.type == "cuda"
            if q_length == 1 and on_device:
                return rows[:, None, None, :]
            if bool(rows.all()):
                return None
    mask: torch.Tensor | None = sdpa_mask(
        batch_size=batch_size,
        q_length=q_length,
        kv_length=kv_length,
        q_offset=cast(int, q_offset),
        kv_offset=kv_offset,
        attention_mask=attention_mask,
        local_size=local_size,
        allow_is_causal_skip=False,
        **kwargs,
    )
    return mask

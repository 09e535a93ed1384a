"""How many bytes a cache takes in either tier, from a model's config alone, and whether they are there.

Sizes assume ordinary attention: ``2 * layers * batch * kv_heads * head_dim`` values per token. Sliding-window layers
hold at most their window and stay on the device. The cache itself plans again from the tensors that really arrive.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedConfig
from transformers.cache_utils import DynamicLayer

from kcache.errors import DoesNotFitError
from kcache.policy import Policy


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes of a cache at a given context and batch.

    Attributes
    ----------
    k_bytes, v_bytes : int
        All K, all V, wherever they are.
    resident_v_bytes, overhead_bytes : int
        V that stays on the device, and what the policy keeps beside it.
    device_bytes, host_bytes : int
        The sums per tier.
    full_kv_bytes : int
        A full KV cache on the device, for comparison.
    resident_layers, layers : int
        Layers whose V stays on the device, of all layers that have V.
    """

    k_bytes: int
    v_bytes: int
    resident_v_bytes: int
    overhead_bytes: int
    device_bytes: int
    host_bytes: int
    full_kv_bytes: int
    resident_layers: int
    layers: int


@dataclass(frozen=True)
class _Shape:
    """Rows per token: K and V bytes of one layer, full layers, and bytes of the windowed layers per context."""

    row_bytes: int
    full_layers: int
    window_rows: int


def cache_bytes(
    config: PreTrainedConfig,
    ctx: int,
    batch: int,
    policy: Policy,
    dtype_bytes: int = 2,
    *,
    budget: int | None = None,
) -> MemoryNeed:
    """Bytes of a cache of ``batch`` sequences of ``ctx`` tokens.

    ``budget`` is the device memory the cache may take; ``policy.kv_budget`` goes before it. On a host-only machine
    ``offload="auto"`` offloads every layer but the dense ones.
    """
    shape = _shape(config, ctx, dtype_bytes)
    per_layer = shape.row_bytes * ctx * batch
    windows = 2 * shape.row_bytes * shape.window_rows * batch
    tail = per_layer // policy.tail_block if policy.tail == "block" else 0
    allowed = policy.kv_budget if isinstance(policy.kv_budget, int) else budget
    least = min(shape.full_layers, max(policy.dense_layers, policy.resident_layers or 0))
    resident = least
    if policy.offload == "none" or ctx < policy.dense_below:
        resident = shape.full_layers
    elif policy.offload == "auto" and policy.resident_layers is None and allowed is not None:
        spare = allowed - windows - shape.full_layers * (per_layer + tail)
        resident = max(least, min(shape.full_layers, spare // max(1, per_layer - tail)))
    offloaded = shape.full_layers - resident
    k_bytes = shape.full_layers * per_layer + windows // 2
    resident_v = resident * per_layer + windows // 2
    overhead = offloaded * tail
    return MemoryNeed(
        k_bytes=k_bytes,
        v_bytes=k_bytes,
        resident_v_bytes=resident_v,
        overhead_bytes=overhead,
        device_bytes=k_bytes + resident_v + overhead,
        host_bytes=offloaded * per_layer,
        full_kv_bytes=2 * k_bytes,
        resident_layers=resident,
        layers=shape.full_layers,
    )


def check_fits(
    config: PreTrainedConfig,
    ctx: int,
    batch: int,
    policy: Policy,
    *,
    device: torch.device | str = "cpu",
    weights_bytes: int = 0,
    dtype_bytes: int = 2,
) -> MemoryNeed:
    """Raise unless a cache of this size fits, before anything is loaded.

    Raises
    ------
    DoesNotFitError
        Naming what is short, by how much, and what would fit.
    """
    device = torch.device(device)
    free = _device_free(device, weights_bytes)
    host_only = device.type == "cpu"
    need = cache_bytes(config, ctx, batch, policy, dtype_bytes, budget=None if host_only else free)
    allowed = policy.kv_budget if isinstance(policy.kv_budget, int) else (None if host_only else free)
    if allowed is not None and need.device_bytes > allowed:
        fits = _largest(config, batch, policy, dtype_bytes, lambda n: n.device_bytes <= allowed, ctx)
        raise DoesNotFitError(
            f"{_what(ctx, batch)} needs {_size(need.device_bytes)} of device memory for the cache and "
            f"{_size(allowed)} are allowed; {_advice(fits, batch)}"
        )
    ram = psutil.virtual_memory().available - (weights_bytes if host_only else 0)
    wanted = need.host_bytes + (need.device_bytes if host_only else 0)
    if wanted > ram:
        fits = _largest(
            config,
            batch,
            policy,
            dtype_bytes,
            lambda n: n.host_bytes + (n.device_bytes if host_only else 0) <= ram,
            ctx,
        )
        raise DoesNotFitError(
            f"{_what(ctx, batch)} needs {_size(wanted)} of host memory for the cache and {_size(max(0, ram))} are "
            f"available; {_advice(fits, batch)}"
        )
    return need


def auto_batch_size(
    config: PreTrainedConfig,
    ctx: int,
    policy: Policy,
    device: torch.device | str = "cpu",
    *,
    weights_bytes: int = 0,
    dtype_bytes: int = 2,
    limit: int = 16,
) -> int:
    """The largest batch up to ``limit`` (halving from it) whose cache fits in half of what is free; at least 1."""
    device = torch.device(device)
    free = _device_free(device, weights_bytes) // 2
    ram = psutil.virtual_memory().available // 2
    batch = limit
    while batch > 1:
        need = cache_bytes(config, ctx, batch, policy, dtype_bytes, budget=free)
        allowed = policy.kv_budget if isinstance(policy.kv_budget, int) else free
        host = need.host_bytes + (need.device_bytes if device.type == "cpu" else 0)
        if need.device_bytes <= allowed and host <= ram:
            return batch
        batch //= 2
    return 1


def weight_bytes(config: PreTrainedConfig, dtype: torch.dtype | None = None, **options: Any) -> int:
    """Bytes of the model's weights in ``dtype`` (default: the config's own), counted on the meta device.

    Tied weights count once; ``options`` go to transformers (``trust_remote_code``). A quantised checkpoint takes less; its config is not asked how much.
    """
    wanted = dtype or config.dtype or torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=wanted, **options)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _shape(config: PreTrainedConfig, ctx: int, dtype_bytes: int) -> _Shape:
    text = config.get_text_config(decoder=True)
    heads = text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    layers = DynamicCache(config=text).layers
    full = sum(1 for layer in layers if type(layer) is DynamicLayer)
    windows = [layer.get_max_length() for layer in layers if getattr(layer, "is_sliding", False)]
    return _Shape(kv_heads * head_dim * dtype_bytes, full, sum(min(ctx, window) for window in windows))


def _device_free(device: torch.device, weights_bytes: int) -> int:
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return max(0, int(free * 0.95) - weights_bytes)
    return max(0, int(psutil.virtual_memory().available) - weights_bytes)


def _largest(
    config: PreTrainedConfig,
    batch: int,
    policy: Policy,
    dtype_bytes: int,
    fits: Callable[[MemoryNeed], bool],
    ctx: int,
) -> int:
    """The longest context below ``ctx`` for which ``fits`` holds, by bisection."""
    low, high = 0, ctx
    while high - low > 1:
        middle = (low + high) // 2
        if fits(cache_bytes(config, middle, batch, policy, dtype_bytes)):
            low = middle
        else:
            high = middle
    return low


def _what(ctx: int, batch: int) -> str:
    return f"a context of {ctx:,} tokens" + (f" in a batch of {batch}" if batch > 1 else "")


def _advice(fits: int, batch: int) -> str:
    smaller = "use a smaller batch, or " if batch > 1 else ""
    return f"{smaller}about {fits:,} tokens would fit (--ctx {fits})" if fits else f"{smaller}no context would fit"


def _size(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"

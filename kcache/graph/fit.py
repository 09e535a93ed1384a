"""Which models and caches can decode by a recorded step, and which steps have to be taken without."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicSlidingWindowLayer

from kcache.attention.switching import text_config
from kcache.backends.triton.backend import TritonBackend
from kcache.cache import KCache
from kcache.layers.tiered import TieredLayer
from kcache.models.arguments import forward_parameters
from kcache.planning.sizes import hot_rows_of


def may_begin(cache: KCache) -> bool:
    """Whether a run that begins now can be looked at: its layers hold rows, and the model is attached."""
    return cache.shared.attached and all(getattr(layer, "is_initialized", True) for layer in cache.layers)


def never(model: PreTrainedModel, cache: KCache) -> str | None:
    """Why no step of this model with this cache, which holds rows, can ever be recorded, or None."""
    shared = cache.shared
    if not cache.tiered_layers:
        return "no layer of the model is tiered"
    if shared.ranks.size > 1:
        return "several processes hold the model between them"
    places = {parameter.device for parameter in model.parameters()}
    if len(places | {layer.device for layer in cache.tiered_layers}) > 1:
        return "the model does not lie on one device"
    if "position_ids" not in forward_parameters(model):
        return f"{type(model).__name__} takes no position_ids"
    if getattr(text_config(model), "attention_chunk_size", None) is not None:
        return "layers with chunked attention cannot be recorded"
    for index, layer in enumerate(cache.layers):
        if (reason := _of_layer(layer, cache)) is not None:
            return f"layer {index} {reason}"
    return None


def _of_layer(layer: Any, cache: KCache) -> str | None:
    if type(layer) is TieredLayer:
        backend = cache.shared.backend(layer.device)
        return None if isinstance(backend, TritonBackend) else f"is served by the {backend.name} backend"
    if type(layer) is DynamicSlidingWindowLayer:
        return None
    return f"is a {type(layer).__name__}, which cannot be recorded"


def not_now(cache: KCache, end: int) -> str | None:
    """Why the step that comes to ``end`` rows has to be taken without the recording, or None."""
    shared = cache.shared
    if end == 1:
        return "the cache is empty"
    if shared.force_exact or shared.look is not None or shared.probing:
        return "this step is watched or exact"
    for layer in cache.tiered_layers:
        if (reason := _of_step(layer, end)) is not None:
            return reason
    return None


def _of_step(layer: TieredLayer, end: int) -> str | None:
    keys, values, tail, *_ = layer.buffers()
    if layer.length != end - 1:
        return "a forward was interrupted"
    if end > min(keys.shape[2], values.shape[2]):
        return "the buffers have to grow"
    shared = layer.shared
    if not layer.offloaded:
        return "V leaves the device" if shared.residency.leaves(layer, end) else None
    if end < shared.policy.dense_below:
        return "the context is too short for TopN, and V is in the host tier"
    if layer.follows_threshold(keys.shape[2]):
        if not layer.follows_threshold(end):
            return "every row is picked"
        if shared.spread is None or not shared.spread.begun(layer.index):
            return "there is no threshold yet"
    if layer.hot is None and hot_rows_of(shared.policy):
        return "there are no hot rows yet"
    if tail is not None and (tail.begins_at(end) == 0 or tail.length != end - 1):
        return "the directions of V have to be fitted"
    return None

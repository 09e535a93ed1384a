"""Which layers can be tiered: asked of the model itself, by two short forwards.

A layer is tiered only if what ``update`` returns reaches the attention function untouched, with nothing beside it that
a tiered layer does not know. Multi-head latent attention expands its latents afterwards and differential attention
reshapes V; such layers, and those with a window, a recurrent state or a position bias, keep an exact stock cache. A
model whose attention never comes to the registry is refused.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel, cache_utils
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicIndexedLayer,
    DynamicLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionCacheLayerMixin,
)

from kcache.attention.function import WATCHER, not_understood, original
from kcache.attention.switching import switched, text_config
from kcache.backends import dense
from kcache.errors import UnsupportedModelError
from kcache.machine.devices import input_device
from kcache.models.arguments import forward_parameters, with_cache
from kcache.models.support import check_model

_TOKENS = (3, 1)
EXPANDED = "K and V become something else after the cache"
"""Why layers that keep latents are not tiered."""
_DUMMY: Any = getattr(cache_utils, "DummyLayer", ())  # none before transformers 5.18


@dataclass(frozen=True)
class Verdict:
    """What a probe found.

    Attributes
    ----------
    tiered : frozenset of int
        Layers whose V may leave the device.
    layers : int
        Layers in the model's cache.
    reasons : tuple of str
        Why the others keep their stock cache, with their number, the most frequent reason first.
    devices : dict
        The device on which each tiered layer's K arrives.
    heads : dict
        Query heads per KV head of each tiered layer, and the sizes of a row of K and of V.
    """

    tiered: frozenset[int] = field(default_factory=frozenset)
    layers: int = 0
    reasons: tuple[str, ...] = ()
    devices: dict[int, torch.device] = field(default_factory=dict)
    heads: dict[int, tuple[int, int, int]] = field(default_factory=dict)


class _ProbeLayer(DynamicLayer):
    """Stands where a tiered layer would: ``update`` returns the new rows alone."""

    failed = ""
    reached = 0
    group = 1

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        super().update(key_states, value_states)
        value_states = value_states.view(value_states.shape)
        value_states._kcache = self  # type: ignore[attr-defined]
        self.latest = key_states
        return key_states, value_states

    def see(self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, unknown: list[str]) -> None:
        """Look at one call of the attention function."""
        self.group = query.shape[1] // key.shape[1]
        whole = key.data_ptr() == self.latest.data_ptr() and key.shape == self.latest.shape
        if unknown:
            self.failed = f"attention with {unknown[0].replace('_', ' ')}"
        elif not whole or query.shape[1] % key.shape[1] or query.shape[-1] != key.shape[-1]:
            self.failed = "K and V become something else after the cache"
        elif mask is not None and (mask.dtype != torch.bool or mask.shape[1] != 1):
            self.failed = "a mask of its own in every head"
        self.reached += 1


class _HybridProbeLayer(_ProbeLayer, LinearAttentionAndFullAttentionLayer):  # type: ignore[misc, override]
    def __init__(self, number_of_states: int) -> None:
        LinearAttentionAndFullAttentionLayer.__init__(self, number_of_states=number_of_states)


@dataclass
class _Look:
    """What attention was called with in a forward."""

    calls: int = 0
    unknown: list[str] = field(default_factory=list)

    def __call__(
        self,
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *args: Any,
        fallback: str,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.calls += 1
        unknown = not_understood(kwargs)
        self.unknown += unknown
        layer = getattr(value, "_kcache", None)
        if not isinstance(layer, _ProbeLayer):
            return original(module, query, key, value, attention_mask, *args, fallback=fallback, **kwargs)
        if getattr(module, "is_causal", True) is False:
            raise UnsupportedModelError(
                f"{type(module).__name__} attends in both directions; kcache serves decoder-only causal models"
            )
        layer.see(query, key, attention_mask, unknown)
        assert layer.keys is not None and layer.values is not None
        scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
        mask = attention_mask if attention_mask is None else attention_mask[:, :1].to(torch.bool)
        return dense.attend(query, layer.keys, layer.values, mask, scaling).transpose(1, 2).contiguous(), None


def stock_layers(model: PreTrainedModel) -> list[Any]:
    """The layers of the cache transformers itself would make for the model.

    Raises
    ------
    UnsupportedModelError
        If the model's config does not tell them.
    """
    try:
        return list(DynamicCache(config=text_config(model)).layers)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UnsupportedModelError(
            f"{type(model).__name__} keeps a cache that its config does not describe: {error}; use it with its own"
        ) from error


def probe(model: PreTrainedModel) -> Verdict:
    """Find the layers of ``model`` that can be tiered; asked once per model, and anew when it has more layers or fewer.

    Raises
    ------
    UnsupportedModelError
        If the model has no K and V to tier, attends outside the registry, or cannot run with a cache.
    """
    known = vars(model).get("_kcache_verdict")
    if isinstance(known, Verdict) and known.layers == len(stock_layers(model)):
        return known
    check_model(model)
    layers = stock_layers(model)
    if not any(isinstance(layer, CacheLayerMixin) for layer in layers):
        raise UnsupportedModelError(f"{type(model).__name__} keeps no K and V per layer, so there is nothing to tier")
    probes, look = [_stand_in(layer) for layer in layers], _Look()
    try:
        with switched(model), _watching(look):
            _run(model, Cache(layers=probes))
    except UnsupportedModelError:
        raise
    except Exception as error:
        probes = stock_layers(model)
        _check_runs(model, Cache(layers=probes), error)
        look.unknown.insert(0, "the rows of earlier tokens")
    if len(probes) != len(layers):
        raise UnsupportedModelError(
            f"{type(model).__name__} adds layers to its cache as it runs ({len(layers)} become {len(probes)}), which "
            "its config does not describe; use it with its own cache"
        )
    _check_look(model, look, probes)
    clear = [i for i, layer in enumerate(probes) if _is_clear(layer)] if not look.unknown else []
    devices = {i: probes[i].latest.device for i in clear}
    heads = {i: (probes[i].group, probes[i].latest.shape[3], probes[i].values.shape[3]) for i in clear}
    verdict = Verdict(frozenset(clear), len(layers), _reasons(probes, look), devices, heads)
    vars(model)["_kcache_verdict"] = verdict
    return verdict


def _stand_in(layer: Any) -> Any:
    if type(layer) is DynamicLayer:
        return _ProbeLayer()
    if type(layer) is LinearAttentionAndFullAttentionLayer:
        return _HybridProbeLayer(layer.number_of_states)
    return layer


def _is_clear(layer: Any) -> bool:
    return isinstance(layer, _ProbeLayer) and layer.reached > 0 and not layer.failed


def _check_look(model: PreTrainedModel, look: _Look, layers: list[Any]) -> None:
    """Raise for a model that did not use its cache, or that fills it and attends without the registry."""
    filled = sum(1 for layer in layers if isinstance(layer, CacheLayerMixin) and layer.get_seq_length())
    if not filled:
        raise UnsupportedModelError(
            f"{type(model).__name__} ran without its KV cache, so it is no causal decoder and there is nothing to tier"
        )
    if look.calls < (1 if look.unknown else filled * len(_TOKENS)):
        raise UnsupportedModelError(
            f"{type(model).__name__} attends in code of its own, outside transformers' attention registry, so kcache "
            "cannot serve it; use it with its own cache"
        )


@contextmanager
def _watching(look: _Look) -> Iterator[None]:
    token = WATCHER.set(look)
    try:
        yield
    finally:
        WATCHER.reset(token)


def _run(model: PreTrainedModel, cache: Cache) -> None:
    """Run a prompt and a step, with positions if the model takes them: some count on from their last run."""
    tokens = torch.zeros(1, sum(_TOKENS), dtype=torch.long, device=input_device(model))
    given = {"input_ids": tokens}
    if "position_ids" in forward_parameters(model):
        given["position_ids"] = torch.arange(sum(_TOKENS), device=tokens.device)[None]
    with torch.no_grad():
        for pieces in zip(*(tensor.split(_TOKENS, dim=1) for tensor in given.values()), strict=True):
            model(**dict(zip(given, pieces, strict=True)), **with_cache(model, cache))


def _check_runs(model: PreTrainedModel, cache: Cache, error: Exception) -> None:
    """Raise for a model that does not run with stock's layers either; ``error`` is how it failed with the probes."""
    try:
        _run(model, cache)
    except Exception:
        text = " ".join(str(error).split())
        if isinstance(error, IndexError):
            text = f"it fills more layers than its config describes ({text})"
        raise UnsupportedModelError(
            f"{type(model).__name__} does not run with a KV cache of its own layers: {text[:200]}"
        ) from error


def _reasons(probes: list[Any], look: _Look) -> tuple[str, ...]:
    """Why layers are not tiered, the most frequent reason first."""
    counts = Counter(_reason(layer, look) for layer in probes)
    counts.pop("", None)
    return tuple(f"{reason} ({count})" for reason, count in counts.most_common())


def _reason(layer: Any, look: _Look) -> str:
    if isinstance(layer, _ProbeLayer) or type(layer) is DynamicLayer:
        if look.unknown:
            return f"attention needs {look.unknown[0].replace('_', ' ')}"
        if _is_clear(layer):
            return ""
        return getattr(layer, "failed", "") or EXPANDED
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return "recurrent state and window" if isinstance(layer, DynamicLayer) else "recurrent state"
    if isinstance(layer, _DUMMY):
        return "no K and V of its own"
    if isinstance(layer, DynamicIndexedLayer):
        return "an indexer picks the rows"
    return "window" if getattr(layer, "is_sliding", False) else "a cache of the model's own"

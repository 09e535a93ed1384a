"""Which layers can be tiered: asked of the model itself, by one forward over two tokens.

A layer is tiered only if what ``update`` returns reaches the attention function untouched. Multi-head latent attention
expands its latents afterwards and differential attention reshapes V; such layers, and those with a window or a
position bias of their own, keep an exact stock cache.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from kcache import dense
from kcache.attention import attach
from kcache.devices import input_device
from kcache.errors import UnsupportedModelError
from kcache.layer import AttentionCall


@dataclass
class _Seen:
    layer: _ProbeLayer
    key: torch.Tensor

    def attend(self, module: torch.nn.Module, call: AttentionCall) -> torch.Tensor:
        if getattr(module, "is_causal", True) is False:
            raise UnsupportedModelError(
                f"{type(module).__name__} attends in both directions; kcache serves decoder-only causal models"
            )
        same = call.key.data_ptr() == self.key.data_ptr() and call.key.shape == self.key.shape
        heads = call.query.shape[1] % call.key.shape[1] == 0
        self.layer.reached = same and heads and call.query.shape[-1] == call.key.shape[-1]
        return dense.attend(call.query, call.key, call.value, call.mask, call.scaling, call.softcap, call.sinks)


class _ProbeLayer(DynamicLayer):
    reached = False
    seen_on: torch.device | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        super().update(key_states, value_states)
        self.seen_on = key_states.device
        value_states = value_states.view(value_states.shape)
        value_states._kcache = _Seen(self, key_states)  # type: ignore[attr-defined]
        return key_states, value_states


@dataclass(frozen=True)
class Verdict:
    """What a probe found.

    Attributes
    ----------
    tiered : frozenset of int
        Layers whose V may leave the device.
    layers : int
        Layers in the model's cache.
    devices : dict
        The device on which each tiered layer's K arrives.
    """

    tiered: frozenset[int] = field(default_factory=frozenset)
    layers: int = 0
    devices: dict[int, torch.device] = field(default_factory=dict)


def stock_layers(model: PreTrainedModel) -> list[Any]:
    """The layers of the cache transformers itself would make for the model."""
    return list(DynamicCache(config=model.config.get_text_config(decoder=True)).layers)


def probe(model: PreTrainedModel) -> Verdict:
    """Find the layers of ``model`` that can be tiered; asked once per model.

    Raises
    ------
    UnsupportedModelError
        If the model has no K and V to tier, or cannot run with a cache.
    """
    known = vars(model).get("_kcache_verdict")
    if isinstance(known, Verdict):
        return known
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder model; kcache serves decoder-only causal models"
        )
    layers = stock_layers(model)
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} keeps no K and V per layer, so there is nothing to tier")
    probes = [_ProbeLayer() if type(layer) is DynamicLayer else layer for layer in layers]
    tokens = torch.zeros(1, 2, dtype=torch.long, device=input_device(model))
    with torch.no_grad(), attach(model):
        try:
            model(input_ids=tokens, past_key_values=Cache(layers=probes), use_cache=True)
        except UnsupportedModelError:
            raise
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} does not run with a KV cache of its own layers: {error}"
            ) from error
    if not any(layer.get_seq_length() for layer in probes if isinstance(layer, CacheLayerMixin)):
        raise UnsupportedModelError(
            f"{type(model).__name__} ran without its KV cache, so it is no causal decoder and there is nothing to tier"
        )
    tiered = frozenset(i for i, layer in enumerate(probes) if getattr(layer, "reached", False))
    devices = {i: where for i in tiered if (where := getattr(probes[i], "seen_on", None)) is not None}
    verdict = Verdict(tiered, len(probes), devices)
    vars(model)["_kcache_verdict"] = verdict
    return verdict

"""Whether a model goes on with a prompt where it left off, several tokens at a time.

Attention layers do, and most recurrent ones. Some in transformers (Jamba's, Zamba's) look at their state only when a
single token comes, and begin anew with several: a prompt in pieces would be answered by its last piece. Among models of
which no layer can be tiered, several with an indexer, a mask or windows of their own answer the second piece otherwise.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionCacheLayerMixin

from kcache.attention.probe import EXPANDED, probe, stock_layers
from kcache.machine.devices import input_device
from kcache.models.arguments import with_cache

_KEY = "_kcache_takes_pieces"
_PIECE = 8
"""Tokens of a piece in the trial: more than a convolution looks back."""
_STATES = ("conv_states", "recurrent_states")


def takes_pieces(model: PreTrainedModel) -> bool:
    """Whether several tokens that follow a past are answered with all of it, as a prompt is; tried once per model.

    What is tried is whether each kind of recurrent state reaches the logits of a second piece: NaN in its place must.
    Models of stock layers alone are not believed, but for those that keep latents: where a window or an indexer is of
    another opinion shows past its size, which a trial does not reach.
    """
    known = vars(model).get(_KEY)
    if not isinstance(known, bool):
        verdict = probe(model)
        believed = bool(verdict.tiered) or all(reason.startswith(EXPANDED) for reason in verdict.reasons)
        recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in stock_layers(model))
        known = believed and (not recurrent or all(_reads(model, kind) for kind in _STATES))
        vars(model)[_KEY] = known
    return known


@torch.no_grad()
def _reads(model: PreTrainedModel, kind: str) -> bool:
    """Whether a second piece reads the states of a kind that a first one left, if there are any."""
    cache = Cache(layers=stock_layers(model))
    ids = torch.arange(1, 1 + _PIECE, device=input_device(model))[None]
    model(input_ids=ids, **with_cache(model, cache))
    states = [state for layer in cache.layers for state in _states_of(layer, kind)]
    for state in states:
        state.fill_(float("nan"))
    logits: torch.Tensor = model(input_ids=ids, **with_cache(model, cache)).logits
    return not states or bool(logits.isnan().any())


def keeps_states(cache: Cache) -> bool:
    """Whether all layers of a cache that holds tokens hold theirs there (recurrent ones of RecurrentGemma do not).

    Only then can sequences leave the batch: nobody knows how to take one out of a state in the model.
    """
    return all(map(_holds, cache.layers))


def _holds(layer: Any) -> bool:
    """Whether a layer has been given anything; a stand-in for another layer, which never is, counts as if it had."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        return any(_states_of(layer, kind) for kind in _STATES)
    return bool(getattr(layer, "is_initialized", True))


def _states_of(layer: Any, kind: str) -> list[torch.Tensor]:
    held = getattr(layer, kind, None) or {}
    return [state for state in held.values() if isinstance(state, torch.Tensor)]

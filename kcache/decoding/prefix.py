"""What all prompts of a batch begin with is read once, and copied to the place of each in the cache.

Few-shot examples, a system message, a document and many questions about it: such prompts differ at their ends alone.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer

from kcache.cache import KCache
from kcache.decoding.forward import Read, prefill
from kcache.decoding.pieces import takes_pieces
from kcache.decoding.prompts import LEAST_SHARED, alike
from kcache.layers.tiered import TieredLayer
from kcache.models.arguments import forward_parameters
from kcache.watch.capture import watchers_of


def shared_length(model: PreTrainedModel, cache: KCache, batch: list[list[int]]) -> int:
    """Tokens of an empty cache's prompts that are to be read once, by :func:`read_once`; 0 where none are.

    Each prompt keeps a token of its own, for the logits. Where those ends differ in length there is padding between
    them and what is shared, for which windows and recurrent states have no mask, and which models that count positions
    by themselves would count. Models of stock layers alone read their prompts as ever: some of them, with indexers or
    masks of their own, answer a prompt in pieces otherwise.
    """
    if len(batch) == 1 or cache.get_seq_length() or not cache.tiered_layers:
        return 0
    # By their tokens: what the first and the last begin with, all between them do.
    shared = min(alike(min(batch), max(batch)), min(map(len, batch)) - 1)
    if shared < LEAST_SHARED or not takes_pieces(model):
        return 0
    even = len({len(ids) for ids in batch}) == 1
    return shared if even or _may_have_holes(model, cache) else 0


def _may_have_holes(model: PreTrainedModel, cache: KCache) -> bool:
    """Whether padding in the middle of a sequence is as if it were not there."""
    every = all(type(layer) in (TieredLayer, DynamicLayer) for layer in cache.layers)
    return every and "position_ids" in forward_parameters(model)


def read_once(
    model: PreTrainedModel, cache: KCache, ids: torch.Tensor, sequences: int, read: Read | None = None
) -> Iterator[None]:
    """Read ``ids`` ``[1, T]`` into an empty cache of an attached model, for so many ``sequences``.

    Yields after each piece.
    """
    with cache.expecting(sequences=sequences):
        for _ in prefill(model, cache, ids, None, read):
            yield
    places = [0] * sequences
    cache.reorder_cache(torch.tensor(places))
    for watcher in watchers_of(model):
        watcher.keep(cache, places)

"""One forward of a model with a cache: a prompt in chunks, or a step, for its last position's logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kcache.arguments import forward_parameters, with_cache
from kcache.cache import KCache

Read = Callable[[int, int], None]
"""Told how many positions of a prompt have been taken in, layers under way counting in part, and of how many."""


def prefill(
    model: PreTrainedModel, cache: KCache, ids: torch.Tensor, mask: torch.Tensor | None, read: Read | None = None
) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Run the prompt through the model in even chunks; yields the last logits and the ids taken in (first row)."""
    past, taken = cache.get_seq_length(), iter(ids[0].tolist())  # asked for now: later the host would wait for chunks
    pieces = -(-ids.shape[1] // cache.policy.prefill_chunk)
    done, layers = 0, len(cache.layers)
    with cache.exact(), cache.expecting(past + ids.shape[1]):
        for piece in ids.tensor_split(pieces, dim=1):
            count = piece.shape[1]
            reached = None if read is None else partial(_reached, read, done, count, layers, ids.shape[1])
            past, done = past + count, done + count
            with cache.shared.telling(reached):
                logits = step_logits(model, cache, piece, None if mask is None else mask[:, :past])
            yield logits, list(islice(taken, count))


def _reached(read: Read, done: int, count: int, layers: int, total: int, layer: int) -> None:
    read(done + count * (layer + 1) // layers, total)


@torch.no_grad()
def step_logits(
    model: PreTrainedModel, cache: Cache, ids: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """One forward over ``ids`` ``[B, T]``; returns the last position's logits ``[B, vocabulary]``."""
    accepted = forward_parameters(model)
    extra: dict[str, object] = {}
    if mask is not None:
        extra["attention_mask"] = mask
        if "position_ids" in accepted:
            extra["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = 1
    output = model(input_ids=ids, **with_cache(model, cache), **extra)
    logits: torch.Tensor = output.logits[:, -1]
    return logits

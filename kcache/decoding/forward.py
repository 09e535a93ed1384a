"""One forward of a model with a cache: a prompt in chunks, or a step, for its last position's logits."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import islice

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kcache.cache import KCache
from kcache.decoding.pieces import takes_pieces
from kcache.models.arguments import forward_parameters, with_cache

Read = Callable[[int, int], None]
"""Told how many positions of a prompt have been taken in, layers under way counting in part, and of how many."""


def prefill(
    model: PreTrainedModel, cache: KCache, ids: torch.Tensor, mask: torch.Tensor | None, read: Read | None = None
) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Run the prompt through the model in even chunks; yields the last logits and the ids taken in (first row).

    Models that cannot go on with several tokens (:mod:`kcache.decoding.pieces`) take a first prompt whole, and later
    ones token by token.
    """
    past, taken = cache.get_seq_length(), iter(ids[0].tolist())  # asked for now: later the host would wait for chunks
    longest = cache.policy.piece(ids.shape[0])
    if (past or ids.shape[1] > longest) and not takes_pieces(model):
        longest = 1 if past else ids.shape[1]
    pieces = -(-ids.shape[1] // longest)
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
    extra: dict[str, object] = {} if mask is None else {"attention_mask": mask}
    if "position_ids" in accepted:  # as generate of transformers does: what models make of their own may differ
        extra["position_ids"] = _positions(cache, ids, mask)
    if "logits_to_keep" in accepted:
        extra["logits_to_keep"] = 1
    output = model(input_ids=ids, **with_cache(model, cache), **extra)
    logits: torch.Tensor = output.logits[:, -1]
    return logits


def _positions(cache: Cache, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Each new token's number among the real ones of its sequence, ``[B or 1, T]``."""
    count = ids.shape[1]
    if mask is not None:
        return (mask.long().cumsum(1) - 1).clamp(min=0)[:, -count:]
    return torch.arange(count, device=ids.device)[None] + cache.get_seq_length()

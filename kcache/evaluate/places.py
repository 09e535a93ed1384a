"""Places of a text to measure at: stretches of tokens that do not overlap, spread evenly over it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kcache.decoding.prompts import token_ids
from kcache.errors import ContextLengthError, InputError
from kcache.evaluate.haystack import Prose

if TYPE_CHECKING:
    from kcache.models.loaded import LoadedModel


@dataclass(frozen=True)
class Place:
    """Tokens ``[1, ctx + steps + 1]`` that begin at token ``start`` of the text.

    The first ``ctx`` are prefilled, the next ``steps`` fed one by one; the last is only what is to be predicted.
    """

    start: int
    ids: torch.Tensor


def find_places(lm: LoadedModel, prose: Prose, ctx: int, steps: int, count: int) -> list[Place]:
    """Spread ``count`` places over a text, the first at its beginning and the last at its end.

    What the tokenizer puts before every text (a begin token) begins each place and counts as one of its ``ctx``.

    Raises
    ------
    ContextLengthError
        If ``ctx`` and ``steps`` together are longer than the model's context.
    InputError
        If the text is too short.
    """
    if lm.context_length is not None and ctx + steps > lm.context_length:
        raise ContextLengthError(
            f"{ctx:,} tokens of context and {steps:,} steps are longer than the context of {lm.name}, "
            f"{lm.context_length:,} tokens; use a smaller ctx or fewer steps"
        )
    head, ids = _tokens(lm, prose.text)
    need = ctx + steps + 1 - len(head)
    if len(ids) < count * need:
        places = "1 place" if count == 1 else f"{count} places"
        raise InputError(
            f"{prose.name} has {len(ids):,} tokens, and {places} of {need:,} tokens need {count * need:,}; "
            "give a longer text, fewer places, or a smaller ctx"
        )
    last = len(ids) - need
    starts = [0] if count == 1 else [place * last // (count - 1) for place in range(count)]
    return [Place(start, torch.tensor([head + ids[start : start + need]], device=lm.device)) for start in starts]


def _tokens(lm: LoadedModel, text: str) -> tuple[list[int], list[int]]:
    """The tokenizer's begin token, if it has one, and the text's ids."""
    first = token_ids(lm, "a", special=True)[:1]
    return (first if first == [lm.tokenizer.bos_token_id] else []), token_ids(lm, text)

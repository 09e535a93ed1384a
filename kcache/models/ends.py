"""Which tokens end what a model writes."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> frozenset[int]:
    """Token ids that end a sequence, by the model's generation config and the tokenizer."""
    ends = model.generation_config.eos_token_id
    found = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    found.add(getattr(tokenizer, "eos_token_id", None))
    return frozenset(int(token) for token in found if token is not None)

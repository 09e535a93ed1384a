"""A model that is loaded, and what of one is enough to turn prompts into tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kcache.machine.devices import input_device
from kcache.models.support import context_length


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer.

    Attributes
    ----------
    name : str
        What it was asked for as.
    model : PreTrainedModel
    tokenizer : PreTrainedTokenizerBase
        Pads on the left, with its end token where it has no padding token.
    """

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @property
    def device(self) -> torch.device:
        """Where token ids go in: the device that the first layers run on."""
        return input_device(self.model)

    @property
    def vocabulary(self) -> int:
        """Token ids the model knows are those below this."""
        return len(cast(Any, self.model.get_input_embeddings()).weight)

    @property
    def context_length(self) -> int | None:
        """The most tokens the model was made for; None where its config does not say."""
        return context_length(self.model.config)


@dataclass(frozen=True)
class Reader:
    """What of a model turns prompts into tokens, without its weights.

    Attributes
    ----------
    name : str
    tokenizer : PreTrainedTokenizerBase
    context_length : int or None
    vocabulary : int
    """

    name: str
    tokenizer: PreTrainedTokenizerBase
    context_length: int | None
    vocabulary: int

"""A model's weights, counted on the meta device: all of them, and those that a decode step reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from kcache.errors import UnsupportedModelError


@dataclass(frozen=True)
class Weights:
    """Bytes of a model's weights, by how a decode step uses them.

    Attributes
    ----------
    always_bytes : int
        Read in every step.
    expert_bytes : int
        Experts of which each token uses some.
    table_bytes : int
        An input embedding that is not tied: a step reads a row of it per token.
    expert_share : float
        The part of the experts that one token uses.
    itemsize : int
        Bytes per weight.
    """

    always_bytes: int
    expert_bytes: int = 0
    table_bytes: int = 0
    expert_share: float = 1.0
    itemsize: int = 2

    @classmethod
    def of(cls, config: PreTrainedConfig, dtype: torch.dtype | None = None, **options: Any) -> Weights:
        """Count the weights of a config's model in ``dtype`` (default: the config's own); tied ones count once.

        Raises
        ------
        UnsupportedModelError
            If transformers cannot build the model.
        """
        wanted = dtype or config.dtype or torch.float32
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=wanted, **options)
        except Exception as error:  # whatever a model's constructor raises on a config that does not hold together
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UnsupportedModelError(f"transformers cannot build a model of this config: {reason}") from error
        return cls.of_model(model)

    @classmethod
    def of_model(cls, model: PreTrainedModel) -> Weights:
        """Count the weights of a model, on whatever device."""
        output = model.get_output_embeddings()
        table: Any = getattr(model.get_input_embeddings(), "weight", None)
        tied = output is not None and getattr(output, "weight", None) is table
        always = experts = apart = 0
        itemsize = 1
        for name, parameter in model.named_parameters():
            size, itemsize = parameter.numel() * parameter.element_size(), max(itemsize, parameter.element_size())
            if parameter is table and not tied:
                apart += size
            elif ".experts." in name:
                experts += size
            else:
                always += size
        return cls(always, experts, apart, _expert_share(model.config), itemsize)

    @property
    def total_bytes(self) -> int:
        """All weights."""
        return self.always_bytes + self.expert_bytes + self.table_bytes

    def read_bytes(self, batch: int) -> int:
        """What a step of ``batch`` tokens reads; tokens are taken to choose their experts independently."""
        return int(self.always_bytes + self.expert_bytes * (1 - (1 - self.expert_share) ** batch))

    @property
    def used_per_token(self) -> float:
        """Weights that one token is multiplied with."""
        return (self.always_bytes + self.expert_bytes * self.expert_share) / self.itemsize


def _expert_share(config: PreTrainedConfig) -> float:
    text: Any = config.get_text_config(decoder=True)
    active = getattr(text, "num_experts_per_tok", None)
    counts = (getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    experts = next(filter(None, counts), None)
    return min(1.0, active / experts) if active and experts else 1.0

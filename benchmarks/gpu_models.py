"""Models of real shapes with random weights, made on the device: speed does not depend on what the weights are."""

from __future__ import annotations

import gc
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from kcache.models.loaded import LoadedModel

SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 131072 + 4096,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    },
    "llama-2-7b": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
    },
}
"""Llama-2 was made for 4,096 tokens; here it is given room for the context its speed is taken at."""


def make_model(shape: str, device: torch.device) -> LoadedModel:
    """Make a model of a shape; it has no tokenizer."""
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False, eos_token_id=None, pad_token_id=None)
    with torch.device(device), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config.eos_token_id = None
    nothing: Any = None
    return LoadedModel(shape, model.eval().requires_grad_(False), nothing)


class Models:
    """Holds one model at a time."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._held: LoadedModel | None = None

    def get(self, shape: str) -> LoadedModel:
        """The model of a shape; another one that was held is given up first."""
        if self._held is None or self._held.name != shape:
            self._held = None
            gc.collect()
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self._held = make_model(shape, self.device)
        return self._held

"""Tiny random models, one factory per attention shape, so that no test downloads anything.

Weights are drawn wide, so attention is peaked and a wrong row or a wrong mask shows in the logits. No end token is
set: a run is as long as it was asked to be.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    LlamaConfig,
    MinistralConfig,
    MistralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)
from transformers.cache_utils import Cache

from kcache.models.arguments import usual_name

VOCAB = 97
FULL_AND_SLIDING = ["full_attention", "sliding_attention", "full_attention"]

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "initializer_range": 0.25,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "tie_word_embeddings": False,
}


def config(kind: str, **changes: Any) -> PreTrainedConfig:
    """Make the config of a tiny model; ``changes`` go over it."""
    shape = {**_SHAPE, **changes}
    if kind == "llama":
        return LlamaConfig(**shape)
    if kind == "mha":
        return LlamaConfig(**{**shape, "num_key_value_heads": 4})
    if kind == "mqa":
        return LlamaConfig(**{**shape, "num_key_value_heads": 1})
    if kind == "qwen3":
        return Qwen3Config(**{"head_dim": 16, **shape})
    if kind == "mistral":
        return MistralConfig(**{"sliding_window": None, **shape})
    if kind == "ministral":  # Mistral's attention; MistralModel itself takes one mask for all layers, so cannot mix
        return MinistralConfig(**{"head_dim": 8, "layer_types": FULL_AND_SLIDING, "sliding_window": 12, **shape})
    if kind == "gemma2":
        soft = {"attn_logit_softcapping": 5.0, "final_logit_softcapping": None, "query_pre_attn_scalar": 8}
        return Gemma2Config(**{"head_dim": 8, "layer_types": FULL_AND_SLIDING, "sliding_window": 12, **soft, **shape})
    if kind == "gemma3":
        kinds = ["sliding_attention", "full_attention", "full_attention"]
        return Gemma3TextConfig(**{"head_dim": 8, "layer_types": kinds, "sliding_window": 12, **shape})
    if kind == "gpt_oss":
        experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "head_dim": 8}
        return GptOssConfig(**{**experts, "layer_types": FULL_AND_SLIDING, "sliding_window": 12, **shape})
    if kind == "phi3":
        return Phi3Config(**shape)
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 2048}
        names = ("vocab_size", "initializer_range", "pad_token_id", "bos_token_id", "eos_token_id")
        return GPT2Config(**sizes, **{name: shape[name] for name in names})
    raise ValueError(f"no tiny model of kind {kind!r}")


KINDS = ("llama", "mha", "mqa", "qwen3", "mistral", "ministral", "gemma3", "gpt2", "phi3")


def make(
    kind: str, seed: int = 0, dtype: torch.dtype = torch.float32, attention: str = "sdpa", **changes: Any
) -> PreTrainedModel:
    """Make a tiny random model in evaluation mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config(kind, **changes), dtype=dtype, attn_implementation=attention)
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                torch.nn.init.normal_(parameter)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model.eval()


def tokens(seed: int, *shape: int, vocab: int = VOCAB) -> torch.Tensor:
    """Random token ids that are never the padding id."""
    return torch.randint(3, vocab, shape, generator=torch.Generator().manual_seed(seed))


def holding(cache: Cache) -> dict[str, Any]:
    """The argument that hands a cache to a model of transformers, or to ``generate``."""
    return {usual_name(): cache}


def left_padding(lengths: list[int], width: int | None = None) -> torch.Tensor:
    """Make an attention mask ``[B, T]`` int64 of left-padded sequences of these lengths."""
    width = width or max(lengths)
    return torch.tensor([[0] * (width - length) + [1] * length for length in lengths])

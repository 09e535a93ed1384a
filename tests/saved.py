"""Tiny models as files: a Hugging Face folder and a GGUF file, both of random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import LlamaConfig, PretrainedConfig, PreTrainedTokenizerFast

from tests import tiny_models

CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MERGED = ["ab", "th"]
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def byte_vocabulary() -> list[str]:
    """The special tokens, then one token for each byte."""
    return SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet())


def byte_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte."""
    core = Tokenizer(BPE(vocab={token: index for index, token in enumerate(byte_vocabulary())}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", pad_token="<|pad|>", chat_template=chat_template
    )


def save_tiny(
    folder: Path,
    kind: str = "llama",
    *,
    tokenizer: bool = True,
    chat_template: str | None = CHAT_TEMPLATE,
    **changes: Any,
) -> Path:
    """Save a tiny random model, and a byte tokenizer unless told not to, and return ``folder``."""
    tiny_models.make(kind, **{"vocab_size": len(byte_vocabulary()), **changes}).save_pretrained(folder)
    if tokenizer:
        byte_tokenizer(chat_template).save_pretrained(folder)
    return folder


def gguf_config() -> PretrainedConfig:
    """The config of what :func:`write_gguf` writes."""
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=len(byte_vocabulary() + MERGED),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=256,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
        dtype="bfloat16",
    )


def write_gguf(path: Path) -> Path:
    """Write a tiny random Llama as a GGUF file with 4-bit weights and a byte vocabulary."""
    from gguf import GGMLQuantizationType, GGUFWriter, TokenType, quantize

    config = gguf_config()
    writer = GGUFWriter(str(path), "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(byte_vocabulary() + MERGED)
    kinds = [TokenType.CONTROL] * len(SPECIAL)
    writer.add_token_types(kinds + [TokenType.NORMAL] * (config.vocab_size - len(SPECIAL)))
    writer.add_token_merges([" ".join(token) for token in MERGED])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(0)
    writer.add_chat_template(CHAT_TEMPLATE)
    random = np.random.default_rng(0)
    for name, shape in _shapes(config).items():
        weights = random.normal(0, 0.1, shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, weights)
        else:
            kind = GGMLQuantizationType.Q4_1
            writer.add_tensor(name, quantize(weights, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _shapes(config: PretrainedConfig) -> dict[str, tuple[int, ...]]:
    width, inner = config.hidden_size, config.intermediate_size
    kv = config.num_key_value_heads * config.head_dim
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (config.vocab_size, width),
        "output_norm.weight": (width,),
    }
    for layer in range(config.num_hidden_layers):
        block = {
            "attn_norm": (width,),
            "attn_q": (width, width),
            "attn_k": (kv, width),
            "attn_v": (kv, width),
            "attn_output": (width, width),
            "ffn_norm": (width,),
            "ffn_gate": (inner, width),
            "ffn_up": (inner, width),
            "ffn_down": (width, inner),
        }
        shapes |= {f"blk.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes

"""A tiny config of the same architecture: fewer layers, narrow ones, few experts, the same kinds of layer.

Sizes are recognised by the name of their field, so that a config is shrunk that nobody has looked at. What a config
says per layer (kinds of attention, dense or sparse MLP) is thinned out such that every kind stays. The few
architectures whose fields mean something else have a line in :mod:`kcache.verify.unusual`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from transformers import PreTrainedConfig

from kcache.verify.unusual import UNUSUAL

VOCABULARY = 128
LAYERS = 4
WIDTH = 64
WINDOW = 12
CONTEXT = 512
_SPREAD = 0.15  # of random weights: attention is peaked, so that a wrong row shows in the logits

_CAPS: tuple[tuple[str, int], ...] = (
    (r"\w*vocab\w*", VOCABULARY),
    (r"(pad|padding)_(token_)?(id|idx|index)", 0),
    (r"(bos|cls)_(token_)?(id|index)", 1),
    (r"(eos|sep)_(token_)?(id|index)|decoder_start_token_id|forced_\w+_token_id", 2),
    (r"\w+_token_(id|index|idx)", VOCABULARY - 1),
    (r"first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_kv_shared_layers|max_window_layers", 1),
    (r"(num_)?\w*hidden_layers|n_layers?|num_layers|\w+_layers", LAYERS),
    (r"\w*(period|interval|step|pattern)", 2),
    (r"\w*offset", 1),
    (r"(num|n)_groups?|topk_groups?|\w*n_groups|num_expert_groups?", 1),
    (r"\w*(experts?_per_tok\w*|top_?k|moe_k|topk_experts|num_selected_experts)", 2),
    (r"\w*shared_experts?", 1),
    (r"\w*(experts|expert_num)", 4),
    (r"(mamba_)?expand", 1),
    (r"qk_(rope|nope)_head_dim|rotary_dim", 8),
    (r"index_block_size|index_compress\w*|compress_rates?", 4),
    (r"index_topk_blocks|index_local_blocks", 2),
    (r"index_topk|index_head_dim", 16),
    (r"index_n_heads", 2),
    (r"\w*(sliding_window|chunk_size|local_attention|window_size)", WINDOW),
    (r"attention_head_dim", WIDTH // 2),
    (r"attention_hidden_size", 2 * WIDTH),
    (r"mamba_headdim", 8),
    (r"\w*(head_dim|d_head|kv_channels|attention_head_size|head_size)", WIDTH // 4),
    (r"\w*(lora_rank|d_state|state_size|latent_size)", 16),
    (r"\w*(key_value_heads|kv_heads)\w*|multi_query_group_num|linear_num_key_heads", 2),
    (r"\w*(attention_heads|n_heads?|num_heads|value_heads|num_attn_heads)", 4),
    (
        r"\w*(intermediate_size|ffn_dim|ffn_hidden_size|dim_ff|feed_forward_size|n_inner|inner_dim|dff|d_ff|d_inner|mlp_dim)",
        96,
    ),
    (r"\w*(hidden_size|d_model|n_embd|embd_dim|emb_dim|embed_dim|width|embedding_size|embedding_dim|d_ssm)", WIDTH),
    (r"hidden_size_per_layer_input|laurel_rank|altup\w*", 16),
    (r"max_(position_embeddings|seq_len\w*|\w*positions)|n_positions|n_ctx|max_sequence_length", CONTEXT),
    (r"image_size", 32),
)
_RULES = tuple((re.compile(pattern), cap) for pattern, cap in _CAPS)
_EQUALS = (
    ("num_key_value_heads", "num_attention_heads"),
    ("head_dim", "qk_rope_head_dim"),
    ("num_kv_shared_layers", "num_hidden_layers"),
)
_LAYER_FIELDS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers")
_DROPPED = ("transformers_version", "dtype", "id2label", "label2id", "quantization_config", "_name_or_path")
_SPREADS = ("initializer_range", "init_std", "initializer_factor", "embed_init_std", "std")


def shrink(config: PreTrainedConfig) -> PreTrainedConfig:
    """Return a tiny config of the same class, with the same kinds of layer and random weights drawn wide."""
    return type(config)(**_shrunk(config.to_dict()))


def _shrunk(data: Mapping[str, Any]) -> dict[str, Any]:
    layers = _layer_count(data)
    kept = _kept_layers(data, layers)
    small: dict[str, Any] = {}
    for name, value in data.items():
        if name in _DROPPED:
            continue
        if name == "per_layer_config":
            per_layer = {int(index): changes for index, changes in value.items()}
            small[name] = {
                new: _equalised(per_layer[old], {field: _capped(field, v) for field, v in per_layer[old].items()})
                for new, old in enumerate(kept)
                if old in per_layer
            }
        elif isinstance(value, Mapping) and "model_type" in value:
            small[name] = _shrunk(value)
        elif name in _SPREADS and isinstance(value, float):
            small[name] = _SPREAD
        elif isinstance(value, (list, tuple)) and len(value) == layers:
            small[name] = [_capped(name, value[index]) for index in kept]
        else:
            small[name] = _capped(name, value)
    return _equalised(data, small) | UNUSUAL.get(data.get("model_type", ""), {})


def _equalised(data: Mapping[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    """What was as large as something else stays so: KV heads and query heads, a head and its rotary part, ..."""
    for name, other in _EQUALS:
        if data.get(name) is not None and data[name] == data.get(other):
            small[name] = small[other]
    return small


def _layer_count(data: Mapping[str, Any]) -> int:
    for name in _LAYER_FIELDS:
        if isinstance(data.get(name), int):
            return int(data[name])
    return 0


def _kept_layers(data: Mapping[str, Any], layers: int) -> list[int]:
    """The layers that stay: the first of each kind, then the next ones, those with full attention before others."""
    lists = [value for value in data.values() if isinstance(value, (list, tuple)) and len(value) == layers]
    own = data.get("per_layer_config") or {}
    kinds = [str([each[index] for each in lists]) + str(own.get(index)) for index in range(layers)]
    firsts = [kinds.index(kind) for kind in dict.fromkeys(kinds)][:LAYERS]
    others = [index for index in range(layers) if index not in firsts]
    others.sort(key=lambda index: not re.search("full_attention|hybrid", kinds[index]))
    return sorted((firsts + others)[:LAYERS])


def _capped(name: str, value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, int):
        return value
    for pattern, cap in _RULES:
        if pattern.fullmatch(name):
            return min(value, cap)
    return value

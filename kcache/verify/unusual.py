"""What the general rules for tiny configs cannot know, by model type: fields that go over the shrunk ones.

The names here only make test models; the library itself knows no model by name.
"""

from __future__ import annotations

from typing import Any

_MIXED = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]

UNUSUAL: dict[str, dict[str, Any]] = {
    "dots1": {"head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "cohere_compass_text": {
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
            for kind in ("full_attention", "sliding_attention")
        },
        "layer_types": _MIXED,
    },
    "falcon_h1": {"mamba_d_head": 16},
    "ministral": {"head_dim": 16, "layer_types": _MIXED},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "nemotron": {"head_dim": 16, "num_key_value_heads": 2},
    "mistral": {"sliding_window": None},
    "dots3_note_vision": {"adapter_in_dim": 64},
    "bamba": {"attn_layer_indices": [1, 3]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "doge": {"keep_window_size": 16},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "qwen4_exp_text": {
        "hc_lowrank": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 16,
        "indexer_compress_ratio": 4,
    },
    "gemma4_assistant": {},
}
"""Fields of the shrunk config, by the model type of the config (or sub-config) they belong to."""

DEFAULTS: dict[str, dict[str, Any]] = {
    "gemma4_assistant": {"text_config": {"num_kv_shared_layers": 4, "num_hidden_layers": 4, "hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0}},
}
"""Arguments without which the config class itself refuses to be made."""

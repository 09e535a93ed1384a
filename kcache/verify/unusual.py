"""What the general rules for tiny configs cannot know, by model type. The library itself knows no model by name."""

from __future__ import annotations

from typing import Any

_MIXED = ["sliding_attention", "full_attention"] * 2

UNUSUAL: dict[str, dict[str, Any]] = {
    "dory": {
        "layer_types": _MIXED,
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_recurrent_layers": 2,
        "n_output_layers": 1,
    },
    "falcon_h1": {"mamba_d_head": 16},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"] * 2, "hybrid_layer_ids": [1, 3]},
    "hrm_text": {"num_layers_per_stack": 2, "num_hidden_layers": 16},
    "doge": {"keep_window_size": 16},
    "qwen4_exp_text": {"hc_lowrank": 16},
    "dots3_note_vision_encoder": {"adapter_in_dim": 64, "adapter_out_dim": 64},
    "dots3_note_audio_encoder": {"adapter_input_size": 64, "adapter_out_dim": 64},
}
"""Fields of a shrunk config, by the type of the config (or sub-config): sizes that have to agree with others."""

_HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
_INDEXER: dict[str, Any] = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 256,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
_FOUR: dict[str, Any] = {"num_hidden_layers": 4}

DEFAULTS: dict[str, dict[str, Any]] = {
    "bamba": {**_FOUR, "attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        **_FOUR,
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 3, 3]}
            for kind in ("full_attention", "sliding_attention")
        },
        "layer_types": _MIXED,
    },
    "dbrx": {"attn_config": {"rope_theta": 10_000.0, "kv_n_heads": 2, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {
        "head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
        "n_group": 1,
        "topk_group": 1,
    },
    "gemma4_assistant": {
        "text_config": {**_FOUR, "num_kv_shared_layers": 4}
        | {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    },
    "granitemoehybrid": {**_FOUR, "layer_types": ["linear_attention", "full_attention"] * 2},
    "hunyuan_v1_dense": _HEADS,
    "hunyuan_v1_moe": _HEADS,
    "lfm2_moe": {**_FOUR, "layer_types": ["conv", "full_attention"] * 2},
    "minimax_m3_vl_text": {**_FOUR, "layer_types": ["full_attention", "minimax_m3_sparse"] * 2},
    "ministral": {**_HEADS, **_FOUR, "layer_types": _MIXED},
    "mistral": {"sliding_window": None},
    "nemotron": _HEADS,
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
}
"""What a config of the type is made with: what its class leaves out, choices where the default shows little."""

"""Plans against arithmetic by hand for three published models, and what fits against what is said to fit."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import DeepseekV3Config, LlamaConfig, MambaConfig, MixtralConfig, PreTrainedConfig

import kcache
from kcache.errors import InputError, UnsupportedModelError
from kcache.memory import weight_bytes
from kcache.models.weights import Weights
from kcache.planning.fitting import Fitter, Pools
from kcache.planning.need import ModelShape, cache_bytes
from kcache.planning.plan import METHODS, Planner, predict
from kcache.planning.sizes import LEAST_RESERVE
from kcache.policy import Policy
from kcache.speed.cards import CARDS, find_card
from tests.tiny_models import config as tiny
from tests.tiny_models import make

GIB = 2**30

LLAMA_3_8B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "max_position_embeddings": 131072, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
LLAMA_2_7B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32000, "hidden_size": 4096,
    "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 32,
    "max_position_embeddings": 4096, "tie_word_embeddings": False, "torch_dtype": "float16",
}  # fmt: skip
QWEN_3_32B = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 5120,
    "intermediate_size": 25600, "num_hidden_layers": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
    "head_dim": 128, "max_position_embeddings": 40960, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip


@dataclass(frozen=True)
class Round:
    """Speeds that are easy to reckon with."""

    memory_gb_s: float = 1000.0
    gather_gb_s: float = 10.0
    product_gb_s: float = 1000.0
    host_only: bool = False
    layer_ms: float = 0.0
    compute_tflops: float = 1e6


def config_of(values: dict[str, object], folder: Path) -> PreTrainedConfig:
    path = folder / "config.json"
    path.write_text(json.dumps(values))
    return kcache.load_config(path)


def planner(config: PreTrainedConfig, device: int | None, host: int, policy: Policy | None = None) -> Planner:
    return Planner(
        ModelShape.of(config, 2), Weights.of(config), policy or Policy(), Pools(device, host), find_card("h100")
    )


# -- by hand -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "parameters", "k_per_token"),
    [
        # per layer: q, k, v, o, three MLP matrices, two norms; two embeddings and a last norm beside them
        (LLAMA_3_8B, 32 * (4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336) + 2 * 128256 * 4096, 32 * 8 * 128),
        (LLAMA_2_7B, 32 * (4096 * 4 * 4096 + 3 * 4096 * 11008) + 2 * 32000 * 4096, 32 * 32 * 128),
        (QWEN_3_32B, 64 * (5120 * 2 * 8192 + 5120 * 2 * 1024 + 3 * 5120 * 25600) + 2 * 151936 * 5120, 64 * 8 * 128),
    ],
    ids=["llama-3.1-8b", "llama-2-7b", "qwen3-32b"],
)
@pytest.mark.parametrize(("ctx", "batch"), [(4096, 1), (131072, 1), (32768, 8)])
def test_weights_k_and_v_by_hand(
    values: dict[str, object], parameters: int, k_per_token: int, ctx: int, batch: int, tmp_path: Path
) -> None:
    config = config_of(values, tmp_path)
    assert weight_bytes(config) == pytest.approx(2 * parameters, rel=0.0005)
    one = 2 * k_per_token * ctx * batch
    full = cache_bytes(config, ctx, batch, Policy(offload="none"))
    assert (full.k_bytes, full.v_bytes, full.device_bytes, full.host_bytes) == (one, one, 2 * one, 0)
    layers = values["num_hidden_layers"]
    assert isinstance(layers, int)
    ours = cache_bytes(config, ctx, batch, Policy(offload="all"))
    away = one * (layers - 2) // layers
    assert (ours.k_bytes, ours.v_bytes, ours.resident_layers) == (one, one, 2)
    heads = k_per_token // (layers * 128)
    tail = away // 16 + (layers - 2) * batch * heads * (8 + 1) * 128 * 4  # coefficients; eight directions and a base
    assert (ours.host_bytes, ours.overhead_bytes) == (away, tail)
    assert ours.device_bytes == 2 * one - away + tail


def test_llama_3_weights_are_those_published(tmp_path: Path) -> None:
    weights = Weights.of(config_of(LLAMA_3_8B, tmp_path))
    assert weights.total_bytes == 2 * 8_030_261_248
    assert weights.table_bytes == 2 * 128256 * 4096
    assert weights.read_bytes(1) == weights.read_bytes(64) == weights.total_bytes - weights.table_bytes


def test_weights_can_be_slower_than_memory(tmp_path: Path) -> None:
    config = config_of(LLAMA_3_8B, tmp_path)
    fast, slow = (predict(config, 4096, 1, Policy(), Round(product_gb_s=speed))["full"] for speed in (1000.0, 100.0))
    assert slow.step_ms - fast.step_ms == pytest.approx(15_009_849_344 * (1 / 100 - 1 / 1000) / 1e6)
    assert slow.floor_ms == fast.floor_ms


def test_step_by_hand(tmp_path: Path) -> None:
    """Weights + K + resident V + tail + scores over the memory's bandwidth, picked rows over the link's."""
    config = config_of(LLAMA_3_8B, tmp_path)
    found = predict(config, 32768, 4, Policy(topn=128, offload="all", k_bits=16), Round())
    weights, k = 15_009_849_344, 4 * 32768 * 65536
    resident, away = k * 2 // 32, k * 30 // 32
    scores = 2 * 4 * 4 * 32 * 32768 * 30
    link = 4 * 30 * 8 * 128 * 256
    ours, full = found["kcache"], found["full"]
    tail = away // 16 + 30 * 4 * 8 * (8 + 1) * 128 * 4
    assert ours.memory_bytes == weights + k + resident + tail + scores
    assert ours.link_bytes == link
    assert ours.memory_ms == pytest.approx(ours.memory_bytes / 1e9)
    assert ours.link_ms == pytest.approx(link / 1e7)
    assert ours.step_ms == ours.floor_ms == pytest.approx(ours.memory_ms + ours.link_ms)
    assert ours.tok_s == pytest.approx(4000 / ours.step_ms)
    assert (full.memory_bytes, full.link_bytes) == (weights + 2 * k, 0)
    assert full.bound == "memory"


def test_hits_and_heads_change_the_link(tmp_path: Path) -> None:
    config, policy = config_of(LLAMA_3_8B, tmp_path), Policy(offload="all", tail="none")
    cold = predict(config, 32768, 1, policy, Round())["kcache"]
    warm = predict(config, 32768, 1, policy, Round(), hit_rate=0.75)["kcache"]
    assert warm.link_bytes == cold.link_bytes // 4
    assert warm.memory_bytes == cold.memory_bytes + cold.link_bytes * 3 // 4
    heads = predict(config, 32768, 1, policy.replace(select="head"), Round())["kcache"]
    assert heads.link_bytes == 4 * cold.link_bytes
    young = predict(config, 1024, 1, policy, Round())
    assert young["kcache"] == young["full"]


def test_where_both_tiers_are_ram_nothing_is_gained(tmp_path: Path) -> None:
    config, speeds = config_of(LLAMA_3_8B, tmp_path), replace(Round(), host_only=True, product_gb_s=100.0)
    full, ours = predict(config, 32768, 4, Policy(offload="all"), speeds).values()
    assert ours.step_ms == full.step_ms
    assert full.step_ms == pytest.approx((15_009_849_344 + 2 * 4 * 32768 * 65536) / 1e8)
    assert (ours.link_ms, ours.bound) == (0.0, "memory")
    assert ours.link_bytes > full.link_bytes == 0
    slow = predict(config, 4096, 1, Policy(), replace(speeds, layer_ms=100.0))["full"]
    assert (slow.overhead_ms, slow.bound) == (3200.0, "overhead")
    assert slow.step_ms == pytest.approx((15_009_849_344 + 2 * 4096 * 65536) / 1e8 + 3200)


def test_compute_bounds_a_large_batch(tmp_path: Path) -> None:
    config = config_of(LLAMA_3_8B, tmp_path)
    slow = replace(Round(), compute_tflops=1.0)
    found = predict(config, 1, 1000, Policy(), slow)["full"]
    assert found.bound == "compute"
    assert found.step_ms == pytest.approx(2 * 1000 * (8_030_261_248 - 128256 * 4096) / 1e9, rel=0.01)
    assert found.floor_ms < found.step_ms


def test_a_padded_batch_s_mask_is_worked_with(tmp_path: Path) -> None:
    """One byte for each query and row; torch's kernels, which fp32 is left to, take it as numbers."""
    for dtype_bytes, each in ((2, 1), (4, 5)):
        shape, policy = ModelShape.of(config_of(LLAMA_3_8B, tmp_path), dtype_bytes), Policy(prefill_chunk=1024)
        one, two = (shape.activation_bytes(8192, batch, policy, False) for batch in (1, 2))
        assert two == 2 * one + 2 * 1024 * 8192 * each


# -- what fits -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("device", [24 * GIB, 80 * GIB, None])
@pytest.mark.parametrize("values", [LLAMA_3_8B, LLAMA_2_7B])
@pytest.mark.parametrize("policy", [Policy(), Policy(offload="all", kv_budget="6GiB"), Policy.paper(64, dense_below=0)])
def test_the_largest_fits_and_one_more_does_not(
    name: str, device: int | None, values: dict[str, object], policy: Policy, tmp_path: Path
) -> None:
    plan = planner(config_of(values, tmp_path), device, 64 * GIB, policy)
    for ctx, batch in ((16384, None), (16384, 2), (1000, None)):
        method = plan.method(name, ctx, batch)
        fitter = plan.fitter(name)
        assert fitter.fits(ctx, method.max_batch) or method.max_batch == 0
        assert not fitter.fits(ctx, method.max_batch + 1)
        assert fitter.fits(method.max_ctx, batch or 1)
        assert not fitter.fits(method.max_ctx + 1, batch or 1)
        assert (method.predicted is None) == (method.fit.short is not None)
        if method.fit.short is None and device is not None:
            assert method.device_bytes <= device
            assert method.host_bytes <= 64 * GIB


@pytest.mark.parametrize("gpu", ["h100", "rtx4090", "l4"])
@pytest.mark.parametrize("values", [LLAMA_3_8B, LLAMA_2_7B])
def test_never_predicted_worse_where_the_batch_is_free(gpu: str, values: dict[str, object], tmp_path: Path) -> None:
    card = find_card(gpu)
    plan = replace(planner(config_of(values, tmp_path), card.device_bytes, 256 * GIB), speeds=card)
    ctxs = [1024, 4096, 16384, 65536, 131072]
    full, ours = plan.curve("full", ctxs, None), plan.curve("kcache", ctxs, None)
    for dense, tiered in zip(full, ours, strict=True):
        assert dense is None or (tiered is not None and tiered >= dense * 0.999)
    assert any(tiered and (dense is None or tiered > 1.05 * dense) for dense, tiered in zip(full, ours, strict=True))


def test_residency_uses_what_the_card_has(tmp_path: Path) -> None:
    config = config_of(LLAMA_3_8B, tmp_path)
    counts = [planner(config, size * GIB, 512 * GIB).method("kcache", 131072, 1).need.resident_layers
              for size in (26, 28, 30, 80)]  # fmt: skip
    assert counts == sorted(counts)
    assert counts[0] < counts[1] < counts[-1] == 32


def test_budget_is_the_cache_alone_and_hbm_the_whole_card(tmp_path: Path) -> None:
    config = config_of(LLAMA_3_8B, tmp_path)
    plan = planner(config, 80 * GIB, 512 * GIB, Policy(kv_budget="10GiB"))
    method = plan.method("kcache", 131072, 1)
    assert method.need.device_bytes <= 10 * GIB < method.device_bytes
    assert plan.method("full", 131072, 1).fit.short == "device"
    left = 80 * GIB - method.weights_bytes
    room = planner(config, 80 * GIB, 512 * GIB).method("full", 8192, 1).fit.allowed_bytes
    assert room == left - max(LEAST_RESERVE, left // 20)


def test_refusals_say_what_would_fit(tmp_path: Path) -> None:
    config = config_of(LLAMA_3_8B, tmp_path)
    shape, weights = ModelShape.of(config, 2), Weights.of(config).total_bytes

    def said(policy: Policy, ctx: int, batch: int, device: int = 80, host: int = 512) -> str:
        fitter = Fitter(shape, policy, Pools(device * GIB, host * GIB), weights)
        return fitter.refusal(fitter.fit(ctx, batch), ctx, batch)

    text = said(Policy(), 131072, 16)
    assert "device memory" in text
    assert "in a batch of 5" in text
    assert "(--ctx " in text
    assert "(--offload auto)" in said(Policy(offload="none"), 131072, 5)
    assert "8 bits" not in text
    assert "it would fit with K in one piece (--k-bits 16: " in said(Policy(), 131072, 6)
    bytes_of_k = said(Policy(), 131072, 8)
    assert "it would fit with K in 8 bits (--k-bits 8: scores close to exact ones, not exact)" in bytes_of_k
    narrow = Fitter(shape, Policy(k_bits=8), Pools(80 * GIB, 512 * GIB), weights)
    assert narrow.fits(131072, 8)
    assert "8 bits" not in narrow.refusal(narrow.fit(131072, 16), 131072, 16)
    assert "host memory" in said(Policy(offload="all"), 131072, 4, host=4)
    bytes_of_v = said(Policy(offload="all"), 131072, 4, host=20)
    assert "it would fit with V in 8 bits (--v-bits 8: close to exact, not exact)" in bytes_of_v
    assert "the weights alone" in said(Policy(), 131072, 1, device=12)


def test_on_a_card_k_is_planned_in_two_planes(tmp_path: Path) -> None:
    """A step reads half of K and the scales; the memory is that of 16 bits, but for these."""
    config = config_of(LLAMA_3_8B, tmp_path)
    found, exact = (
        planner(config, 80 * GIB, 512 * GIB, Policy(offload="all", k_bits=bits)).method("kcache", 32768, 4)
        for bits in ("auto", 16)
    )
    rows, layers, left = 4 * 32768 * 8, 32, 30
    scales, centres = rows * left * 4, 4 * 8 * 128 * 4 * left
    assert found.need.k_bytes == exact.need.k_bytes + scales + centres
    assert found.need.k_bytes == rows * layers * 256 + scales + centres
    assert found.predicted is not None and exact.predicted is not None
    read = exact.predicted.memory_bytes - found.predicted.memory_bytes
    assert read == rows * left * 128 - scales - centres
    fitter = Fitter(ModelShape.of(config, 2), Policy(), Pools(80 * GIB, 512 * GIB, kernels=False))
    assert fitter.policy == Policy(k_bits=16), "torch operators read K as it is"
    assert Fitter(ModelShape.of(config, 4), Policy(), Pools(80 * GIB, 512 * GIB)).policy == Policy(k_bits=16)
    assert Fitter(ModelShape.of(config, 2), Policy(), Pools(None, 512 * GIB)).policy == Policy(k_bits=16)


# -- other shapes of model -----------------------------------------------------------------------------------------


def test_latent_attention_is_not_tiered() -> None:
    config = DeepseekV3Config(num_hidden_layers=4)
    need = cache_bytes(config, 8192, 2, Policy(offload="all", dense_below=0))
    assert (need.layers, need.host_bytes, need.overhead_bytes) == (0, 0, 0)
    assert need.k_bytes == 2 * 4 * 8192 * 2 * config.kv_lora_rank
    assert need.v_bytes == 2 * 4 * 8192 * 2 * config.qk_rope_head_dim


def test_a_step_reads_the_experts_it_uses() -> None:
    config = MixtralConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=256, dtype="bfloat16",
    )  # fmt: skip
    weights = Weights.of(config)
    experts = 2 * 2 * 8 * 3 * 64 * 128
    assert weights.expert_bytes == experts
    assert weights.read_bytes(1) == weights.always_bytes + experts // 4
    assert weights.read_bytes(1) < weights.read_bytes(4) < weights.read_bytes(10**6) == weights.always_bytes + experts


@pytest.mark.parametrize("kind", ["llama", "mqa", "qwen3", "gpt2", "phi3", "gemma3"])
def test_counted_weights_are_those_of_the_model(kind: str) -> None:
    model = make(kind)
    size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    assert Weights.of(tiny(kind), torch.float32).total_bytes == Weights.of_model(model).total_bytes == size


def test_other_types_of_number(tmp_path: Path) -> None:
    config = LlamaConfig(**{**LLAMA_3_8B, "num_hidden_layers": 2})
    half = predict(config, 4096, 1, Policy(), Round(), dtype=torch.bfloat16)["full"]
    whole = predict(config, 4096, 1, Policy(), Round(), dtype=torch.float32)["full"]
    assert whole.memory_bytes == 2 * half.memory_bytes


def test_configs_that_cannot_be_planned() -> None:
    with pytest.raises(UnsupportedModelError, match="num_attention_heads"):
        ModelShape.of(MambaConfig(), 2)
    with pytest.raises(UnsupportedModelError, match="cannot build"):
        Weights.of(LlamaConfig(num_hidden_layers=1, hidden_act="never heard of"))


# -- the table of cards --------------------------------------------------------------------------------------------


def test_cards() -> None:
    names = [card.name for card in CARDS]
    assert len(set(names)) == len(names)
    for card in CARDS:
        assert find_card(card.name) is card
        assert 0 < card.gather_gb_s < card.h2d_gb_s < card.memory_gb_s < card.datasheet_memory_gb_s


@pytest.mark.parametrize(
    ("name", "found"),
    [("H100", "h100"), ("4090", "rtx4090"), ("RTX 4090", "rtx4090"), ("A100-80GB", "a100"), ("nvidia h200", "h200"),
     ("h100-sxm", "h100"), ("A100-40GB", "a100-40gb")],
)  # fmt: skip
def test_cards_by_other_names(name: str, found: str) -> None:
    assert find_card(name).name == found


@pytest.mark.parametrize("name", ["", "tpu", "h", "rtx"])
def test_unknown_cards(name: str) -> None:
    with pytest.raises(InputError, match=r"known are b200, h200"):
        find_card(name)

"""Kernels in place of a model's own small ones while a step is recorded: only what was seen to be the same."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.cohere import modeling_cohere
from transformers.models.gemma3 import modeling_gemma3
from transformers.models.glm4 import modeling_glm4
from transformers.models.gpt_oss import modeling_gpt_oss
from transformers.models.llama import modeling_llama
from transformers.models.olmo2 import modeling_olmo2
from transformers.models.phi3 import modeling_phi3

from kcache.graph.decoder import PROOFS
from kcache.graph.fuse import Fusion, part_of
from kcache.graph.parts import Gated, Rotary
from kcache.policy import Policy
from tests.graph.recorder import RecordedTape
from tests.graph.twins import Twins
from tests.tiny_models import config, make, tokens

OFFLOADED = Policy(
    topn=6, dense_below=0, dense_layers=0, resident_layers=0, offload="all", backend="triton", spread="even",
    hot_rows=0,
)  # fmt: skip
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def proven(module: nn.Module, entering: torch.Tensor) -> list[Any]:
    """What a trial found a module to be; its result is the module's own either way."""
    part = part_of(module)
    assert part is not None
    with torch.no_grad():
        torch.testing.assert_close(part(entering), module(entering))
    return list(part.proven.values())


# Families whose parts are what they look like.


@pytest.mark.parametrize(
    ("kind", "changes", "norms"),
    [
        ("llama", SMALL, 5),
        ("qwen3", SMALL, 5 + 4),
        ("phi3", {**SMALL, "hidden_size": 32}, 5),
        ("gemma3", {**SMALL, "layer_types": ["sliding_attention", "full_attention"]}, 9 + 4),
    ],
)
def test_triton_replayed_steps_with_kernels_in_between(kind: str, changes: dict[str, Any], norms: int) -> None:
    model = make(kind, **changes)
    twins = Twins(model, OFFLOADED, RecordedTape, max_length=40)
    twins.prefill(tokens(1, 2, 20))
    twins.decode(4)
    assert twins.graph.fused == {"norm": norms, "gated": 2, "rotary": 1}
    assert twins.graph.replayed == 4 - PROOFS
    assert not any("forward" in vars(module) for module in model.modules())
    assert not isinstance(sys.modules[type(model).__module__].apply_rotary_pos_emb, Rotary)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("norm", "scaling"),
    [
        (modeling_llama.LlamaRMSNorm, "rounded"),
        (modeling_olmo2.Olmo2RMSNorm, "plain"),
        (modeling_gemma3.Gemma3RMSNorm, "one plus"),
    ],
)
@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_triton_where_a_norm_rounds_is_found_out(norm: Any, scaling: str, dtype: torch.dtype, eps: float) -> None:
    """With the weights that a model begins with, too; in fp32 there is nothing to round."""
    whole = dtype == torch.float32 and scaling == "plain"
    assert proven(norm(64, eps).to(dtype), noise(2, 1, 64, dtype=dtype)) == ["rounded" if whole else scaling]


@pytest.mark.parametrize("activation", ["silu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("kind", ["llama", "phi3"])
def test_triton_gates_with_a_bias_on_their_projections(kind: str, activation: str) -> None:
    made = config(kind, hidden_act=activation, **({"mlp_bias": True} if kind == "llama" else {}))
    mlp = (modeling_llama.LlamaMLP if kind == "llama" else modeling_phi3.Phi3MLP)(made).requires_grad_(False)
    assert proven(mlp, noise(2, 1, 32)) == ["silu" if activation == "silu" else "gelu_tanh"]


@pytest.mark.parametrize(
    ("function", "columns", "variant"),
    [
        (modeling_llama.apply_rotary_pos_emb, 32, "rounded"),
        (modeling_phi3.apply_rotary_pos_emb, 32, "rounded"),
        (modeling_gpt_oss.apply_rotary_pos_emb, 16, "rounded"),
        (modeling_olmo2.apply_rotary_pos_emb, 32, "plain"),
        (modeling_glm4.apply_rotary_pos_emb, 32, None),
        (modeling_cohere.apply_rotary_pos_emb, 32, None),
        (modeling_phi3.apply_rotary_pos_emb, 24, None),
    ],
    ids=["llama", "whole", "half angles", "wide angles", "interleaved glm", "interleaved cohere", "partial"],
)
@pytest.mark.parametrize("heads", [1, 2])
def test_triton_rotations_that_are_and_are_not_of_halves(
    function: Callable[..., Any], columns: int, variant: str | None, heads: int
) -> None:
    dtype = torch.bfloat16
    query, key = noise(2, 4, 1, 32, dtype=dtype), noise(2, 2, 1, 32, dtype=dtype, seed=1)
    if heads == 2:
        query, key = query.transpose(1, 2), key.transpose(1, 2)
    cos, sin = noise(2, 2, 1, columns, dtype=torch.float32 if variant == "plain" else dtype, seed=2)
    part = Rotary(function)
    got, want = part(query, key, cos, sin, unsqueeze_dim=heads), function(query, key, cos, sin, unsqueeze_dim=heads)
    for mine, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert list(part.proven.values()) == ([] if columns == 24 else [variant])


def test_triton_rotations_of_one_tensor_and_calls_that_say_more() -> None:
    def one(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, unsqueeze_dim: int = 1) -> torch.Tensor:
        return modeling_llama.apply_rotary_pos_emb(x, x, cos, sin, unsqueeze_dim)[0]

    query, (cos, sin) = noise(2, 1, 4, 32), noise(2, 2, 1, 32, seed=2)
    part = Rotary(one)
    torch.testing.assert_close(part(query, cos, sin, 2), one(query, cos, sin, 2))
    assert list(part.proven.values()) == ["rounded"]

    def positions(*args: torch.Tensor, position_ids: Any = None) -> Any:
        return modeling_llama.apply_rotary_pos_emb(*args)

    query = query.transpose(1, 2)
    part = Rotary(positions)
    part(query, query, cos, sin, position_ids=torch.zeros(2, 1))
    assert not part.proven


# Modules that do something else.


class Shifted(modeling_llama.LlamaRMSNorm):
    """Takes the mean away first."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states - hidden_states.mean(-1, keepdim=True))


class OtherEpsilon(modeling_llama.LlamaRMSNorm):
    """Has one epsilon and uses another."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.weight * torch.nn.functional.rms_norm(hidden_states, hidden_states.shape[-1:], eps=1e-5)


class Cut(modeling_llama.LlamaRMSNorm):
    """Keeps its results small."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return super().forward(hidden_states).clamp(max=2.0)


@pytest.mark.parametrize("module", [Shifted(64), OtherEpsilon(64, 1e-6), Cut(64), nn.LayerNorm(64, bias=False)])
def test_triton_norms_by_another_formula_are_left_alone(module: nn.Module) -> None:
    assert proven(module, noise(2, 1, 64)) == [None]


class Clamped(modeling_llama.LlamaMLP):
    """Keeps its gate in bounds."""

    def forward(self, x: torch.Tensor) -> Any:
        return self.down_proj(self.act_fn(self.gate_proj(x).clamp(max=1.0)) * self.up_proj(x))


class Scaled(modeling_llama.LlamaMLP):
    """Scales what its projections are given."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x * 0.5)


class Residual(modeling_llama.LlamaMLP):
    """Adds what came in."""

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x) + x


@pytest.mark.parametrize("kind", [Clamped, Scaled, Residual])
def test_triton_gates_by_another_formula_are_left_alone(kind: Any) -> None:
    mlp = kind(config("llama", intermediate_size=32)).requires_grad_(False)
    assert proven(mlp, noise(2, 1, 32)) == [None]
    erf = modeling_llama.LlamaMLP(config("llama", hidden_act="gelu")).requires_grad_(False)
    assert proven(erf, noise(2, 1, 32)) == [None]


def test_triton_modules_that_others_have_changed_are_left_alone() -> None:
    module = modeling_llama.LlamaRMSNorm(64)
    module.forward = lambda x: x  # type: ignore[method-assign]
    assert part_of(module) is None
    hooked = modeling_llama.LlamaRMSNorm(64)
    hooked._hf_hook = object()  # type: ignore[assignment]
    assert part_of(hooked) is None
    biased = modeling_llama.LlamaRMSNorm(64)
    biased.bias = nn.Parameter(torch.zeros(64))
    assert part_of(biased) is None


def test_triton_hooks_of_a_users_own_still_run() -> None:
    mlp = modeling_llama.LlamaMLP(config("llama")).requires_grad_(False)
    mlp.gate_proj.register_forward_hook(lambda module, args, result: result + 1.0)
    part = part_of(mlp)
    assert isinstance(part, Gated)
    torch.testing.assert_close(part(noise(2, 1, 32)), mlp(noise(2, 1, 32)))
    assert list(part.proven.values()) == ["silu"]


# What is left of it.


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make("llama", **SMALL)


def test_triton_the_model_is_as_it_was_after_a_failure(llama: PreTrainedModel) -> None:
    original = modeling_llama.apply_rotary_pos_emb
    state = torch.random.get_rng_state()
    fusion = Fusion(llama)

    def fails() -> None:
        with torch.no_grad(), fusion.applied():
            assert "forward" in vars(llama.model.norm)
            assert modeling_llama.apply_rotary_pos_emb is not original
            llama(tokens(1, 1, 1))
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert fusion.used == {"norm": 5, "gated": 2, "rotary": 1}
    assert not any("forward" in vars(module) for module in llama.modules())
    assert modeling_llama.apply_rotary_pos_emb is original
    assert torch.equal(torch.random.get_rng_state(), state)


class WrongWithKernels(RecordedTape):
    """A recording that is right only with the model's own small kernels."""

    def record(self, step: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
        self.fused = isinstance(modeling_llama.apply_rotary_pos_emb, Rotary)
        self.logits = super().record(step, device)
        return self.logits

    def replay(self) -> None:
        super().replay()
        if self.fused:
            self.logits.mul_(1.2)


def test_triton_a_recording_that_fails_with_kernels_is_made_without(llama: PreTrainedModel) -> None:
    twins = Twins(llama, OFFLOADED, WrongWithKernels, max_length=40)
    twins.prefill(tokens(1, 1, 20))
    twins.decode(6)
    assert twins.graph.recorded == 2
    assert twins.graph.fused == {}
    assert twins.graph.replayed == 6 - PROOFS - 1

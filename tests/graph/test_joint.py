"""Projections that read the same input as one product: as near to the exact one, and the model is none the worse."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.utils.other import clean_state_dict_for_safetensors
from safetensors.torch import save_model
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2Config
from transformers.models.llama import modeling_llama

from kcache.attaching import attach
from kcache.graph.decoder import PROOFS
from kcache.graph.fuse import Fusion
from kcache.graph.joint import GROUPS, Joint, joints_of
from tests.graph.recorder import RecordedTape
from tests.graph.test_fuse import OFFLOADED, SMALL
from tests.graph.twins import Twins
from tests.tiny_models import VOCAB, make, tokens

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def frozen(kind: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    return make(kind, dtype=dtype, **{**SMALL, **changes}).requires_grad_(False)


def qwen2(dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Has a bias on queries, keys and values, here one that counts."""
    torch.manual_seed(0)
    shape = {**SMALL, "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "initializer_range": 0.25}
    model = AutoModelForCausalLM.from_config(Qwen2Config(**shape, eos_token_id=None), dtype=dtype).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = None, 0
    return model.requires_grad_(False)


def group(dtype: torch.dtype = torch.float32, bias: bool = False, sizes: tuple[int, ...] = (64, 32, 32)) -> nn.Module:
    """A module with projections of 48 inputs."""
    torch.manual_seed(1)
    holder = nn.Module()
    for name, size in zip(GROUPS[0], sizes, strict=False):
        setattr(holder, name, nn.Linear(48, size, bias, dtype=dtype))
    return holder.requires_grad_(False)


@contextmanager
def joined(holder: nn.Module) -> Iterator[Joint]:
    (joint,) = joints_of(holder)
    for module, forward in joint.forwards():
        vars(module)["forward"] = forward
    try:
        with torch.no_grad():
            yield joint
    finally:
        for module, _ in joint.forwards():
            del vars(module)["forward"]


def rows_of(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def weights_of(model: nn.Module) -> list[torch.Tensor]:
    """A copy of each parameter, in memory of its own."""
    return [parameter.detach().clone() for parameter in model.parameters()]


def held_bytes(model: nn.Module) -> int:
    stores = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in model.parameters()}
    return sum(stores.values())


class Products:
    """Counts products."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.made = 0
        original = functional.linear

        def linear(*args: Any) -> torch.Tensor:
            self.made += 1
            return original(*args)

        monkeypatch.setattr(functional, "linear", linear)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Products:
    return Products(monkeypatch)


# What is computed.


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 5), (64,), (65,), (0, 1)])
def test_parts_of_one_product(dtype: torch.dtype, bias: bool, shape: tuple[int, ...], products: Products) -> None:
    holder, entering = group(dtype, bias), rows_of(*shape, 48, dtype=dtype)
    names = GROUPS[0]
    want = [getattr(holder, name)(entering) for name in names]
    with joined(holder) as joint:
        for name in names:
            getattr(holder, name)(entering)
        products.made = 0
        got = [getattr(holder, name)(entering) for name in names]
        assert products.made == (1 if shape in ((1, 1), (3, 1), (2, 5), (64,)) else 3)
    for mine, theirs in zip(got, want, strict=True):
        assert mine.shape == theirs.shape
        assert mine.stride(-1) == 1
        eps = torch.finfo(dtype).eps
        torch.testing.assert_close(mine, theirs, rtol=2 * eps, atol=4 * torch.finfo(torch.float32).eps * 8)
    assert not joint._waiting
    assert joint._entering is None


def test_other_input_gets_a_product_of_its_own() -> None:
    """Keys and values of another tensor, a tensor changed in between, a module that is called twice."""
    holder = group()
    one, other = rows_of(2, 1, 48), rows_of(2, 1, 48, seed=1)

    def check(*calls: tuple[str, torch.Tensor]) -> None:
        for name, entering in calls:
            module = getattr(holder, name)
            torch.testing.assert_close(module(entering), nn.Linear.forward(module, entering))

    query, key, value = GROUPS[0]
    with joined(holder) as joint:
        check((query, one), (query, one), (value, one), (key, one))
        check((query, one), (key, one))
        assert list(joint._waiting) == [2]
        one.mul_(2.0)
        check((value, one))
        assert list(joint.proven.values()) == [None]  # what was waiting has been made in vain
        check((query, one), (key, other), (value, one))
    with joined(holder) as joint:
        check((query, one), (key, other), (value, other))
        assert list(joint.proven.values()) == [None]
        assert not joint._waiting


def test_a_product_that_is_off_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    original = functional.linear

    def wrong(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        result = original(rows, weight, bias)
        if len(weight) == 128:  # the joint one
            result[..., 120] += 0.02
        return result

    monkeypatch.setattr(functional, "linear", wrong)
    holder, entering = group(torch.bfloat16), rows_of(8, 1, 48, dtype=torch.bfloat16)
    before = [parameter.data_ptr() for parameter in holder.parameters()]
    with joined(holder) as joint:
        got = holder.v_proj(entering)  # type: ignore[operator]
    assert list(joint.proven.values()) == [None]
    assert torch.equal(got, holder.v_proj(entering))  # type: ignore[operator]
    assert [parameter.data_ptr() for parameter in holder.parameters()] == before


# Whole models.


FAMILIES: list[tuple[str, Callable[[], PreTrainedModel], int]] = [
    ("llama", lambda: frozen("llama"), 4),
    ("qwen2", qwen2, 4),
    ("qwen3", lambda: frozen("qwen3"), 4),
    ("gemma3", lambda: frozen("gemma3", layer_types=["sliding_attention", "full_attention"]), 4),
    ("phi3", lambda: frozen("phi3", hidden_size=32), 0),
]


@pytest.mark.parametrize(("make_model", "joint"), [family[1:] for family in FAMILIES], ids=[f[0] for f in FAMILIES])
def test_triton_replayed_steps_with_joint_products(make_model: Callable[[], PreTrainedModel], joint: int) -> None:
    """And the model afterwards is to the bit what it was, in as much memory."""
    model = make_model()
    ids, weights, held = tokens(3, 2, 5), weights_of(model), held_bytes(model)
    with torch.no_grad():
        before = model(ids).logits
    twins = Twins(model, OFFLOADED, RecordedTape, max_length=40)
    twins.prefill(tokens(1, 2, 12))
    twins.decode(PROOFS + 1)
    assert twins.graph.fused.get("joint", 0) == joint
    assert {"norm", "gated", "rotary"} <= set(twins.graph.fused)
    operators = [str(operator) for operator, *_ in twins.graph._recording.tape.operators]  # type: ignore[union-attr]
    assert not [name for name in operators if "clone" in name or "contiguous" in name]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, before)
    assert all(map(torch.equal, model.parameters(), weights))
    assert held_bytes(model) == held
    assert not any("forward" in vars(module) for module in model.modules())
    twins.decode(1)
    assert (twins.graph.recorded, twins.graph.replayed) == (1, 2)


@pytest.fixture
def merged() -> PreTrainedModel:
    """A model whose projections lie in one piece of memory."""
    model = frozen("llama")
    with Fusion(model).applied(), torch.no_grad():
        model(tokens(1, 2, 1))
    attention = model.model.layers[0].self_attn
    query, key, value = (module.weight for module in (attention.q_proj, attention.k_proj, attention.v_proj))
    assert query.data_ptr() + query.nbytes == key.data_ptr()
    assert key.data_ptr() + key.nbytes == value.data_ptr()
    assert len({parameter.untyped_storage().data_ptr() for parameter in model.parameters()}) == len(
        list(model.parameters())
    )
    return model


def test_triton_a_second_recording_finds_them_merged(merged: PreTrainedModel) -> None:
    places = [parameter.data_ptr() for parameter in merged.parameters()]
    fusion = Fusion(merged)
    with fusion.applied(), torch.no_grad():
        merged(tokens(1, 2, 1))
    assert fusion.used["joint"] == 4
    assert [parameter.data_ptr() for parameter in merged.parameters()] == places


def test_triton_merged_models_are_saved_copied_and_loaded(merged: PreTrainedModel, tmp_path: Path) -> None:
    ids = tokens(2, 1, 9)
    with torch.no_grad():
        want = merged(ids).logits
        merged.save_pretrained(tmp_path)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        assert torch.equal(loaded(ids).logits, want)
        assert len(joints_of(loaded.requires_grad_(False))) == 4
        torch.save(merged.state_dict(), tmp_path / "state")
        fresh = frozen("llama", seed=5)
        fresh.load_state_dict(torch.load(tmp_path / "state"))
        assert torch.equal(fresh(ids).logits, want)
        kept = clean_state_dict_for_safetensors(dict(merged.state_dict()))
        assert kept.keys() == merged.state_dict().keys(), "nothing is taken for tied"
        save_model(merged, str(tmp_path / "model.safetensors"))
        assert len(pickle.dumps(merged)) < 1.1 * len(pickle.dumps(frozen("llama")))
        other = copy.deepcopy(merged)
        other.model.layers[0].self_attn.q_proj.weight.zero_()
        assert not torch.equal(other(ids).logits, want)
        assert torch.equal(merged(ids).logits, want)
        merged.load_state_dict(frozen("llama", seed=6).state_dict())
        assert torch.equal(merged(ids).logits, frozen("llama", seed=6)(ids).logits)


def test_triton_a_recording_keeps_the_weights_that_it_reads() -> None:
    """Another cache's recording puts them elsewhere in the midst of a run."""
    model = frozen("llama")
    twins = Twins(model, OFFLOADED, RecordedTape, max_length=60)
    twins.prefill(tokens(1, 1, 12))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("kcache.graph.fuse.joints_of", lambda model: [])
        twins.decode(PROOFS)
    assert "joint" not in twins.graph.fused
    before = {parameter.data_ptr() for parameter in model.parameters()}
    graph = twins.graph
    with attach(model):
        run = graph.begin(model, twins.taped)
        with Fusion(model).applied(), torch.no_grad():
            model(tokens(1, 2, 1))
        assert {parameter.data_ptr() for parameter in model.parameters()} != before
        assert {weight.data_ptr() for weight in graph._held} == before
        graph.leave(run)
    assert not graph._held
    twins.decode(PROOFS + 1)
    assert graph.recorded == 2
    assert graph.fused["joint"] == 4


# What is left alone.


class Adapted(nn.Linear):
    """A projection with something to add."""


def test_projections_that_are_not_plain_are_left_alone() -> None:
    def refused(change: Callable[[nn.Module], object], bias: bool = False) -> bool:
        holder = group(bias=bias)
        change(holder)
        return joints_of(holder) == []

    def put(name: str, module: nn.Module | None) -> Callable[[nn.Module], object]:
        return lambda holder: setattr(holder, name, module.requires_grad_(False) if module else None)

    key = "k_proj"
    assert not refused(lambda holder: None)
    assert refused(put(key, None))
    assert refused(put(key, Adapted(48, 32, bias=False)))
    assert refused(put(key, nn.Linear(48, 32, bias=False, dtype=torch.bfloat16)))
    assert refused(put(key, nn.Linear(40, 32, bias=False)))
    assert refused(put(key, nn.Linear(48, 32, bias=True)))
    assert refused(put(key, nn.Linear(48, 31, bias=False)))
    assert refused(put(key, nn.Linear(48, 32, bias=False, device="meta")))
    assert refused(lambda holder: holder.k_proj.requires_grad_(True))
    assert refused(lambda holder: holder.k_proj.bias.requires_grad_(True), bias=True)
    assert refused(lambda holder: holder.k_proj.register_forward_hook(lambda *args: None))
    assert refused(lambda holder: holder.k_proj.register_forward_pre_hook(lambda *args: None))
    assert refused(lambda holder: setattr(holder.k_proj, "forward", lambda rows: rows))
    assert refused(lambda holder: setattr(holder.k_proj, "_hf_hook", object()))
    assert refused(lambda holder: setattr(holder, "v_proj", holder.k_proj))
    assert refused(lambda holder: setattr(holder.v_proj, "weight", holder.k_proj.weight))
    assert refused(lambda holder: holder.register_buffer("view", holder.k_proj.weight.data[:4]))
    assert refused(lambda holder: setattr(holder.k_proj.weight, "data", torch.zeros(48, 32).T))
    assert refused(lambda holder: setattr(holder.k_proj.weight, "data", torch.zeros(64, 48)[:32]))


def test_weights_tied_to_another_module_are_left_alone() -> None:
    model = frozen("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj.weight = first.q_proj.weight
    assert [joint._modules[0] for joint in joints_of(model)] == [layer.mlp.gate_proj for layer in model.model.layers]


def test_triton_a_projection_that_is_exchanged_makes_a_new_group(merged: PreTrainedModel) -> None:
    attention = merged.model.layers[0].self_attn
    attention.k_proj = nn.Linear(32, 16, bias=False).requires_grad_(False)
    ids = tokens(2, 1, 9)
    with torch.no_grad():
        want = merged(ids).logits
        fusion = Fusion(merged)
        with fusion.applied():
            merged(tokens(1, 2, 1))
        assert fusion.used["joint"] == 4
        assert torch.equal(merged(ids).logits, want)
    assert attention.q_proj.weight.data_ptr() + attention.q_proj.weight.nbytes == attention.k_proj.weight.data_ptr()
    assert type(attention) is modeling_llama.LlamaAttention


def test_a_projection_in_two_groups_is_in_none() -> None:
    model = frozen("llama")
    first, second = (layer.self_attn for layer in model.model.layers)
    second.q_proj = first.q_proj
    assert [joint._modules[0] for joint in joints_of(model)] == [layer.mlp.gate_proj for layer in model.model.layers]


def test_triton_parts_that_cannot_be_apart_share_a_storage(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(tensor: torch.Tensor) -> torch.Tensor:
        raise BufferError("no")

    monkeypatch.setattr("kcache.graph.joint.from_dlpack", refuse)
    model, ids = frozen("llama"), tokens(2, 1, 9)
    with torch.no_grad():
        want = model(ids).logits
        for _ in range(2):
            fusion = Fusion(model)
            with fusion.applied():
                model(tokens(1, 2, 1))
            assert fusion.used["joint"] == 4
        assert torch.equal(model(ids).logits, want)
    attention = model.model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.k_proj.weight.untyped_storage().data_ptr()

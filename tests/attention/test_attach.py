"""Attaching: registries switched and restored, several models and caches at once, other caches as stock."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
from transformers import (
    BertConfig,
    BertModel,
    DynamicCache,
    PreTrainedModel,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    StaticCache,
    T5Config,
    T5ForConditionalGeneration,
)

import kcache
from kcache.attaching import attach
from kcache.attention.probe import probe
from kcache.attention.switching import is_attached
from kcache.backends import dense
from kcache.cache import KCache
from kcache.errors import CacheStateError, InputError, KCacheError, UnsupportedModelError
from kcache.models.arguments import cache_in
from kcache.policy import Policy
from tests.pair import WHOLE, Pair, forward
from tests.tiny_models import holding, left_padding, make, tokens

OFFLOAD = Policy(topn=4, dense_layers=0, dense_below=0, offload="all")


def implementations(model: PreTrainedModel) -> set[str]:
    """What every config of the model says."""
    configs = [module.config for module in model.modules() if hasattr(module, "config")]
    return {config._attn_implementation for config in configs}


# -- switching on and off ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma3"])
def test_attach_restores_what_was_there(kind: str, attention: str) -> None:
    model = make(kind, attention=attention)
    assert not is_attached(model)
    with attach(model) as same:
        assert same is model
        assert is_attached(model)
    assert not is_attached(model)
    assert implementations(model) == {attention}


def test_attach_nests_and_the_outermost_restores() -> None:
    model = make("llama")
    with attach(model):
        with attach(model):
            with attach(model):
                assert is_attached(model)
            assert is_attached(model)
        assert is_attached(model)
    assert implementations(model) == {"sdpa"}


def test_attach_restores_after_an_exception() -> None:
    model = make("llama")
    with pytest.raises(KeyError), attach(model), attach(model):
        raise KeyError
    assert implementations(model) == {"sdpa"}
    pair = Pair(model)
    pair.forward(tokens(1, 2, 12))
    with pytest.raises(IndexError), attach(model):
        model(input_ids=torch.full((2, 1), 10**6), **holding(KCache(model)))
    assert implementations(model) == {"sdpa"}
    pair.decode(2)


def test_attach_scopes_that_overlap_without_nesting() -> None:
    """Two streams of tokens on one model: whoever ends first must not detach the other."""
    model = make("llama")
    first, second = attach(model), attach(model)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert is_attached(model)
    second.__exit__(None, None, None)
    assert implementations(model) == {"sdpa"}


def test_attached_model_that_is_dropped_is_freed() -> None:
    model = make("llama")
    cache = KCache(model)
    with attach(model):
        forward(model, cache, tokens(1, 1, 5))
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None
    assert cache.get_seq_length() == 5


@pytest.mark.parametrize("twin_of", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_of_an_attached_model_is_not_attached(twin_of: Callable[[PreTrainedModel], PreTrainedModel]) -> None:
    model = make("llama")
    with attach(model):
        twin = twin_of(model)
        assert is_attached(model)
        assert implementations(twin) == {"sdpa"}
        with attach(twin):
            assert is_attached(twin)
        assert implementations(twin) == {"sdpa"}
        assert is_attached(model)
    assert implementations(model) == {"sdpa"}
    Pair(twin).forward(tokens(1, 2, 9))


@pytest.mark.parametrize("attached_before", [False, True])
def test_layers_with_a_config_of_their_own_are_attached(attached_before: bool) -> None:
    """A copied layer brings a copy of the config, which tells its attention what to run."""
    model = make("llama")
    if attached_before:
        with attach(model):
            pass
    layers: Any = model.model.layers
    layers[1] = copy.deepcopy(layers[1])
    pair = Pair(model)
    pair.forward(tokens(1, 2, 12))
    pair.decode(3)
    assert len(pair.ours.tiered_layers) == 3
    assert implementations(model) == {"sdpa"}


def test_two_models_attached_at_once() -> None:
    one, two = Pair(make("llama")), Pair(make("gpt2", seed=4))
    with attach(one.model), attach(two.model):
        for step in range(3):
            for pair in (one, two):
                ids, mask = tokens(step, 2, 9), left_padding([9, 4])
                pair.mask = mask if pair.mask is None else torch.cat([pair.mask, mask], 1)
                got = forward(pair.model, pair.ours, ids, pair.mask)
                with_stock = forward(pair.model, pair.stock, ids, pair.mask)
                pair.check(got, with_stock, mask.bool())
    for pair in (one, two):
        pair.decode(3)
        assert implementations(pair.model) == {"sdpa"}


def test_several_caches_on_one_model_in_turn() -> None:
    model = make("llama")
    pairs = [Pair(model), Pair(model, WHOLE.replace(tail="none")), Pair(model, Policy(offload="none"))]
    for step, size in enumerate([12, 1, 5, 1, 1]):
        for number, pair in enumerate(pairs):
            pair.forward(tokens(10 * step + number, number + 1, size))


# -- caches that are not ours --------------------------------------------------------------------------------------


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "ministral", "gemma3", "gpt2", "gemma2", "gpt_oss"])
def test_other_caches_work_as_stock_on_an_attached_model(kind: str, attention: str) -> None:
    if kind in ("gemma2", "gpt_oss"):
        attention = "eager"
    model = make(kind, attention=attention)
    caches: list[Callable[[], object]] = [
        lambda: DynamicCache(config=model.config),
        lambda: DynamicCache(),
        lambda: StaticCache(config=model.config, max_cache_len=40),
        lambda: None,
    ]
    ids, mask = tokens(1, 2, 20), left_padding([20, 9])
    for make_cache in caches:
        for given in (mask, None):
            outs = []
            for attached in (False, True):
                options = {"max_new_tokens": 8, "do_sample": False, "attention_mask": given}
                cache = make_cache()
                if cache is None:
                    options["use_cache"] = False
                else:
                    options |= holding(cache)
                if attached:
                    with attach(model):
                        outs.append(model.generate(ids, **options))
                else:
                    outs.append(model.generate(ids, **options))
            assert torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_plain_forwards_of_an_attached_model(attention: str) -> None:
    """No cache at all: scoring a padded batch, attention weights where the model gives them, a chunk after a past."""
    model = make("llama", attention=attention)
    ids, mask = tokens(1, 2, 20), left_padding([20, 9])
    with torch.no_grad():
        want = model(input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=attention == "eager")
        with attach(model):
            got = model(input_ids=ids, attention_mask=mask, use_cache=False, output_attentions=attention == "eager")
    torch.testing.assert_close(got.logits[mask.bool()], want.logits[mask.bool()])
    if attention == "eager":
        assert len(got.attentions) == 3
        torch.testing.assert_close(got.attentions[2][0], want.attentions[2][0])
    stock = [DynamicCache(config=model.config) for _ in range(2)]
    for size in (9, 6, 1):
        want_logits = forward(model, stock[0], tokens(size, 2, size))
        with attach(model):
            torch.testing.assert_close(forward(model, stock[1], tokens(size, 2, size)), want_logits)


def test_gradients_flow_through_an_attached_model_without_a_cache() -> None:
    model = make("llama")
    grads = []
    for attached in (False, True):
        model.zero_grad()
        if attached:
            with attach(model):
                model(input_ids=tokens(1, 2, 9), labels=tokens(1, 2, 9), use_cache=False).loss.backward()
        else:
            model(input_ids=tokens(1, 2, 9), labels=tokens(1, 2, 9), use_cache=False).loss.backward()
        grads.append(model.model.layers[0].self_attn.v_proj.weight.grad.clone())
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(grads[1], grads[0])


@pytest.mark.parametrize("attached", [True, False])
@pytest.mark.parametrize("trained", ["q_proj", "k_proj", "v_proj"])
def test_a_gradient_through_our_cache_is_refused(trained: str, attached: bool) -> None:
    model = make("llama").requires_grad_(False)
    getattr(model.model.layers[0].self_attn, trained).requires_grad_(True)
    with attach(model) if attached else nullcontext():
        cache = KCache(model, OFFLOAD)
        with pytest.warns(UserWarning, match="not attached") if not attached else nullcontext():
            model(input_ids=tokens(1, 2, 9), **holding(cache))
        logits = model(input_ids=tokens(2, 2, 1), **holding(cache)).logits
        with pytest.raises(CacheStateError, match="no gradient"):
            logits.sum().backward()


def test_forwards_that_record_gradients_decode_as_others_do() -> None:
    model, logits = make("llama"), []
    with attach(model):
        for context in (nullcontext(), torch.no_grad()):
            with context:
                cache = KCache(model, OFFLOAD)
                model(input_ids=tokens(1, 2, 9), **holding(cache))
                logits.append(model(input_ids=tokens(2, 2, 1), **holding(cache)).logits)
                assert not cache.layers[0].keys.requires_grad
    torch.testing.assert_close(*logits)


def test_a_compiled_model_leaves_our_cache_out_of_its_graphs() -> None:
    model = make("llama", num_hidden_layers=1)
    ours, traced, logits = str(Path(kcache.__file__).parent), [], []

    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        traced.extend(node.stack_trace or "" for node in graph.graph.nodes)
        return graph.forward

    torch._dynamo.reset()
    with attach(model), torch.no_grad():
        for runs in (model, torch.compile(model, backend=compiler)):
            cache = KCache(model, OFFLOAD)
            for size in (9, 1, 1):
                out = runs(input_ids=tokens(size, 2, size), **holding(cache)).logits
            logits.append(out)
            assert cache.snapshot().layers[0].mode == "topn"
    torch.testing.assert_close(*logits)
    assert traced
    assert not [where for where in traced if ours in where]


def test_dropout_in_attention_is_refused() -> None:
    model = make("llama", attention_dropout=0.5).train()
    with attach(model), torch.no_grad():
        with pytest.raises(CacheStateError, match=r"call model\.eval"):
            model(input_ids=tokens(1, 2, 9), **holding(KCache(model, OFFLOAD)))
        model.eval()(input_ids=tokens(1, 2, 9), **holding(KCache(model, OFFLOAD)))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_all_weights_of_attention_are_refused(attention: str) -> None:
    model = make("llama", attention=attention)
    with attach(model), pytest.raises(CacheStateError, match="output_attentions"):
        model(input_ids=tokens(1, 2, 9), output_attentions=True, **holding(KCache(model, OFFLOAD)))


# -- our cache where it does not belong ----------------------------------------------------------------------------


def test_a_cache_made_before_attach_and_kept_after_it() -> None:
    """Attached, detached and attached again: the answers are the same throughout."""
    model = make("llama")
    pair = Pair(model)
    pair.forward(tokens(1, 2, 14), left_padding([14, 6]))
    pair.decode(2)
    for step in range(3):  # detached: the stock attention over rows brought back
        ids = tokens(step, 2, 1 + 3 * step)
        mask = pair.extend_mask(ids, None)
        pair.check(forward(model, pair.ours, ids, mask), pair.stock_forward(ids, mask), None)
    pair.decode(3)
    pair.crop(4)
    pair.decode(2)


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2"])
def test_a_cache_that_is_never_attached(kind: str) -> None:
    model = make(kind)
    ids, mask = tokens(1, 2, 20), left_padding([20, 9])
    options = {"attention_mask": mask, "max_new_tokens": 10, "do_sample": False}
    cache = KCache(model, WHOLE.replace(topn=1))
    want = model.generate(ids, **options)
    with pytest.warns(UserWarning, match=r"kcache\.attach") as warned:
        assert torch.equal(model.generate(ids, **holding(cache), **options), want)
    assert len([each for each in warned if "attach" in str(each.message)]) == 1
    assert cache.stats.host_bytes > 0
    assert cache.stats.rows_fetched == 0


def test_who_attaches_or_fills_a_cache_by_hand_is_not_warned(recwarn: pytest.WarningsRecorder) -> None:
    model = make("llama")
    cache = KCache(model, WHOLE)
    with attach(model):
        forward(model, cache, tokens(1, 1, 9))
    rows = torch.zeros(1, 2, 3, 16)
    KCache(model).update(rows, rows, 0)
    assert not [each for each in recwarn if "attach" in str(each.message)]


@pytest.mark.parametrize("attached", [(), (0,), (1,), (0, 1)])
@pytest.mark.parametrize("filled", [False, True])
def test_a_cache_refuses_a_second_model(attached: tuple[int, ...], filled: bool) -> None:
    """Whoever is attached: a forward of another model fails loudly and stores nothing."""
    from contextlib import ExitStack

    models = [make("llama"), make("llama", seed=1)]
    pair = Pair(models[0])
    if filled:
        pair.forward(tokens(1, 1, 9))
    with ExitStack() as stack:
        for number in attached:
            stack.enter_context(attach(models[number]))
        with pytest.raises(CacheStateError, match="another model"):
            forward(models[1], pair.ours, tokens(2, 1, 1))
        with pytest.raises(CacheStateError, match="another model"):
            models[1].generate(tokens(2, 1, 12), **holding(pair.ours), max_new_tokens=2)
    pair.forward(tokens(2, 1, 3))
    pair.decode(2)


def test_a_cache_refuses_another_batch_size() -> None:
    model = make("llama")
    cache = KCache(model, WHOLE)
    with attach(model):
        forward(model, cache, tokens(1, 2, 9))
        with pytest.raises(CacheStateError, match=r"2 sequences .* 3"):
            forward(model, cache, tokens(1, 3, 1))


def test_a_cache_refuses_rows_of_a_model_that_has_changed() -> None:
    model = make("llama")
    with attach(model), torch.no_grad():
        cache = KCache(model, OFFLOAD)
        forward(model, cache, tokens(1, 2, 9))
        model.to(torch.bfloat16)
        with pytest.raises(CacheStateError, match=r"holds K of 2 heads of 8 in torch.float32.*given.*bfloat16"):
            forward(model, cache, tokens(1, 2, 1))
        cache.reset()
        forward(model, cache, tokens(1, 2, 9))


@pytest.mark.parametrize(
    ("keys", "values", "says"),
    [
        ((1, 2, 1, 8), (1, 2, 2, 8), "same sequences and tokens"),
        ((2, 1, 8), (2, 1, 8), r"must be \[sequences"),
        ((1, 3, 1, 8), (1, 3, 1, 8), "given K of 3 heads of 8"),
        ((1, 2, 1, 16), (1, 2, 1, 16), "given K of 2 heads of 16"),
    ],
)
def test_a_cache_refuses_rows_of_other_shapes(keys: tuple[int, ...], values: tuple[int, ...], says: str) -> None:
    cache = KCache(make("llama"), OFFLOAD)
    cache.update(torch.ones(1, 2, 3, 8), torch.ones(1, 2, 3, 8), 0)
    with pytest.raises(CacheStateError, match=says):
        cache.update(torch.ones(keys), torch.ones(values), 0)
    assert cache.get_seq_length() == 3


def test_a_cache_that_is_pickled_says_why_not() -> None:
    with pytest.raises(CacheStateError, match="cannot be pickled"):
        pickle.dumps(KCache(make("llama"), OFFLOAD))


def test_attention_that_was_replaced_since_the_model_was_looked_at_is_refused() -> None:
    """It would attend to each forward's new rows alone."""

    def forward_of_its_own(self: Any, hidden_states: torch.Tensor, **given: Any) -> tuple[torch.Tensor, None]:
        k, v = (made(hidden_states).unflatten(-1, (-1, 8)).transpose(1, 2) for made in (self.k_proj, self.v_proj))
        cache: Any = cache_in(given)
        _, values = cache.update(k, v, self.layer_idx)
        return hidden_states + values.sum(), None

    model: Any = make("llama")
    cache = KCache(model, WHOLE)
    for layer in model.model.layers:
        layer.self_attn.forward = MethodType(forward_of_its_own, layer.self_attn)
    with attach(model):
        forward(model, cache, tokens(1, 2, 5))
        with pytest.raises(CacheStateError, match="was replaced"):
            forward(model, cache, tokens(2, 2, 1))


def test_one_forward_with_two_updates_of_a_layer_is_refused() -> None:
    """A handle is for the rows of its own update only."""
    model = make("llama")
    cache = KCache(model, WHOLE)
    k = v = torch.randn(1, 2, 4, 8)
    with attach(model):
        _, handled = cache.update(k, v, 0)
        cache.update(k, v, 0)
        with pytest.raises(CacheStateError, match="changed between"):
            handled._kcache.attend(model.model.layers[0].self_attn, None)


# -- what cannot be served -----------------------------------------------------------------------------------------


def test_not_a_model_and_bad_lengths() -> None:
    with pytest.raises(InputError, match=r"lm\.model"):
        KCache("smollm2")  # type: ignore[arg-type]
    for length in (0, -5):
        with pytest.raises(InputError, match="max_length"):
            KCache(make("llama"), max_length=length)


def test_encoders_are_refused() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    t5 = {"d_model": 32, "d_ff": 32, "d_kv": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 97}
    for model in (BertModel(BertConfig(vocab_size=97, **shape)), T5ForConditionalGeneration(T5Config(**t5))):
        with pytest.raises(UnsupportedModelError) as refused:
            KCache(model)
        assert isinstance(refused.value, KCacheError)
        assert "\n" not in str(refused.value)


def test_probe_finds_the_layers_that_can_be_tiered() -> None:
    assert probe(make("llama")).tiered == {0, 1, 2}
    assert probe(make("ministral")).tiered == {0, 2}
    assert probe(make("gemma3")).tiered == {1, 2}
    assert probe(make("mistral", sliding_window=9)).tiered == frozenset()
    model = make("llama")
    assert probe(model) is probe(model)
    assert implementations(model) == {"sdpa"}


def test_probe_looks_again_at_a_model_that_has_lost_layers() -> None:
    model = make("llama")
    assert len(KCache(model).tiered_layers) == 3
    layers: Any = model.model.layers
    model.model.layers, model.config.num_hidden_layers = layers[:2], 2
    pair = Pair(model)
    pair.forward(tokens(1, 2, 12))
    pair.decode(3)
    assert len(pair.ours.tiered_layers) == 2


def test_probe_of_a_model_that_counts_from_what_its_last_run_left() -> None:
    """Qwen 2 VL keeps how far images have moved the positions of each sequence, until it generates again."""
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": 97,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "initializer_range": 0.25,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]},
        },
        vision_config={"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2},
    )
    model = Qwen2VLForConditionalGeneration(config).eval()
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    want = model.generate(tokens(1, 2, 12), **options)
    with attach(model):
        assert model.generate(tokens(1, 2, 12), **holding(KCache(model, WHOLE)), **options).equal(want)


def test_probe_leaves_latent_attention_alone() -> None:
    """Multi-head latent attention expands what the cache returns; such a model runs exactly, with nothing tiered."""
    from transformers import AutoModelForCausalLM, DeepseekV3Config

    config = DeepseekV3Config(
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=2,
        kv_lora_rank=8,
        q_lora_rank=16,
        qk_rope_head_dim=4,
        qk_nope_head_dim=8,
        v_head_dim=8,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    pair = Pair(model)
    pair.forward(tokens(1, 2, 20), left_padding([20, 9]))
    pair.decode(5)


def test_probe_leaves_differential_attention_alone() -> None:
    from transformers import AutoModelForCausalLM, DiffLlamaConfig

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = DiffLlamaConfig(vocab_size=97, num_key_value_heads=2, pad_token_id=0, eos_token_id=None, **shape)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    assert probe(model).tiered == frozenset()
    pair = Pair(model)
    pair.forward(tokens(1, 2, 20), left_padding([20, 9]))
    pair.decode(5)


@pytest.mark.parametrize("kind", ["gemma2", "gpt_oss"])
def test_weights_that_are_asked_for_are_the_model_s_own(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel of ours may attend where only the model's eager attention knows how, unless its weights are wanted."""
    calls = []
    monkeypatch.setattr(dense, "compiled", lambda *given: calls.append(given))
    model, ids = make(kind, attention="eager"), tokens(0, 1, 20)
    with attach(model), torch.no_grad():
        calls.clear()  # those of the probe
        assert model(input_ids=ids, output_attentions=True).attentions[0] is not None
        assert not calls
        model(input_ids=ids)
    assert len(calls) == model.config.num_hidden_layers
    assert all((given[5] is None) == (kind == "gpt_oss") for given in calls)

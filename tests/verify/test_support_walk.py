"""Verdicts are as good as the committed table says; a fixed third is judged here, all of them by make support."""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import transformers
from packaging.version import Version
from transformers import BertConfig, LlamaConfig, PreTrainedModel

from kcache.attaching import attach
from kcache.attention.probe import probe
from kcache.cache import KCache
from kcache.errors import KCacheError, ModelNotFoundError, UnsupportedModelError
from kcache.layers.hybrid import HybridTieredLayer
from kcache.verify import trial
from kcache.verify.judge import judge_model, model_types
from kcache.verify.shrink import shrink
from kcache.verify.table import markdown, read, summary
from kcache.verify.verdict import KINDS, Verdict
from kcache.verify.walk import Job, walk
from kcache_cli.verify import verify_models
from tests.tiny_models import holding, make

PAGE = Path(__file__).parents[2] / "docs" / "support.md"
THIRD = slice(1, None, 3)


@pytest.fixture(scope="module")
def committed() -> dict[str, str]:
    return read(PAGE.read_text(encoding="utf-8"))


def is_worse(verdict: Verdict, kind: str) -> bool:
    return KINDS.index(verdict.kind) > KINDS.index(kind)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_no_verdict_of_a_third_of_all_architectures_is_worse_than_the_table_says(committed: dict[str, str]) -> None:
    written_with = PAGE.read_text(encoding="utf-8").partition("with transformers\n")[2].partition("; ")[0]
    if Version(transformers.__version__) < Version(written_with):
        pytest.skip("the table is of a newer transformers, which serves more")
    verdicts = list(walk([Job(name) for name in model_types()[THIRD] if name in committed]))
    assert len(verdicts) >= 60
    worse = [verdict for verdict in verdicts if is_worse(verdict, committed[verdict.model_type])]
    assert not worse, markdown(worse)
    assert all(verdict.acceptable for verdict in verdicts), markdown(verdicts)


def test_the_table_holds_every_entry_of_the_mapping(committed: dict[str, str]) -> None:
    if transformers.__version__ in PAGE.read_text(encoding="utf-8"):
        assert list(committed) == model_types()
    served = [kind for kind in committed.values() if kind.startswith("exact")]
    assert len(served) >= 125
    assert set(committed.values()) <= {"exact", "exact, stock layers", "refused"}


# -- the trial can see what it looks for ---------------------------------------------------------------------------


def test_a_model_served_wrongly_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same trial with a policy that drops rows must not call the model exact."""
    model = make("llama")
    assert trial.compare(model).exact
    monkeypatch.setattr(trial, "EXACT", trial.FEW)
    difference = trial.compare(model)
    assert not difference.exact
    assert difference.logits > 0.01


def test_all_padded_rows_and_a_second_turn_are_compared() -> None:
    difference = trial.compare(make("gemma3"))
    assert difference.exact
    assert (difference.tiered, difference.layers) == (2, 3)
    assert difference.rows_fetched > 0
    assert difference.few > 0.01


def test_stock_is_run_by_a_model_that_is_not_attached() -> None:
    model = make("gemma2", attention="eager")
    assert trial.compare(model).exact
    assert model.config._attn_implementation == "eager"


# -- workers ---------------------------------------------------------------------------------------------------------


def test_a_worker_that_dies_or_hangs_costs_one_verdict() -> None:
    code = (
        "import sys, json, os, time\n"
        "for line in sys.stdin:\n"
        "    name = json.loads(line)['name']\n"
        "    if name == 'dies': os._exit(7)\n"
        "    if name == 'hangs': time.sleep(60)\n"
        "    print(json.dumps(dict(model_type=name, model_class='C', kind='exact')), flush=True)\n"
    )
    jobs = [Job(name, timeout_s=1.5) for name in ("one", "dies", "two", "hangs", "three")]
    verdicts = {verdict.model_type: verdict for verdict in walk(jobs, 1, (sys.executable, "-c", code))}
    assert [verdicts[name].kind for name in ("one", "two", "three")] == ["exact"] * 3
    assert verdicts["dies"].kind == "crashed"
    assert "7" in verdicts["dies"].reason
    assert "1.5 s" in verdicts["hangs"].reason


def test_table_is_read_back() -> None:
    verdicts = [
        Verdict("a", "A", "exact", tiered=2, layers=2),
        Verdict("b", "B", "exact, stock layers", "window (1)", 1, 2),
        Verdict("c", "C", "refused", "no | cache"),
    ]
    assert read("text\n\n" + markdown(verdicts)) == {"a": "exact", "b": "exact, stock layers", "c": "refused"}
    assert "3 entries: " in summary(verdicts) and "2 are served exactly, 2 of them with tiered" in summary(verdicts)
    assert summary(verdicts[:1]) == "1 entry: 1 exact."
    assert not dataclasses.replace(verdicts[0], kind="differs").acceptable


# -- tiny configs ----------------------------------------------------------------------------------------------------


def test_shrinking_keeps_every_kind_of_layer() -> None:
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = transformers.Gemma3TextConfig(num_hidden_layers=36, layer_types=kinds * 6)
    small = shrink(config)
    assert set(small.layer_types) == {"sliding_attention", "full_attention"}
    assert len(small.layer_types) == small.num_hidden_layers == 4
    assert small.hidden_size <= 64
    assert small.sliding_window <= 12


def test_shrinking_keeps_what_a_small_config_says() -> None:
    config = LlamaConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1)
    small = shrink(config)
    assert (small.hidden_size, small.num_hidden_layers, small.num_key_value_heads) == (32, 2, 1)


def test_a_saved_model_is_judged_with_its_own_weights(tmp_path: Path) -> None:
    from tests.saved import save_tiny

    verdict = judge_model(str(save_tiny(tmp_path)))
    assert verdict.kind == "exact", verdict
    assert verdict.tiered == verdict.layers == 3


def test_a_config_alone_is_judged_by_a_tiny_model(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LlamaConfig(architectures=["LlamaForCausalLM"]).to_dict(), default=str))
    verdict = judge_model(str(path))
    assert (verdict.kind, verdict.layers) == ("exact", 4)


@pytest.mark.parametrize(
    ("name", "said"),
    [("lamma", "did you mean 'llama'?"), ("nosuch", "all of them are verified"), ("./nosuch", "no file or folder")],
)
def test_what_is_no_model_gets_no_verdict(monkeypatch: pytest.MonkeyPatch, name: str, said: str) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ModelNotFoundError) as refused:
        verify_models(["llama", name], "json", None, 1, False)
    assert name in str(refused.value) and said in str(refused.value)


# -- what refuses, refuses everywhere --------------------------------------------------------------------------------


def tiny(model_type: str, **changes: object) -> PreTrainedModel:
    config = shrink(transformers.CONFIG_MAPPING[model_type](**changes))
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("kind", ["bloom", "mamba", "git", "xlnet"])
def test_attach_and_kcache_refuse_what_loading_refuses(kind: str) -> None:
    model = tiny(kind)
    for use in (KCache, lambda model: attach(model).__enter__()):
        with pytest.raises(UnsupportedModelError) as refused:
            use(model)
        assert isinstance(refused.value, KCacheError)
        assert "\n" not in str(refused.value)
    assert "kcache" not in str(model.config._attn_implementation)


def test_attach_refuses_encoders() -> None:
    shape = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    with pytest.raises(UnsupportedModelError), attach(transformers.BertModel(BertConfig(vocab_size=97, **shape))):
        pass


# -- what the probe sees ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["deepseek_v3", "diffllama"])
def test_layers_that_lose_the_cache_s_rows_stay_stock_and_attention_is_left_alone(kind: str) -> None:
    model = tiny(kind)
    found = probe(model)
    assert not found.tiered
    assert found.reasons
    with attach(model):
        assert model.config._attn_implementation == "sdpa"


def test_hybrid_layers_are_tiered_and_keep_their_state() -> None:
    model = tiny("zaya")
    cache = KCache(model, trial.EXACT)
    assert all(isinstance(layer, HybridTieredLayer) for layer in cache.layers)
    with attach(model), torch.no_grad():
        model(input_ids=torch.arange(8)[None], **holding(cache))
    states = cache.layers[0].conv_states
    assert any(state is not None and state.abs().sum() > 0 for state in states.values())
    assert cache.layers[0].keys.shape[2] == 8
    cache.reset()
    assert cache.get_seq_length() == 0
    assert all(state is None or not state.any() for state in states.values())


def test_a_mask_that_is_made_of_v_keeps_its_layers_stock() -> None:
    assert not probe(tiny("doge")).tiered


def test_chunked_attention_in_the_middle_of_a_chunk() -> None:
    """A full window of rows may lie in two chunks, and then needs its mask."""
    assert trial.compare(tiny("llama4_text")).exact

"""Fidelity at a place of a text equals what stepping token by token and transformers' own forward say."""

from __future__ import annotations

import math
import statistics
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from kcache import KCache, Policy, attach
from kcache.decoding.forward import prefill, step_logits
from kcache.errors import ContextLengthError, InputError
from kcache.evaluate.fidelity import Case, measure
from kcache.evaluate.figures import Figures, summary
from kcache.evaluate.haystack import Prose
from kcache.evaluate.places import find_places
from kcache.evaluate.sweep import Spec, make_row, run, turns_of
from kcache.models.loaded import LoadedModel
from tests.bench.machines import tiny
from tests.tiny_models import make

CTX, STEPS = 50, 70
POLICY = Policy(topn=4, spread="even", dense_layers=1, dense_below=0, tail="renormalise", offload="all")
PROSE = Prose("numbers", " ".join(f"{number} is more than {number - 1}." for number in range(400)))


@pytest.fixture(scope="module")
def lm() -> LoadedModel:
    return tiny()


def figures_of(lm: LoadedModel, policy: Policy, ctx: int = CTX, steps: int = STEPS) -> Figures:
    (place,) = find_places(lm, PROSE, ctx, steps, 1)
    ((_, figures),) = measure(lm, place, steps, [Case("it", policy)])
    return figures


@torch.no_grad()
@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("llama", POLICY),
        ("llama", POLICY.replace(spread="need")),
        ("gemma3", POLICY.replace(dense_layers=0, topn=2)),
    ],
)
def test_figures_are_those_of_single_steps(kind: str, policy: Policy) -> None:
    lm = tiny(kind)
    (place,) = find_places(lm, PROSE, CTX, STEPS, 1)
    full = lm.model(place.ids[:, :-1]).logits[0, CTX:].log_softmax(-1)
    cache, got, mass = KCache(lm.model, policy, max_length=CTX + STEPS), [], []
    with attach(lm.model):
        for _ in prefill(lm.model, cache, place.ids[:, :CTX], None):
            pass
        before = cache.stats
        for token in place.ids[:, CTX:-1].split(1, 1):
            got.append(step_logits(lm.model, cache, token)[0].log_softmax(-1))
            mass += [float(layer.mass.mean()) for layer in cache.tiered_layers if layer.mass is not None]
    after, steps = cache.stats, torch.stack(got)
    targets = place.ids[0, CTX + 1 :, None]
    kl = (full.exp() * (full - steps)).sum(-1)

    figures = figures_of(lm, policy)
    assert figures.kl == pytest.approx(kl.tolist(), abs=1e-5, rel=2e-3)
    assert figures.nll_full == pytest.approx(float(-full.gather(1, targets).mean()), rel=1e-4)
    assert figures.nll == pytest.approx(float(-steps.gather(1, targets).mean()), rel=1e-4)
    assert figures.top1 == pytest.approx(float((full.argmax(-1) == steps.argmax(-1)).float().mean()))
    assert figures.mass == pytest.approx(statistics.fmean(mass), rel=1e-4)
    assert figures.bytes_h2d_per_token == (after.bytes_h2d - before.bytes_h2d) / STEPS
    fetched = after.rows_fetched - before.rows_fetched
    assert figures.rows_per_kv_head == pytest.approx(
        fetched / STEPS / sum(layer.offloaded for layer in cache.tiered_layers) / 2
    )
    tiered = [layer.stats() for layer in cache.tiered_layers]
    held = sum(stats.resident_v_bytes + stats.overhead_bytes for stats in tiered)
    assert figures.device_overhead == pytest.approx(held / sum(stats.full_kv_bytes for stats in tiered))
    assert statistics.fmean(figures.kl) > 2e-4  # there is something to measure


def test_rows_and_bytes_are_those_of_the_policy(lm: LoadedModel) -> None:
    row_bytes, heads, layers = 8 * 4, 2, 2
    group = figures_of(lm, POLICY)
    assert group.bytes_h2d_per_token == layers * heads * POLICY.topn * row_bytes
    head = figures_of(lm, POLICY.replace(select="head"))
    assert head.rows_per_kv_head == 2 * POLICY.topn
    assert head.bytes_h2d_per_token == 2 * group.bytes_h2d_per_token


def test_with_every_row_nothing_is_lost(lm: LoadedModel) -> None:
    figures = figures_of(lm, POLICY.replace(topn=1000))
    assert max(map(abs, figures.kl)) < 1e-4
    assert figures.top1 == 1.0 and figures.mass == pytest.approx(1.0)
    assert figures.nll == pytest.approx(figures.nll_full, abs=1e-4)
    assert max(figures.layer_error) < 1e-4


def test_where_nothing_is_offloaded_nothing_is_picked(lm: LoadedModel) -> None:
    figures = figures_of(lm, POLICY.replace(dense_below=1000))
    assert figures.mass is None and figures.rows_per_kv_head == 0 and figures.bytes_h2d_per_token == 0
    assert figures.layer_error == [0.0] * 3
    assert figures.device_overhead == pytest.approx(0.5)


def test_more_rows_lose_less_and_the_tail_helps(lm: LoadedModel) -> None:
    kl = [statistics.fmean(figures_of(lm, POLICY.replace(topn=topn)).kl) for topn in (2, 8, 32)]
    assert kl[0] > kl[1] > kl[2]


@torch.no_grad()
def test_layer_error_is_of_attention_on_the_same_inputs(lm: LoadedModel) -> None:
    """The first tiered layer gets the same inputs with either attention, so its outputs can be compared directly."""
    (place,) = find_places(lm, PROSE, CTX, STEPS, 1)
    outs: list[torch.Tensor] = []
    hook = lm.model.model.layers[1].self_attn.o_proj.register_forward_pre_hook(
        lambda module, inputs: outs.append(inputs[0])
    )
    try:
        lm.model(place.ids[:, :-1])
        exact = outs.pop()[0, CTX:]
        cache = KCache(lm.model, POLICY, max_length=CTX + STEPS)
        with attach(lm.model):
            for _ in prefill(lm.model, cache, place.ids[:, :CTX], None):
                pass
            outs.clear()
            for token in place.ids[:, CTX:-1].split(1, 1):
                step_logits(lm.model, cache, token)
    finally:
        hook.remove()
    errors = (torch.cat(outs)[:, 0] - exact).norm(dim=-1) / exact.norm(dim=-1)
    figures = figures_of(lm, POLICY)
    assert figures.layer_error[0] == 0.0
    assert figures.layer_error[1] == pytest.approx(float(errors[::8].mean()), rel=1e-3)
    assert figures.layer_error[1] > 0.01


# -- places --------------------------------------------------------------------------------------------------------


def test_places_are_spread_and_do_not_overlap(lm: LoadedModel) -> None:
    places = find_places(lm, PROSE, CTX, STEPS, 5)
    need = CTX + STEPS + 1
    starts = [place.start for place in places]
    ids = lm.tokenizer(PROSE.text)["input_ids"]
    assert starts[0] == 0 and starts[-1] == len(ids) - need
    gaps = [after - before for before, after in pairwise(starts)]
    assert min(gaps) >= need and max(gaps) - min(gaps) <= 1
    assert all(place.ids[0].tolist() == ids[place.start : place.start + need] for place in places)
    assert [place.start for place in find_places(lm, PROSE, CTX, STEPS, 1)] == [0]


def test_a_begin_token_begins_every_place() -> None:
    lm = tiny()
    lm.tokenizer.add_special_tokens({"bos_token": "<|user|>"})
    lm.tokenizer._tokenizer.post_processor = _with_first("<|user|>", lm.tokenizer.bos_token_id)
    first, last = find_places(lm, PROSE, CTX, STEPS, 2)
    for place in (first, last):
        assert place.ids.shape == (1, CTX + STEPS + 1)
        assert place.ids[0, 0] == lm.tokenizer.bos_token_id


def _with_first(token: str, number: int) -> object:
    from tokenizers.processors import TemplateProcessing

    return TemplateProcessing(single=f"{token} $A", special_tokens=[(token, number)])


def test_a_text_that_is_too_short(lm: LoadedModel) -> None:
    with pytest.raises(InputError, match=r"short has 10 tokens, and 2 places of 14 tokens need 28; give a longer"):
        find_places(lm, Prose("short", "0123456789"), 10, 3, 2)


def test_more_than_the_models_context() -> None:
    with pytest.raises(ContextLengthError, match="100 tokens of context and 29 steps are longer than the context"):
        find_places(tiny(max_position_embeddings=128), PROSE, 100, 29, 1)


# -- sums and sweeps -----------------------------------------------------------------------------------------------

AT = Figures(0, 2.0, 2.2, [0.1, 0.3], 1.0, 0.8, 4.0, 256.0, 0.06, [0.0, 0.2])


def test_summary_over_places() -> None:
    other = replace(AT, start=9, nll_full=4.0, nll=4.0, kl=[0.3, 0.9], top1=0.5, mass=0.6, layer_error=[0.0, 0.4])
    found = summary([AT, other])
    assert found["ppl_full"] == pytest.approx(math.exp(3.0)) and found["ppl_kcache"] == pytest.approx(math.exp(3.1))
    assert found["kl_mean"] == pytest.approx(0.4)
    assert found["kl_se"] == pytest.approx(statistics.stdev([0.2, 0.6]) / math.sqrt(2))
    assert 0.85 < found["kl_p99"] < 0.9
    assert found["top1"] == 0.75 and found["mass"] == pytest.approx(0.7)
    assert found["per_layer_error"] == pytest.approx([0.0, 0.3])
    assert summary([AT])["kl_se"] is None
    assert summary([replace(AT, mass=None)])["mass"] is None


def test_figures_survive_being_written() -> None:
    assert Figures.from_dict(AT.to_dict()) == AT
    with pytest.raises(InputError, match="not the figures of a place"):
        Figures.from_dict({"start": 0})


def test_a_sweep_measures_what_is_not_known_and_prefills_a_place_once(lm: LoadedModel) -> None:
    few, many = Case("few", POLICY), Case("many", POLICY.replace(topn=16))
    spec = Spec((few, many, few), ctx=30, steps=5, places=3)
    assert spec.cases == (few, many)
    places = find_places(lm, PROSE, spec.ctx, spec.steps, spec.places)
    said: list[str] = []
    everything = [*run(lm, spec, places, {}, said.append)]
    assert [(case, figures.start) for case, figures in everything] == [
        (case, place.start) for place in places for case in (few, many)
    ]
    assert len(said) == turns_of(spec, places, {}) == 12
    assert said[:4] == [f"place 1/3 · {what}" for what in ("prefill", "full attention", "few N=4", "many N=16")]
    known = {few: [everything[0][1], everything[2][1]], many: [everything[1][1]]}
    rest = [*run(lm, spec, places, known)]
    assert rest == everything[3:4] + everything[4:]
    assert turns_of(spec, places, known) == 3 + 4
    row = make_row(lm, spec, PROSE, few, places, known[few])
    assert (row["places"], row["starts"]) == (2, [place.start for place in places])
    assert row["topn"] == 4 and row["policy"] == POLICY.replace(k_bits=16).to_dict() and "kl_mean" in row


@pytest.mark.parametrize("wrong", [{"ctx": 0}, {"steps": 0}, {"places": 0}])
def test_a_spec_checks_itself(wrong: dict[str, int]) -> None:
    with pytest.raises(InputError, match="must be at least 1"):
        Spec((Case("it", POLICY),), **wrong)


def test_another_dtype() -> None:
    model = make("llama", dtype=torch.bfloat16, vocab_size=len(tiny().tokenizer))
    lm = LoadedModel("tiny", model, tiny().tokenizer)
    figures = figures_of(lm, POLICY, steps=9)
    assert len(figures.kl) == 9 and all(math.isfinite(kl) for kl in figures.kl)
    assert figures.bytes_h2d_per_token == 2 * 2 * POLICY.topn * 8 * 2

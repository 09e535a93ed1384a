"""Whole runs on tiny models: rows, ratios, what fails, and that the loop timed is generation's own."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kcache.bench.run as run_module
import kcache.bench.runner as runner_module
from kcache import generation
from kcache.attention.switching import is_attached
from kcache.bench.cases import Case, make_cases
from kcache.bench.engines import Engine, HfDynamic, Tiered, make_engine
from kcache.bench.rows import Row
from kcache.bench.run import run, turns_of
from kcache.bench.runner import VariedSampler
from kcache.bench.spec import Spec
from kcache.cache import KCache
from kcache.decoding import loop as decoding
from kcache.errors import UnsupportedModelError
from kcache.models.loaded import LoadedModel
from kcache.policy import Policy
from tests.bench.machines import machine, tiny

POLICY = Policy(spread="even", dense_below=0, dense_layers=1, offload="all")
SPEC = Spec(ctxs=(40,), batches=(2,), topns=(4, 8), policy=POLICY, repeats=2, steps=2, warmup=1)
ALL = ("kcache", "dense", "hf-dynamic", "hf-static", "hf-offloaded")


@pytest.fixture(scope="module")
def lm() -> LoadedModel:
    return tiny()


def rows_of(lm: LoadedModel, spec: Spec, cases: list[Case] | None = None) -> list[Row]:
    chosen = make_cases(spec) if cases is None else cases
    return [row for rows in run(lm, spec, chosen, machine(), {"here": 1}) for row in rows]


def test_a_row_for_everyone(lm: LoadedModel) -> None:
    rows = rows_of(lm, replace(SPEC, engines=ALL))
    names = [(row.engine, row.topn) for row in rows]
    assert names == [("kcache", 4), ("kcache", 8), *[(name, None) for name in ALL[1:]]]
    *timed, offloaded = rows
    assert offloaded.status == "unavailable" and "no CUDA" in str(offloaded.reason)
    for row in timed:
        assert row.status == "ok" and row.reason is None
        assert row.decode_ms_p50 and row.decode_ms_p99 and row.decode_ms_low and row.decode_ms_high
        assert row.decode_ms_low <= row.decode_ms_high and row.decode_ms_p50 <= row.decode_ms_p99
        assert row.decode_tok_s == pytest.approx(2 * 1e3 / row.decode_ms_p50)
        assert row.floor_multiple and row.floor_ms and row.device_kv_bytes
        assert row.floor_multiple == pytest.approx(row.decode_ms_p50 / row.floor_ms)
        assert row.ttft_ms is None and row.prefill_tok_s is None
        assert row.ratio_to == "hf-dynamic" and row.ratio
        assert row.env == {"here": 1}
    base = next(row for row in timed if row.engine == "hf-dynamic")
    assert base.ratio == 1.0
    assert timed[0].ratio_low <= timed[0].ratio <= timed[0].ratio_high


def test_kcache_rows_count_what_the_cache_counts(lm: LoadedModel) -> None:
    first, second, dense = rows_of(lm, replace(SPEC, engines=("kcache", "dense")))
    assert first.mode == second.mode == "topn" and dense.mode == "dense"
    assert first.ratio_to == "dense"
    rows, layers, heads, dim, itemsize = 4, 2, 2, 8, 4
    assert first.link_bytes_per_token == rows * layers * heads * dim * itemsize
    assert second.link_bytes_per_token == 2 * first.link_bytes_per_token
    assert first.hit_rate == 0.0 and dense.hit_rate is None
    assert first.host_kv_bytes and dense.host_kv_bytes == 0
    assert first.device_kv_bytes is not None and dense.device_kv_bytes is not None
    assert first.device_kv_bytes < dense.device_kv_bytes
    assert first.policy is not None and first.policy["topn"] == 4


def test_alone_there_is_no_ratio(lm: LoadedModel) -> None:
    (row,) = rows_of(lm, replace(SPEC, engines=("kcache",), topns=(4,)))
    assert row.ratio is None and row.ratio_to is None and row.decode_ms_p50


def test_a_context_too_short_for_topn_says_so(lm: LoadedModel) -> None:
    (row,) = rows_of(lm, replace(SPEC, engines=("kcache",), topns=(4,), policy=Policy(offload="all")))
    assert row.mode == "dense" and row.link_bytes_per_token == 0


def test_real_prefill_gives_prefill_figures(lm: LoadedModel) -> None:
    for row in rows_of(lm, replace(SPEC, engines=("kcache", "dense", "hf-static"), real_prefill=True)):
        assert row.context_from == "text"
        assert row.ttft_ms and row.prefill_tok_s == pytest.approx(2 * 40 * 1e3 / row.ttft_ms)


def test_fidelity_is_of_topn_and_exact_where_everything_is_picked(lm: LoadedModel) -> None:
    spec = replace(SPEC, engines=("kcache", "hf-static"), topns=(2, 4096), fidelity=True)
    few, every, static = rows_of(lm, spec)
    assert few.kl is not None and every.kl is not None and static.kl is None
    assert few.kl > 10 * abs(every.kl) and abs(every.kl) < 1e-4
    assert every.top1 == 1.0 and few.top1 is not None and few.top1 < 1.0


def test_beyond_the_models_context_only_the_speed_counts() -> None:
    lm = tiny(max_position_embeddings=32)
    rows = rows_of(lm, replace(SPEC, engines=("kcache",), topns=(4,), fidelity=True, ctxs=(16, 40)))
    assert [(row.ctx, row.speed_only, row.kl is None) for row in rows] == [(16, False, False), (40, True, True)]


def test_predictions_stand_beside_measurements(lm: LoadedModel) -> None:
    rows = rows_of(lm, replace(SPEC, engines=ALL, check_plan=True))
    ours = [row for row in rows if row.engine in ("kcache", "dense")]
    assert [row for row in rows if row.predicted_tok_s is not None] == ours
    for row in ours:
        assert row.predicted_tok_s and row.decode_tok_s and row.prediction_error is not None
        assert row.prediction_error == pytest.approx(row.predicted_tok_s / row.decode_tok_s - 1)


@pytest.mark.parametrize("kind", ["gemma3", "gpt2", "mqa"])
def test_other_shapes(kind: str) -> None:
    for row in rows_of(tiny(kind), replace(SPEC, engines=("kcache", "dense", "hf-dynamic", "hf-static"))):
        assert row.status == "ok", row.reason


# -- what fails ----------------------------------------------------------------------------------------------------


class Failing(HfDynamic):
    """Fails at the context the test says, with the error it says."""

    name = "failing"

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def make(self, model: Any, room: int) -> Any:
        raise self.error


def with_failing(error: BaseException) -> list[Case]:
    (case,) = make_cases(replace(SPEC, engines=("kcache", "hf-static"), topns=(4,)))
    return [replace(case, engines=(case.engines[0], Failing(error), case.engines[1]))]


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "does not fit"),
        (MemoryError(), "does not fit"),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes"), "does not fit"),
        (ValueError("no\nsuch shape"), "failed"),
        (AttributeError("what nobody foresaw"), "failed"),
    ],
)
def test_a_failure_is_a_row(lm: LoadedModel, error: BaseException, status: str) -> None:
    ours, failed, static = rows_of(lm, SPEC, with_failing(error))
    assert (failed.status, failed.decode_ms_p50, failed.ratio) == (status, None, None)
    assert failed.reason and "\n" not in failed.reason
    assert ours.status == static.status == "ok"
    assert ours.ratio_to == "hf-static"
    assert not is_attached(lm.model)


def test_what_cannot_fit_is_not_tried(lm: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module._Race, "_free", lambda self: (1000, 1000))
    rows = rows_of(lm, replace(SPEC, engines=ALL[:4]))
    assert {row.status for row in rows} == {"does not fit"}
    assert "are free" in str(rows[0].reason)


def test_a_context_that_a_model_has_no_positions_for() -> None:
    lm = tiny("gpt2")
    assert lm.context_length is not None
    (row,) = rows_of(lm, replace(SPEC, ctxs=(lm.context_length,), engines=("hf-dynamic",)))
    assert row.status == "too long" and f"has {lm.context_length:,} positions" in str(row.reason)


def test_caches_that_do_not_fit_together_are_made_anew_each_turn(
    lm: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[int] = []
    made: list[str] = []
    make = Tiered.make

    def counted(self: Tiered, model: Any, room: int) -> Any:
        made.append(self.name)
        return make(self, model, room)

    monkeypatch.setattr(Tiered, "make", counted)
    monkeypatch.setattr(run_module._Race, "_fit_together", lambda self: False)
    turn = runner_module.Runner.turn

    def watched(self: Any) -> None:
        alive.append(self.alive)
        turn(self)

    monkeypatch.setattr(runner_module.Runner, "turn", watched)
    rows = rows_of(lm, replace(SPEC, engines=("kcache", "dense"), topns=(4,)))
    assert made == ["kcache", "dense", "dense", "kcache"]
    assert all(row.status == "ok" for row in rows) and all(alive)


def test_running_out_side_by_side_is_tried_again_one_by_one(lm: LoadedModel) -> None:
    class Hungry(HfDynamic):
        name = "hungry"
        calls = 0

        def make(self, model: Any, room: int) -> Any:
            Hungry.calls += 1
            if Hungry.calls == 1:
                raise MemoryError("side by side is too much")
            return super().make(model, room)

    (case,) = make_cases(replace(SPEC, engines=("kcache",), topns=(4,)))
    rows = rows_of(lm, SPEC, [replace(case, engines=(*case.engines, Hungry()))])
    assert [row.status for row in rows] == ["ok", "ok"]


def test_a_cache_that_is_not_rows_is_refused() -> None:
    from transformers import AutoModelForCausalLM, Qwen3NextConfig

    config = Qwen3NextConfig(
        vocab_size=261, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UnsupportedModelError, match="no K and V rows"):
        rows_of(LoadedModel("hybrid", model, tiny().tokenizer), SPEC)


# -- the loop ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kcache", "dense", "hf-dynamic", "hf-static"])
@pytest.mark.parametrize("real_prefill", [False, True])
def test_what_is_timed_is_the_loop_of_generation(
    lm: LoadedModel, monkeypatch: pytest.MonkeyPatch, name: str, real_prefill: bool
) -> None:
    """Every forward of an engine's turns goes through the function that chat and generate decode with."""
    assert runner_module.decode is generation.decode is decoding.decode
    seen: list[tuple[str, int]] = []
    step = decoding.step_logits

    def counted(model: Any, cache: Any, ids: torch.Tensor, mask: Any = None) -> torch.Tensor:
        if ids.shape[1] == 1:
            seen.append((type(cache).__name__, int(cache.get_seq_length())))
        return step(model, cache, ids, mask)

    monkeypatch.setattr(decoding, "step_logits", counted)
    spec = replace(SPEC, engines=(name,), topns=(4,), real_prefill=real_prefill)
    (row,) = rows_of(lm, spec)
    assert row.status == "ok"
    start = 40 if real_prefill else 41
    lengths = [length for _, length in seen]
    assert lengths == list(range(start, start + len(lengths)))
    assert len(lengths) == spec.warmup + real_prefill + spec.repeats * (spec.warmup + spec.steps)
    kinds = {"kcache": "KCache", "dense": "KCache", "hf-dynamic": "DynamicCache", "hf-static": "StaticCache"}
    assert {kind for kind, _ in seen} == {kinds[name]}


def test_chat_and_generate_run_that_loop(lm: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    decode = generation.decode

    def counted(*values: Any, **named: Any) -> Iterator[list[int]]:
        used.append(values[1])
        return decode(*values, **named)

    monkeypatch.setattr(generation, "decode", counted)
    list(generation.generate(lm, ["hello"], max_new_tokens=2))
    assert len(used) == 1 and isinstance(used[0], KCache)


def test_the_time_of_a_step_is_in_the_figures(lm: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    step = decoding.step_logits

    def timed(model: Any, cache: Any, ids: torch.Tensor, mask: Any = None) -> torch.Tensor:
        nonlocal now
        now += 0.01 if isinstance(cache, KCache) else 0.05
        return step(model, cache, ids, mask)

    monkeypatch.setattr(decoding, "step_logits", timed)
    monkeypatch.setattr(runner_module, "time", SimpleNamespace(perf_counter=lambda: now))
    ours, theirs = rows_of(lm, replace(SPEC, engines=("kcache", "hf-dynamic"), topns=(4,)))
    assert theirs.decode_ms_p50 == pytest.approx(50)
    assert ours.decode_ms_p50 == pytest.approx(10)
    assert ours.ratio == pytest.approx(5)


def test_the_step_that_ran_while_counters_were_read_is_not_timed(
    lm: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the read of the counters and the first tick of the clock there is one whole step."""
    events: list[str] = []
    stats, forward = Tiered.stats, decoding.decode

    def counted(self: Tiered, cache: Any) -> Any:
        events.append("stats")
        return stats(self, cache)

    def stepping(*args: Any) -> Iterator[list[int]]:
        for tokens in forward(*args):
            events.append("step")
            yield tokens

    monkeypatch.setattr(Tiered, "stats", counted)
    monkeypatch.setattr(runner_module, "decode", stepping)
    monkeypatch.setattr(
        runner_module, "time", SimpleNamespace(perf_counter=lambda: events.append("clock") or time.perf_counter())
    )
    (row,) = rows_of(lm, replace(SPEC, engines=("dense",), repeats=1))
    turn = events[events.index("stats") :]
    assert turn[:4] == ["stats", "step", "clock", "step"]
    assert row.steps_timed == SPEC.steps


def test_a_long_turn_ends_early(lm: LoadedModel) -> None:
    (row,) = rows_of(lm, replace(SPEC, engines=("dense",), steps=50, turn_s=0.0))
    assert row.steps_timed == SPEC.repeats * 4
    (row,) = rows_of(lm, replace(SPEC, engines=("dense",), steps=6))
    assert row.steps_timed == SPEC.repeats * 6


def test_a_long_case_ends_after_two_rounds(lm: LoadedModel) -> None:
    rows = rows_of(lm, replace(SPEC, engines=("dense", "hf-static"), repeats=5, case_s=0.0))
    assert [(row.repeats, row.turns) for row in rows] == [(5, 2), (5, 2)]
    assert all(row.ratio for row in rows)


def test_engines_take_turns_and_the_order_moves_on(lm: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    turn = runner_module.Runner.turn

    def noted(self: Any) -> None:
        order.append(self.engine.name)
        turn(self)

    monkeypatch.setattr(runner_module.Runner, "turn", noted)
    ended: list[int] = []
    spec = replace(SPEC, engines=("kcache", "dense", "hf-static"), topns=(4,))
    (case,) = make_cases(spec)
    list(run(lm, spec, [case], machine(), watch=lambda label, turns: ended.append(turns)))
    assert order == ["kcache", "dense", "hf-static", "dense", "hf-static", "kcache"]
    assert sum(ended) == turns_of(case, spec) == 6


def test_the_model_is_attached_only_for_our_engines(lm: LoadedModel) -> None:
    for name, attached in (("kcache", True), ("dense", True), ("hf-static", False)):
        engine: Engine = make_engine(name, POLICY)
        with engine.running(lm.model):
            assert is_attached(lm.model) is attached


def test_varied_sampling_never_settles(lm: LoadedModel) -> None:
    sampler = VariedSampler(torch.device("cpu"), 50)
    logits = torch.zeros(2, 50)
    picks = [tuple(sampler.pick(logits, logits).tolist()) for _ in range(20)]
    assert len(set(picks)) > 10
    again = VariedSampler(torch.device("cpu"), 50)
    assert [tuple(again.pick(logits, logits).tolist()) for _ in range(20)] == picks

"""What others do to a cache between the steps of a run: each caller gets the logits of a run without recordings."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from transformers import PreTrainedModel

from kcache.attaching import attach
from kcache.cache import KCache
from kcache.decoding.forward import prefill, step_logits
from kcache.decoding.loop import decode, graph_of
from kcache.layers.spread import spread_of
from kcache.policy import Policy
from tests.graph.recorder import RecordedTape
from tests.graph.samplers import Forced
from tests.tiny_models import make, tokens

POLICY = Policy(
    topn=6, dense_below=0, dense_layers=0, resident_layers=0, offload="all", backend="triton", spread="need",
    hot_rows=0,
)  # fmt: skip
SMALL = {"head_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
Run = Iterator[list[int]]


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make("llama", **SMALL)


@pytest.fixture(autouse=True)
def attached(llama: PreTrainedModel) -> Iterator[None]:
    with attach(llama):
        yield


def filled(model: PreTrainedModel, taped: bool, batch: int = 1) -> tuple[KCache, torch.Tensor]:
    """A cache that holds a prompt, and the logits after it."""
    cache = KCache(model, POLICY, max_length=60)
    cache.shared.make_tape = RecordedTape if taped else None
    *_, (logits, _) = prefill(model, cache, tokens(1, batch, 20), None)
    return cache, logits


def begun(model: PreTrainedModel, cache: KCache, logits: torch.Tensor, seed: int = 7) -> tuple[Run, Forced]:
    sampler = Forced(tokens(seed, 12, len(logits)))
    return decode(model, cache, logits, sampler, tokens(1, len(logits), 1)), sampler


def both(model: PreTrainedModel, change: Callable[[KCache], object], batch: int) -> None:
    """The same run with and without recordings, changed after the same token, while a step is under way."""
    seen = []
    for taped in (False, True):
        cache, logits = filled(model, taped, batch)
        run, sampler = begun(model, cache, logits)
        for _ in range(7):
            next(run)
        if taped:
            graph = graph_of(cache)
            assert graph is not None
            assert graph.ahead
        change(cache)
        for _ in range(4):
            next(run)
        run.close()  # type: ignore[attr-defined]
        seen.append((sampler.seen, cache.stats))
    for got, want in zip(seen[1][0], seen[0][0], strict=True):
        torch.testing.assert_close(got, want, atol=2e-5 * float(want.abs().max()), rtol=0)
    assert seen[1][1] == seen[0][1]


@pytest.mark.parametrize(
    ("change", "batch"),
    [
        (lambda cache: cache.crop(-2), 1),
        (lambda cache: cache.reorder_cache(torch.tensor([1, 0])), 2),
        (lambda cache: step_logits(cache.shared.model(), cache, tokens(3, 1, 1)), 1),
    ],
    ids=["crop", "reorder", "forward"],
)
def test_triton_a_cache_that_is_changed_between_two_steps(
    llama: PreTrainedModel, change: Callable[[KCache], object], batch: int
) -> None:
    both(llama, change, batch)


def test_triton_a_cache_that_is_emptied_between_two_steps(llama: PreTrainedModel) -> None:
    cache, logits = filled(llama, taped=True)
    run, _ = begun(llama, cache, logits)
    for _ in range(7):
        next(run)
    cache.reset()
    next(run)
    assert cache.get_seq_length() == 1
    run.close()  # type: ignore[attr-defined]
    assert cache.stats.steps == 1


def test_triton_two_runs_of_one_cache(llama: PreTrainedModel) -> None:
    """Both go on; what one leaves or closes is none of the other's."""
    seen = []
    for taped in (False, True):
        cache, logits = filled(llama, taped)
        (old, _), (new, sampler) = begun(llama, cache, logits), begun(llama, cache, logits, 8)
        for _ in range(5):
            next(old)
        for _ in range(3):
            next(new)
        next(old)
        for _ in range(3):
            next(new)
        old.close()  # type: ignore[attr-defined]
        for _ in range(2):
            next(new)
        assert cache.get_seq_length() == 32
        if taped:
            graph = graph_of(cache)
            assert graph is not None
            assert graph.reason is None
            assert graph.ahead
        seen.append(sampler.seen)
    for got, want in zip(seen[1], seen[0], strict=True):
        torch.testing.assert_close(got, want, atol=2e-5 * float(want.abs().max()), rtol=0)


def test_triton_a_recording_is_not_for_other_thresholds(llama: PreTrainedModel) -> None:
    """Buffers stay where they are, as the allocator may give the same blocks again; what follows the rows does not."""
    seen = []
    for taped in (False, True):
        cache, logits = filled(llama, taped)
        for turn in range(2):
            run, sampler = begun(llama, cache, logits, 7 + turn)
            for _ in range(7):
                next(run)
            run.close()  # type: ignore[attr-defined]
            seen.append((sampler.seen, cache.stats.rows_fetched))
            cache.shared.spread = spread_of(POLICY, cache.shared.ranks)
        if taped:
            graph = graph_of(cache)
            assert graph is not None
            assert graph.recorded == 2
    for (got, rows), (want, expected) in zip(seen[2:], seen[:2], strict=True):
        assert rows == expected
        for mine, theirs in zip(got, want, strict=True):
            torch.testing.assert_close(mine, theirs, atol=2e-5 * float(theirs.abs().max()), rtol=0)


@pytest.mark.parametrize(
    "change", [KCache.reset, lambda cache: cache.batch_repeat_interleave(2)], ids=["reset", "repeat"]
)
def test_triton_a_recording_goes_with_what_it_was_made_for(
    llama: PreTrainedModel, change: Callable[[KCache], object]
) -> None:
    cache, logits = filled(llama, taped=True)
    run, _ = begun(llama, cache, logits)
    for _ in range(6):
        next(run)
    run.close()  # type: ignore[attr-defined]
    graph = graph_of(cache)
    assert graph is not None
    assert graph._recording is not None
    change(cache)
    assert graph._recording is None


def test_triton_statistics_leave_out_the_step_under_way(llama: PreTrainedModel) -> None:
    """Whoever reads them between two steps, and each time the same."""
    runs = []
    for taped in (False, True):
        cache, logits = filled(llama, taped)
        run, _ = begun(llama, cache, logits)
        counted = []
        for _ in range(7):
            next(run)
            counted.append((cache.stats, cache.snapshot().stats))
        runs.append(counted)
    assert runs[1] == runs[0]


def test_triton_a_run_on_an_empty_cache_says_nothing_about_later_ones(llama: PreTrainedModel) -> None:
    cache = KCache(llama, POLICY, max_length=60)
    cache.shared.make_tape = RecordedTape
    run, _ = begun(llama, cache, torch.zeros(1, llama.config.vocab_size))
    for _ in range(9):
        next(run)
    run.close()  # type: ignore[attr-defined]
    graph = graph_of(cache)
    assert graph is not None
    assert graph.reason is None
    assert graph.recorded == 0
    *_, (logits, _) = prefill(llama, cache, tokens(1, 1, 20), None)
    run, _ = begun(llama, cache, logits)
    for _ in range(6):
        next(run)
    assert graph.replayed > 0

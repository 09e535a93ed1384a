"""What goes wrong in the middle: budgets before a layer leaves, refused memory, interrupted forwards, stale rows."""

from __future__ import annotations

import pytest
import torch

from kcache.attaching import attach
from kcache.cache import KCache
from kcache.errors import CacheStateError, DoesNotFitError
from kcache.policy import Policy
from kcache.tiers import values as values_module
from tests.pair import WHOLE, Pair, forward
from tests.tiny_models import holding, make, tokens


def test_young_v_takes_no_more_than_a_young_layer_can_hold() -> None:
    """A long context planned for, a short one held: V of layers that will leave is not allocated at full length."""
    model = make("llama")
    cache = KCache(model, Policy(dense_layers=1, dense_below=128, offload="all"), max_length=2048)
    with attach(model):
        forward(model, cache, tokens(1, 1, 20))
    rows = [layer._v.resident.capacity for layer in cache.tiered_layers]  # type: ignore[union-attr]
    assert rows == [2048, 127, 127]


@pytest.mark.parametrize("spare", [0, 40_000])
def test_the_budget_holds_at_every_length(spare: int) -> None:
    model = make("llama")
    probe = KCache(model, Policy(dense_layers=0, dense_below=0, offload="all"), max_length=512)
    with attach(model):
        forward(model, probe, tokens(1, 1, 10))
    budget = probe.stats.device_bytes + spare
    pair = Pair(model, Policy(topn=10_000, dense_layers=0, dense_below=256, kv_budget=budget), max_length=512)
    for size in (10, 90, 100, 1, 1, 100, 1):
        pair.forward(tokens(size, 1, size))
        assert pair.ours.stats.device_bytes <= budget


@pytest.mark.parametrize(("budget", "told"), [(0, "0 bytes"), (1, "1 byte")])
def test_a_budget_of_nothing_is_refused_as_any_that_is_too_small(budget: int, told: str) -> None:
    model = make("llama")
    with attach(model), pytest.raises(DoesNotFitError, match=rf"allowed: {told}\); no context would fit"):
        forward(model, KCache(model, Policy(kv_budget=budget)), tokens(1, 1, 10))


def test_refused_host_memory_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(make("llama"), WHOLE.replace(dense_below=40))
    pair.forward(tokens(1, 1, 30))

    def refuse(*_: object) -> None:
        raise DoesNotFitError("no")

    with monkeypatch.context() as patch:
        patch.setattr(values_module.RowBuffer, "reserve", refuse)
        with pytest.raises(DoesNotFitError):
            pair.ours.tiered_layers[0].spill()
    assert not pair.ours.tiered_layers[0].offloaded
    pair.decode(15)


def test_a_forward_that_ended_in_the_middle_is_noticed() -> None:
    model = make("llama")
    cache = KCache(model, WHOLE)
    stop = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with attach(model):
        with pytest.raises(KeyboardInterrupt):
            forward(model, cache, tokens(1, 1, 10))
        stop.remove()
        with pytest.raises(CacheStateError, match="middle"):
            forward(model, cache, tokens(2, 1, 1))
        cache.reset()
        assert forward(model, cache, tokens(1, 1, 10)).isfinite().all()


def test_rows_beyond_the_length_are_written_over() -> None:
    """An interrupt between storing V and counting it leaves V longer than K; the next update starts at K's length."""
    pair = Pair(make("llama"), WHOLE)
    pair.forward(tokens(1, 1, 37))
    for layer in pair.ours.tiered_layers:
        assert layer._v is not None
        layer._v.append(torch.full((1, 2, 3, 8), 7.0), layer.length, True)
    pair.decode(4)


def test_what_crop_removed_reaches_no_product() -> None:
    pair = Pair(make("llama", dtype=torch.bfloat16), Policy(offload="none"), max_length=1300, tolerance=0.05)
    pair.forward(tokens(1, 1, 1200))
    for layer in pair.ours.tiered_layers:
        assert layer._v is not None
        assert layer._v.resident is not None
        layer._v.resident.view(1200)[:, :, 1190:] = float("nan")
    pair.crop(10)
    pair.decode(2)


def fed_with_a_mask(extra: torch.Tensor, topn: int = 4) -> tuple[torch.Tensor, KCache]:
    """A step of two sequences, whose mask over 10 rows is ``extra``."""
    model = make("llama")
    cache = KCache(model, Policy(topn=topn, dense_below=0, dense_layers=0, offload="all"))
    with attach(model), torch.no_grad():
        forward(model, cache, tokens(1, 2, 9))
        return model(input_ids=tokens(2, 2, 1), attention_mask=extra, **holding(cache)).logits, cache


def test_an_additive_mask_that_says_yes_or_no_is_served_by_topn(recwarn: pytest.WarningsRecorder) -> None:
    allowed = torch.rand(2, 1, 1, 10, generator=torch.Generator().manual_seed(0)) < 0.7
    allowed[..., -1] = True
    want, _ = fed_with_a_mask(allowed)
    for nothing in (torch.finfo(torch.float32).min, float("-inf")):
        got, cache = fed_with_a_mask(torch.where(allowed, 0.0, nothing))
        torch.testing.assert_close(got, want)
        assert [layer.mode for layer in cache.snapshot().layers] == ["topn"] * 3
    assert not [warning for warning in recwarn if "TopN" in str(warning.message)]


@pytest.mark.parametrize("shape", [(2, 1, 1, 10), (2, 4, 1, 10)])
def test_a_mask_that_keeps_steps_from_topn_is_told(shape: tuple[int, ...]) -> None:
    with pytest.warns(UserWarning, match="differs among heads, or weighs rows"):
        got, cache = fed_with_a_mask(torch.linspace(-3, 3, 10).expand(shape))
    with pytest.warns(UserWarning, match="differs among heads, or weighs rows"):
        want, _ = fed_with_a_mask(torch.linspace(-3, 3, 10).expand(shape), topn=1000)
    torch.testing.assert_close(got, want)
    assert [layer.mode for layer in cache.snapshot().layers] == ["dense"] * 3


def test_a_mask_of_one_row_serves_a_batch() -> None:
    model = make("llama")
    cache = KCache(model, WHOLE)
    mask = torch.ones(8, 8, dtype=torch.bool).tril()[None, None]
    with attach(model), torch.no_grad():
        model(input_ids=tokens(1, 2, 8), attention_mask=mask, **holding(cache))
        cache.reorder_cache(torch.tensor([1, 0]))
        padded = torch.ones(2, 9, dtype=torch.long)
        assert forward(model, cache, tokens(2, 2, 1), padded).isfinite().all()


def test_only_decode_steps_are_counted_as_steps() -> None:
    model = make("llama")
    cache = KCache(model, WHOLE)
    with attach(model):
        with cache.exact():
            forward(model, cache, tokens(1, 1, 1))
        assert cache.stats.steps == 0
        for step in range(3):
            forward(model, cache, tokens(step, 1, 1))
    assert cache.stats.steps == 3

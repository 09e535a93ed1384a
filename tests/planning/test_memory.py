"""The plan made from a config agrees with the cache made from tensors, and what does not fit is refused in time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from kcache.attaching import attach
from kcache.cache import KCache
from kcache.errors import DoesNotFitError
from kcache.layers.residency import Residency
from kcache.machine.parallel import Ranks
from kcache.memory import batch_sizes, cache_bytes, check_fits
from kcache.planning.fitting import Fitter, Pools
from kcache.planning.need import ModelShape
from kcache.policy import Policy
from tests.pair import WHOLE, Pair, forward
from tests.tiny_models import config, make, tokens

ROW = 2 * 8 * 4  # bytes of one token's V (or K) of one layer of the tiny llama, one sequence
LAYERS = 3


def budget_for(length: int, batch: int, resident: int, policy: Policy) -> int:
    """The smallest budget under which ``resident`` layers of the tiny llama keep V on the device."""
    tail = 0
    if policy.tail == "lowrank":  # one direction of 8 dimensions; it and the base in fp32, two heads
        tail = ROW // 8 * length + 2 * 2 * 8 * 4
    return batch * (ROW * (LAYERS * length + resident * length) + (LAYERS - resident) * tail)


def filled(
    policy: Policy, length: int, *, batch: int = 2, max_length: int | None = None, kind: str = "llama"
) -> KCache:
    model = make(kind)
    cache = KCache(model, policy, max_length=max_length)
    with attach(model):
        forward(model, cache, tokens(1, batch, length))
    return cache


def give_ram(monkeypatch: pytest.MonkeyPatch, available: int) -> None:
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available, total=available))


# -- the plan from a config ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    "policy",
    [
        WHOLE,
        Policy(dense_below=0),
        Policy(dense_below=0, dense_layers=1, tail="renormalise"),
        Policy.paper(8, dense_below=0),
        Policy(dense_below=0, resident_layers=2, dense_layers=0),
        Policy(),
        Policy(offload="none"),
        Policy(offload="all", dense_below=0, dense_layers=0, tail_rank=3),
        Policy(dense_below=0, dense_layers=1, k_bits=8),
        Policy(dense_below=0, dense_layers=1, k_bits=8, v_bits=8, tail="none"),
        Policy(dense_below=0, dense_layers=1, k_bits="8+8"),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "mha", "mqa", "qwen3", "gpt2", "phi3"])
def test_plan_equals_the_cache(kind: str, policy: Policy, batch: int) -> None:
    need = cache_bytes(config(kind), 128, batch, policy, dtype_bytes=4)
    cache = filled(policy, 128, batch=batch, max_length=128, kind=kind)
    stats = cache.stats
    assert (need.k_bytes, need.resident_v_bytes) == (stats.k_bytes, stats.resident_v_bytes)
    assert (need.overhead_bytes, need.host_bytes) == (stats.overhead_bytes, stats.host_bytes)
    assert need.device_bytes == stats.device_bytes
    assert need.full_kv_bytes == stats.full_kv_bytes
    assert need.v_bytes == need.resident_v_bytes + need.host_bytes
    assert need.layers == LAYERS
    assert need.resident_layers == sum(not layer.offloaded for layer in cache.tiered_layers)


@pytest.mark.parametrize("kind", ["ministral", "gemma3"])
def test_plan_with_windows_is_right_to_a_row(kind: str) -> None:
    """A stock window keeps its size less one row; the plan may say one more."""
    need = cache_bytes(config(kind), 128, 2, WHOLE, dtype_bytes=4)
    stats = filled(WHOLE, 128, max_length=128, kind=kind).stats
    assert need.host_bytes == stats.host_bytes
    assert stats.device_bytes <= need.device_bytes <= stats.device_bytes + 2 * 2 * ROW


@pytest.mark.parametrize("resident", [0, 1, 2, 3])
def test_plan_and_cache_agree_on_the_budget(resident: int) -> None:
    policy = Policy(dense_below=0, dense_layers=0)
    for spare in (0, 1, 128 * 2 * ROW // 2):
        tight = policy.replace(kv_budget=budget_for(128, 2, resident, policy) + spare)
        need = cache_bytes(config("llama"), 128, 2, tight, dtype_bytes=4)
        cache = filled(tight, 128, max_length=128)
        assert need.resident_layers == resident
        assert [layer.offloaded for layer in cache.tiered_layers] == [False] * resident + [True] * (3 - resident)
        assert cache.stats.device_bytes == need.device_bytes <= tight.kv_budget


def test_explicit_budget_of_the_policy_goes_before_what_is_free() -> None:
    policy = Policy(dense_below=0, dense_layers=0, kv_budget=budget_for(128, 1, 1, Policy()))
    assert cache_bytes(config("llama"), 128, 1, policy, 4, budget=10**12).resident_layers == 1
    assert cache_bytes(config("llama"), 128, 1, policy.replace(kv_budget=None), 4, budget=10**12).resident_layers == 3


# -- refusing ------------------------------------------------------------------------------------------------------


def test_check_fits_names_what_would(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = WHOLE.replace(kv_budget=budget_for(1000, 1, 0, WHOLE))
    assert check_fits(config("llama"), 900, 1, policy, dtype_bytes=4).layers == LAYERS
    with pytest.raises(DoesNotFitError, match=r"2,000 tokens .* device memory .* about (9\d\d|1,000) tokens"):
        check_fits(config("llama"), 2000, 1, policy, dtype_bytes=4)
    with pytest.raises(DoesNotFitError, match="in a batch of 1"):
        check_fits(config("llama"), 900, 2, policy, dtype_bytes=4)
    give_ram(monkeypatch, 2**20)
    with pytest.raises(DoesNotFitError, match="host memory"):
        check_fits(config("llama"), 100_000, 1, WHOLE, dtype_bytes=4)
    with pytest.raises(DoesNotFitError, match="no context would fit"):
        check_fits(config("llama"), 1000, 1, WHOLE, weights_bytes=2**21, dtype_bytes=4)


@pytest.mark.parametrize(
    "policy", [WHOLE, Policy(), Policy(offload="none"), Policy(dense_below=0), Policy(tail="none", dense_below=0)]
)
@pytest.mark.parametrize("batch", [1, 2])
def test_what_is_said_to_fit_fits(policy: Policy, batch: int) -> None:
    """The number in the refusal can be used."""
    budget = 300_000
    policy = policy.replace(kv_budget=budget)
    with pytest.raises(DoesNotFitError) as refused:
        check_fits(config("llama"), 50_000, batch, policy, dtype_bytes=4)
    advised = int(str(refused.value).split("--ctx ")[1].rstrip(")"))
    assert advised > 0
    assert check_fits(config("llama"), advised, batch, policy, dtype_bytes=4).device_bytes <= budget
    with pytest.raises(DoesNotFitError):
        check_fits(config("llama"), advised + 100, batch, policy, dtype_bytes=4)


def test_batch_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    one = cache_bytes(config("llama"), 1000, 1, WHOLE, 4)
    whole = one.device_bytes + one.host_bytes
    options: dict[str, Any] = {"dtype_bytes": 4}
    for fits, want in ((1, 1), (2, 2), (5, 5), (16, 16), (400, 16)):
        give_ram(monkeypatch, 2 * whole * fits + 1000)
        assert batch_sizes(config("llama"), [1000], WHOLE, **options) == [want], "in half of the RAM"
        assert batch_sizes(config("llama"), [1000], WHOLE, most=3, **options) == [min(3, 2 * fits)], "in all of it"
    give_ram(monkeypatch, 16 * whole)
    short, long = batch_sizes(config("llama"), [500, 1000], WHOLE, **options)
    assert (short, long) == (15, 8), "of shorter prompts more at a time"
    give_ram(monkeypatch, 0)
    assert batch_sizes(config("llama"), [1000], WHOLE, **options) == [1]


def test_batch_sizes_on_a_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has free is used up to what is kept for everything else, and large batches are made of short prompts."""
    model, gib = config("llama", hidden_size=64, head_dim=64, num_attention_heads=8, num_key_value_heads=8), 2**30
    shape = ModelShape.of(model, 2)
    pools = Pools(8 * gib, 64 * gib)
    monkeypatch.setattr(Pools, "of", classmethod(lambda cls, *args: pools))
    ctxs = [500, 50_000, 100_000]
    found = batch_sizes(model, ctxs, WHOLE, "cuda", weights_bytes=gib)
    fitter = Fitter(shape, WHOLE, Pools(8 * gib, int(51.2 * gib)), gib)
    assert found[0] == 256
    for ctx, batch in zip(ctxs[1:], found[1:], strict=True):
        assert 1 < batch < 256
        assert fitter.fits(ctx, batch) and not fitter.fits(ctx, batch + 1)
    unknown = batch_sizes(model, ctxs, WHOLE, "cuda", weights_bytes=None)
    assert unknown[1] < found[1], "half, where weights may lie anywhere"


def test_cache_refuses_before_allocating_what_ram_cannot_hold(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make("llama")
    cache = KCache(model, WHOLE, max_length=10**7)
    give_ram(monkeypatch, 2**24)
    with attach(model), pytest.raises(DoesNotFitError, match=r"10,000,000 tokens .* host memory .* would fit"):
        forward(model, cache, tokens(1, 1, 10))
    assert cache.stats.device_bytes == cache.stats.host_bytes == 0


def test_cache_refuses_k_that_does_not_fit_the_budget() -> None:
    model = make("llama")
    cache = KCache(model, WHOLE.replace(kv_budget=budget_for(100, 1, 0, WHOLE)), max_length=200)
    with attach(model), pytest.raises(DoesNotFitError, match=r"200 tokens .* device memory"):
        forward(model, cache, tokens(1, 1, 10))
    dense = Policy(offload="none", kv_budget=budget_for(100, 1, 0, WHOLE))
    cache = KCache(model, dense, max_length=100)
    with attach(model), pytest.raises(DoesNotFitError, match="offload='auto'"):
        forward(model, cache, tokens(1, 1, 10))


# -- residency -----------------------------------------------------------------------------------------------------


def test_auto_on_a_host_only_machine_offloads_all_but_the_dense_layers() -> None:
    cache = filled(Policy(dense_below=0), 40)
    assert [layer.kind for layer in cache.snapshot().layers] == ["resident", "resident", "tiered"]
    assert [layer.offloaded for layer in cache.tiered_layers] == [False, False, True]


@pytest.mark.parametrize(
    ("policy", "resident"),
    [
        (Policy(dense_layers=0, resident_layers=1), 1),
        (Policy(dense_layers=2, resident_layers=1), 2),
        (Policy(dense_layers=0, resident_layers=99), 3),
        (Policy(dense_layers=99), 3),
        (Policy(dense_layers=0, offload="all"), 0),
        (Policy(dense_layers=1, offload="all", kv_budget="1GiB"), 1),
        (Policy(dense_layers=0, kv_budget="1GiB"), 3),
        (Policy(offload="none", kv_budget="1GiB"), 3),
    ],
)
def test_who_stays(policy: Policy, resident: int) -> None:
    cache = filled(policy.replace(dense_below=0), 40)
    assert [layer.offloaded for layer in cache.tiered_layers] == [False] * resident + [True] * (3 - resident)
    assert [layer.kind for layer in cache.snapshot().layers] == ["resident"] * resident + ["tiered"] * (3 - resident)


@pytest.mark.parametrize("max_length", [None, 60])
def test_layers_leave_from_the_last_as_the_cache_outgrows_its_budget(max_length: int | None) -> None:
    """Never wrong, never over the budget, and no layer comes back."""
    policy = WHOLE.replace(resident_layers=None)
    budget = budget_for(256, 2, 1, policy) + 2 * 4 * LAYERS * ROW
    pair = Pair(make("llama"), policy.replace(kv_budget=budget), max_length=max_length)
    pair.forward(tokens(1, 2, 50))
    counts = []
    for step in range(12):
        pair.forward(tokens(step, 2, 1))
        pair.forward(tokens(step, 2, 15))
        offloaded = [layer.offloaded for layer in pair.ours.tiered_layers]
        assert offloaded == sorted(offloaded), "first layers stay"
        counts.append(sum(offloaded))
        stats = pair.ours.stats
        assert stats.k_bytes + stats.resident_v_bytes <= budget
        kinds = [layer.kind for layer in pair.ours.snapshot().layers]
        assert kinds == ["tiered" if away else "resident" for away in offloaded]
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == 2


def test_a_cache_is_refused_only_when_it_no_longer_fits() -> None:
    """Growth ahead must not refuse the rows between half the budget and all of it."""
    policy = WHOLE.replace(kv_budget=budget_for(200, 1, 0, WHOLE), tail="none")
    pair = Pair(make("llama"), policy)
    pair.forward(tokens(1, 1, 70))
    pair.forward(tokens(1, 1, 60))
    for step in range(60):
        pair.forward(tokens(step, 1, 1))
    assert pair.length == 190
    assert pair.ours.stats.device_bytes <= policy.kv_budget
    with pytest.raises(DoesNotFitError):
        pair.forward(tokens(2, 1, 60))


def test_growth_takes_what_ram_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    pair = Pair(make("llama"), WHOLE.replace(tail="none"))
    pair.forward(tokens(1, 1, 64))
    give_ram(monkeypatch, 2 * ROW * LAYERS * 20)
    for step in range(20):
        pair.forward(tokens(step, 1, 1))
    assert pair.ours.stats.host_bytes <= ROW * LAYERS * 84
    with pytest.raises(DoesNotFitError, match="host memory"):
        pair.forward(tokens(1, 1, 50))


def test_a_wider_batch_is_planned_anew() -> None:
    """Beams multiply the rows; residency follows."""
    policy = Policy(dense_below=0, dense_layers=0, topn=10**6)
    policy = policy.replace(kv_budget=budget_for(64, 4, 0, policy) + 1000)
    pair = Pair(make("llama"), policy, max_length=64)
    pair.forward(tokens(1, 1, 30))
    assert not any(layer.offloaded for layer in pair.ours.tiered_layers)
    pair.repeat(4)
    pair.decode(3)
    assert all(layer.offloaded for layer in pair.ours.tiered_layers)
    assert pair.ours.stats.device_bytes <= policy.kv_budget


def test_reset_plans_anew() -> None:
    policy = WHOLE.replace(resident_layers=None, kv_budget=budget_for(64, 1, 2, WHOLE))
    pair = Pair(make("llama"), policy, max_length=64)
    for _ in range(2):
        pair.forward(tokens(1, 1, 60))
        pair.decode(2)
        assert [layer.offloaded for layer in pair.ours.tiered_layers] == [False, False, True]
        pair.reset()


def test_reset_forgets_how_long_the_cache_was() -> None:
    pair = Pair(make("llama"))
    pair.forward(tokens(1, 1, 300))
    pair.reset()
    pair.forward(tokens(1, 1, 10))
    assert pair.ours.stats.k_bytes == LAYERS * ROW * 64


def test_a_layer_that_left_is_not_called_resident_when_room_comes_back() -> None:
    policy = Policy(dense_below=0, dense_layers=0, topn=10**6)
    policy = policy.replace(kv_budget=budget_for(64, 4, 1, policy))
    pair = Pair(make("llama"), policy, max_length=64)
    pair.forward(tokens(1, 4, 30))
    pair.select(torch.tensor([2]))
    pair.decode(2)
    assert [layer.offloaded for layer in pair.ours.tiered_layers] == [False, True, True]
    assert [layer.kind for layer in pair.ours.snapshot().layers] == ["resident", "tiered", "tiered"]


def test_budget_as_text() -> None:
    assert Policy(kv_budget="1.5KiB").kv_budget == 1536
    with pytest.raises(DoesNotFitError):
        filled(WHOLE.replace(kv_budget="1KiB"), 40)


def test_half_precision_rows_are_half_the_bytes() -> None:
    model = make("llama", dtype=torch.bfloat16)
    cache = KCache(model, WHOLE, max_length=128)
    with attach(model):
        forward(model, cache, tokens(1, 2, 128))
    need = cache_bytes(model.config, 128, 2, WHOLE)
    assert need.host_bytes == cache.stats.host_bytes
    assert need.device_bytes == cache.stats.device_bytes


@dataclass(frozen=True)
class Beside(Ranks):
    """Ranks of which another one has so many bytes for a cache, and so many of these for V that may leave."""

    other: tuple[int, int] = (0, 0)

    def least(self, numbers: Sequence[int]) -> list[int]:
        assert len(numbers) in (1, 2)
        return list(map(min, numbers, self.other)) if len(numbers) == 2 else list(numbers)


def test_ranks_with_unequal_room_keep_v_of_the_same_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that has work for its memory keeps less V, and so do the others: all wait for each other in each step."""
    policy = Policy(dense_below=0, dense_layers=0)
    plenty, tight = (budget_for(64, 2, resident, policy) for resident in (2, 1))
    monkeypatch.setattr(Residency, "_budget", lambda self, place: plenty)
    monkeypatch.setattr(Residency, "_working", lambda self, place, rows, batch: 0)
    resident = []
    for other in ((plenty, plenty), (plenty, tight), (tight, tight)):
        model = make("llama")
        cache = KCache(model, policy, max_length=64)
        cache.shared.residency._ranks = Beside(size=2, other=other)
        with attach(model):
            forward(model, cache, tokens(1, 2, 8))
        resident.append(sum(not layer.offloaded for layer in cache.tiered_layers))
    assert resident == [2, 1, 1]

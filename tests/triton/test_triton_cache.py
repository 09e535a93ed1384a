"""The Triton kernels through a cache: thresholds that follow from step to step, as the reference's do."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kcache.attaching import attach
from kcache.backends.triton import HotRows
from kcache.cache import KCache
from kcache.planning.need import ModelShape
from kcache.planning.sizes import hot_bytes
from kcache.policy import Policy
from kcache.tiers.values import ValueStore
from tests.pair import forward
from tests.tiny_models import left_padding, make, tokens

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on CPU tensors only if interpreted")

POLICY = Policy(topn=4, dense_layers=0, dense_below=0, resident_layers=0)


@pytest.mark.parametrize(
    "policy",
    [
        POLICY,
        POLICY.replace(select="head", tail_rank=3),
        POLICY.replace(k_bits=8, v_bits=8),
        POLICY.replace(k_bits="8+8"),
    ],
    ids=["group", "head", "8 bits", "two planes"],
)
def test_triton_cache_decodes_as_the_reference(policy: Policy) -> None:
    model = make("llama", head_dim=16, num_hidden_layers=2)
    caches = [KCache(model, policy.replace(backend=backend)) for backend in ("triton", "reference")]
    mask = left_padding([58, 31])

    def step(ids: torch.Tensor) -> None:
        nonlocal mask
        if mask.shape[1] < caches[0].tiered_layers[0].length + ids.shape[1]:
            mask = torch.cat([mask, mask.new_ones(2, ids.shape[1])], 1)
        with attach(model):
            got, want = (forward(model, cache, ids, mask) for cache in caches)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        fetched = [[layer.rows_fetched for layer in cache.tiered_layers] for cache in caches]
        assert fetched[0] == fetched[1]

    step(tokens(1, 2, 58))
    for number in range(2):
        step(tokens(2 + number, 2, 1))
    for cache in caches:
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 0]))
    mask = mask[[1, 0], :-1]
    for number in range(2):
        step(tokens(5 + number, 2, 1))
    spreads = [cache.shared.spread for cache in caches]
    assert spreads[0] is not None and spreads[1] is not None
    torch.testing.assert_close(spreads[0].begin(0, 2, 2, mask.device)[0], spreads[1].begin(0, 2, 2, mask.device)[0])
    assert caches[0].stats.rows_fetched > 0
    assert caches[0].shared.backend(mask.device)._workspaces, "the reference answered instead"


def test_triton_cache_with_hot_rows_answers_as_without() -> None:
    """Through crops to positions that come to mean others, and sequences that change places."""
    model = make("llama", head_dim=16, num_hidden_layers=1)
    policy = POLICY.replace(backend="triton")
    hot, cold = KCache(model, policy.replace(hot_rows=16)), KCache(model, policy.replace(hot_rows=0))
    mask = left_padding([50, 31])

    def decode(seed: int, count: int) -> None:
        nonlocal mask
        for step in range(count):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            ids = tokens(seed + step, 2, 1)
            got, want = (forward(model, cache, ids, mask) for cache in (hot, cold))
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)

    with attach(model):
        for cache in (hot, cold):
            forward(model, cache, tokens(1, 2, 50), mask)
        decode(2, 4)
        hits = hot.stats.hot_hits
        assert hits > 0
        for cache in (hot, cold):
            cache.crop(-3)
        mask = mask[:, :-3]
        decode(20, 3)
        for cache in (hot, cold):
            cache.reorder_cache(torch.tensor([1, 0]))
        mask = mask[[1, 0]]
        decode(30, 2)
    ours, others = hot.stats, cold.stats
    assert hits < ours.hot_hits < ours.rows_fetched == others.rows_fetched
    assert others.hot_hits == 0
    row_bytes = 16 * 4
    assert ours.bytes_h2d == others.bytes_h2d - ours.hot_hits * row_bytes
    stored = hot_bytes(hot.policy, 2 * 2 * row_bytes, 4)
    assert (ours.hot_bytes, others.hot_bytes) == (stored, 0)
    assert ours.overhead_bytes == others.overhead_bytes + stored
    assert ours.device_bytes == others.device_bytes + stored


@pytest.mark.parametrize(("dim", "kernels"), [(16, True), (8, False)])
@pytest.mark.parametrize("spread", ["even", "need"])
def test_triton_rows_have_arrived_where_the_host_reads_them(
    dim: int, kernels: bool, spread: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Heads of 8 are too small for the kernels: torch gathers on the host, which has to wait for what was sent."""
    model = make("llama", head_dim=dim, num_hidden_layers=1)
    cache, waited = KCache(model, POLICY.replace(backend="triton", spread=spread, tail="none")), []
    with attach(model):
        forward(model, cache, tokens(1, 1, 20))
        monkeypatch.setattr(ValueStore, "finish_sending", lambda store: waited.append(store))
        forward(model, cache, tokens(2, 1, 1))
    assert bool(waited) is not kernels


def test_hot_rows_are_planned_for_on_a_device() -> None:
    config = make("llama").config
    shape, policy = ModelShape.of(config, 4), Policy(dense_below=0, dense_layers=0, hot_rows=16)
    without, with_them = (shape.need(64, 3, policy, None, hot) for hot in (False, True))
    heads = 3 * config.num_key_value_heads
    stored = HotRows(3, config.num_key_value_heads, 16, 8, torch.float32, torch.device("cpu")).nbytes
    assert stored == hot_bytes(policy, heads * 8 * 4, heads)
    assert with_them.overhead_bytes == without.overhead_bytes + config.num_hidden_layers * stored

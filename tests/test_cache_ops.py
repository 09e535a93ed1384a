"""The operations of a transformers Cache, each beside DynamicCache: contents and later logits are the same."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kcache.attaching import attach
from kcache.cache import KCache
from kcache.errors import InputError
from kcache.policy import Policy
from tests.pair import WHOLE, Pair, forward
from tests.tiny_models import left_padding, make, tokens

POLICIES = {
    "offloaded": WHOLE,
    "young": WHOLE.replace(dense_below=1000),
    "mixed": Policy(topn=10**6, dense_below=25, dense_layers=1),
    "resident": Policy(offload="none"),
}


def filled(policy: str = "offloaded", kind: str = "llama", **options: int) -> Pair:
    pair = Pair(make(kind), POLICIES[policy], **options)
    pair.forward(tokens(1, 3, 22), left_padding([22, 8, 15]))
    pair.decode(2)
    return pair


def same_contents(pair: Pair) -> None:
    """K and V of every row are the stock cache's, wherever they are."""
    for (k, v), layer in zip(pair.ours, pair.stock.layers, strict=True):
        torch.testing.assert_close(k, layer.keys)
        torch.testing.assert_close(v, layer.values)


def test_it_is_a_cache() -> None:
    cache = KCache(make("llama"))
    assert isinstance(cache, Cache)
    assert len(cache) == len(list(cache)) == 3
    assert cache.get_seq_length() == 0
    assert cache.get_max_length() == -1
    assert not cache.is_compileable
    assert cache.is_sliding == [False] * 3
    mixed = KCache(make("gemma3"))
    assert mixed.is_sliding == [True, False, False]


@pytest.mark.parametrize("kind", ["llama", "ministral", "gemma3"])
def test_lengths_and_mask_sizes(kind: str) -> None:
    pair = Pair(make(kind))
    for size in (5, 1, 20, 1):
        for query in (1, 4):
            for layer in range(3):
                assert pair.ours.get_mask_sizes(query, layer) == pair.stock.get_mask_sizes(query, layer)
        pair.forward(tokens(size, 2, size))
        for layer in range(3):
            assert pair.ours.get_seq_length(layer) == pair.stock.get_seq_length(layer)
    same_contents(pair)


@pytest.mark.parametrize("policy", POLICIES)
def test_crop(policy: str) -> None:
    pair = filled(policy)
    for tokens_off in (1, 7, 16, 0):
        pair.crop(tokens_off)
        same_contents(pair)
    with pytest.raises(InputError, match="negative"):
        pair.ours.crop(3)
    pair.decode(3)
    pair.forward(tokens(3, 3, 30), left_padding([30, 4, 9]))
    pair.decode(2)
    same_contents(pair)


def test_a_crop_forgets_picks_of_rows_that_may_be_gone() -> None:
    pair = filled()
    assert pair.ours.snapshot().layers[0].picks is not None
    pair.crop(1)
    assert pair.ours.snapshot().layers[0].picks is None


def test_crop_takes_whole_numbers_of_any_kind_and_no_others() -> None:
    """Whoever counts tokens to take back on the device has them in a tensor."""
    pair = filled()
    pair.crop(torch.tensor(2))  # type: ignore[arg-type]
    pair.decode(2)
    before = pair.length
    for wrong in (-1.0, torch.tensor(-1.5), None, "2"):
        with pytest.raises(InputError, match="whole number"):
            pair.ours.crop(wrong)  # type: ignore[arg-type]
    assert pair.length == before
    same_contents(pair)
    pair.decode(2)


@pytest.mark.parametrize("policy", POLICIES)
def test_crop_to_nothing_or_beyond(policy: str) -> None:
    for beyond in (0, 50):
        pair = filled(policy)
        pair.crop(pair.length + beyond)
        pair.mask = None
        assert pair.ours.get_seq_length() == 0
        pair.forward(tokens(2, 3, 12))
        pair.decode(3)


@pytest.mark.parametrize("policy", POLICIES)
def test_reorder(policy: str) -> None:
    pair = filled(policy)
    for order in ([0, 1, 2], [2, 0, 1], [1, 1, 1], [0, 0, 2]):
        pair.reorder(torch.tensor(order))
        same_contents(pair)
        pair.decode(1)
    pair.reorder(torch.tensor([2, 1, 0], dtype=torch.int32))
    pair.decode(1)
    pair.reorder(torch.tensor([0, 1, 2], dtype=torch.int32))
    pair.decode(1)


@pytest.mark.parametrize("policy", POLICIES)
def test_select_and_repeat(policy: str) -> None:
    pair = filled(policy)
    pair.repeat(2)
    same_contents(pair)
    pair.decode(2)
    pair.select(torch.tensor([5, 0, 3, 3]))
    pair.decode(2)
    pair.select(torch.tensor([True, False, True, False]))
    pair.decode(2)
    pair.select(torch.tensor([-1]))
    pair.decode(2)
    same_contents(pair)
    assert pair.ours.snapshot().batch == 1


@pytest.mark.parametrize("wrong", [[3], [0, -4], [True, False, False, True]])
def test_sequences_that_are_not_there_are_refused(wrong: list[int]) -> None:
    pair = filled()
    with pytest.raises(InputError, match="holds 3 sequences"):
        pair.ours.batch_select_indices(torch.tensor(wrong))
    for order in ([-1, 0, 1], [0, 3, 1]):
        with pytest.raises(InputError, match="holds 3 sequences"):
            pair.ours.reorder_cache(torch.tensor(order))
    same_contents(pair)
    pair.decode(1)


def test_reorder_to_fewer_sequences() -> None:
    """The leading ones of a batch are not the whole batch."""
    pair = filled()
    pair.reorder(torch.tensor([0, 1]))
    same_contents(pair)
    pair.decode(2)


@pytest.mark.parametrize("policy", POLICIES)
def test_reset(policy: str) -> None:
    pair = filled(policy)
    pair.reset()
    assert pair.ours.get_seq_length() == 0
    assert pair.ours.stats == type(pair.ours.stats)()
    assert list(pair.ours) == [(None, None)] * 3
    pair.forward(tokens(4, 1, 17))  # another batch, no padding
    pair.decode(3)
    same_contents(pair)


@pytest.mark.parametrize("kind", ["gemma3", "ministral"])
def test_reset_forgets_the_rows_of_windows(kind: str) -> None:
    """In transformers 5.17 a reset zeroes the rows of a window and keeps them: a prompt would attend to zeros."""
    pair = Pair(make(kind))
    pair.forward(tokens(1, 3, 30))
    pair.reset()
    pair.forward(tokens(2, 2, 9))
    pair.decode(6)


@pytest.mark.parametrize("policy", POLICIES)
def test_operations_on_an_empty_cache(policy: str) -> None:
    pair = Pair(make("llama"), POLICIES[policy])
    pair.reset()
    pair.crop(3)
    pair.repeat(2)
    pair.reorder(torch.tensor([1, 0]))
    pair.select(torch.tensor([0]))
    pair.forward(tokens(1, 2, 9), left_padding([9, 4]))
    pair.decode(2)


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("policy", POLICIES)
def test_update_outside_a_forward_fills_the_cache(policy: str, attached: bool) -> None:
    """K and V moved over from another cache, in one piece and in several."""
    model = make("llama")
    for pieces in ((30,), (20, 1, 1, 8)):
        pair = Pair(model, POLICIES[policy])
        mask = left_padding([30, 11])
        want = forward(model, pair.stock, tokens(1, 2, 30), mask)
        assert want.isfinite().all()
        pair.mask = mask
        at = 0
        for size in pieces:
            for index, layer in enumerate(pair.stock.layers):
                k, v = layer.keys[:, :, at : at + size], layer.values[:, :, at : at + size]
                if attached:
                    with attach(model):
                        pair.ours.update(k, v, index)
                else:
                    whole_k, whole_v = pair.ours.update(k, v, index)
                    assert torch.equal(whole_k, layer.keys[:, :, : at + size])
                    assert torch.equal(whole_v, layer.values[:, :, : at + size])
            at += size
        same_contents(pair)
        pair.decode(3)
        pair.crop(5)
        pair.decode(2)


def test_update_keeps_its_own_copy() -> None:
    model = make("llama")
    for policy in POLICIES.values():
        cache = KCache(model, policy)
        k, v = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8)
        kept = k.clone(), v.clone()
        cache.update(k, v, 0)
        k.zero_()
        v.zero_()
        assert torch.equal(cache.layers[0].keys, kept[0])
        assert torch.equal(cache.layers[0].values, kept[1])


def test_a_sliding_layer_past_its_window_cannot_be_cropped_as_in_stock() -> None:
    pair = filled(kind="gemma3")
    with pytest.raises(RuntimeError):
        DynamicCache.crop(pair.stock, -2)
    with pytest.raises(RuntimeError):
        pair.ours.crop(-2)


@pytest.mark.skipif(transformers.__version__.startswith("5.17."), reason="stock's own forward fails after recording")
def test_a_sliding_layer_that_records_its_past_can_be_cropped() -> None:
    pair = Pair(make("gemma3"))
    for cache in (pair.stock, pair.ours):
        for layer in cache.layers:
            if hasattr(layer, "activate_past_recording"):
                layer.activate_past_recording()
    pair.forward(tokens(1, 2, 30))
    pair.crop(0)
    pair.decode(2)
    pair.forward(tokens(2, 2, 6))
    pair.crop(4)
    pair.decode(3)


@pytest.mark.parametrize("policy", POLICIES)
def test_deep_copies_live_apart(policy: str) -> None:
    pair = filled(policy)
    twin = Pair(pair.model, POLICIES[policy])
    twin.ours, twin.stock, twin.mask = copy.deepcopy(pair.ours), copy.deepcopy(pair.stock), pair.mask
    pair.crop(9)
    pair.decode(12, seed=1)
    twin.decode(50, seed=2)
    twin.select(torch.tensor([2, 0]))
    twin.decode(2, seed=3)
    pair.decode(2, seed=4)
    same_contents(pair)
    same_contents(twin)


def test_a_deep_copy_is_pinned_where_the_original_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel reads host rows by their address: the copy's memory has to be registered too, its streams its own."""
    from kcache.tiers import rows

    pair = filled()
    made: list[tuple[int, ...]] = []

    def pinned_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        made.append(shape)
        return torch.empty(shape, dtype=dtype)

    monkeypatch.setattr(rows, "pinned_empty", pinned_empty)
    for layer in pair.ours.tiered_layers:
        layer._v.host.reader = torch.device("cuda")
    twin = copy.deepcopy(pair.ours)
    assert len(made) == 3
    for layer, other in zip(pair.ours.tiered_layers, twin.tiered_layers, strict=True):
        assert other._v.host.reader == layer._v.host.reader
        assert other._v.link is not layer._v.link
        assert other.shared is twin.shared is not pair.ours.shared
        assert other._v.host.data.data_ptr() != layer._v.host.data.data_ptr()
    assert twin.shared.backend(torch.device("cpu")) is not pair.ours.shared.backend(torch.device("cpu"))
    room = twin.layers[0]._k._room  # a copied layer grows by the plan of the copied cache
    assert room.func.__self__ is twin.shared.residency
    assert room.args[0] is twin.layers[0]
    assert twin.shared.residency.layers[0] is twin.layers[0]


def test_layer_handle_is_gone_after_the_forward() -> None:
    """Rows and modules are not kept alive by what ``update`` hung on the V tensor."""
    import gc
    import weakref

    model = make("llama")
    cache = KCache(model, WHOLE)
    with attach(model):
        forward(model, cache, tokens(1, 1, 5))
    gone = weakref.ref(cache.layers[0])
    del cache
    gc.collect()
    assert gone() is None

"""What the tiers hold and what crosses between them, counted apart from kcache's own counters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from kcache.attaching import attach
from kcache.cache import KCache
from kcache.policy import Policy
from kcache.tiers.link import Link
from kcache.tiers.rows import RowBuffer, grown_length
from kcache.tiers.validity import Validity
from tests.pair import WHOLE, forward
from tests.tiny_models import left_padding, make, tokens

CPU = torch.device("cpu")
LAYERS, HEADS, DIM, ELEMENT = 3, 2, 8, 4
ROW = HEADS * DIM * ELEMENT  # bytes of one token's K (or V) in one layer of the tiny llama, one sequence


def held_bytes(root: object, skip: tuple[str, ...] = ()) -> int:
    """Bytes of every distinct tensor storage that can be reached from ``root`` by attributes and containers."""
    storages: dict[int, int] = {}
    seen: set[int] = set()

    def walk(item: object) -> None:
        if id(item) in seen:
            return
        seen.add(id(item))
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, dict):
            for value in item.values():
                walk(value)
        elif isinstance(item, (list, tuple, set)):
            for value in item:
                walk(value)
        elif type(item).__module__.startswith("kcache"):
            for name in [*getattr(item, "__dict__", {}), *getattr(type(item), "__slots__", ())]:
                if name not in skip:
                    walk(getattr(item, name, None))

    walk(root)
    return sum(storages.values())


def layer_bytes(layer: object) -> int:
    """K, V and tail of one layer: without what layers share and without the last picks."""
    return held_bytes(layer, skip=("shared", "following", "picked", "_validity", "_policy"))


def run(policy: Policy, *sizes: int, batch: int = 2, max_length: int | None = None, kind: str = "llama") -> KCache:
    model = make(kind)
    cache = KCache(model, policy, max_length=max_length)
    with attach(model):
        for number, size in enumerate(sizes):
            forward(model, cache, tokens(number, batch, size))
    return cache


# -- bytes held ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [None, 100])
@pytest.mark.parametrize(
    "policy",
    [
        WHOLE,
        WHOLE.replace(topn=4),
        Policy.paper(4, dense_below=0),
        Policy(topn=4, dense_below=0, dense_layers=1),
        Policy(topn=4, dense_below=40, dense_layers=0),
        Policy(),
        Policy(offload="none"),
        WHOLE.replace(tail_rank=5),
    ],
    ids=lambda policy: f"{policy.select}-{policy.tail}-{policy.dense_layers}-{policy.dense_below}-{policy.offload}",
)
def test_bytes_agree_with_the_tensors_that_exist(policy: Policy, max_length: int | None) -> None:
    model = make("llama")
    cache = KCache(model, policy, max_length=max_length)

    def check() -> None:
        stats = cache.stats
        assert stats.device_bytes + stats.host_bytes == sum(map(layer_bytes, cache.layers))
        assert stats.device_bytes == stats.k_bytes + stats.resident_v_bytes + stats.overhead_bytes
        for layer in cache.snapshot().layers:
            assert layer.stats.device_bytes + layer.stats.host_bytes == layer_bytes(cache.layers[layer.index])
        keys = cache.layers[0].buffers().keys
        places, room = keys.untyped_storage().nbytes() // keys[0].nbytes, keys.shape[2]
        assert places >= cache.batch_size
        assert stats.full_kv_bytes == 2 * room * places * ROW * LAYERS
        assert room >= cache.get_seq_length()

    with attach(model):
        for number, size in enumerate([20, 1, 1, 30, 1, 1, 80, 1]):
            forward(model, cache, tokens(number, 2, size))
            check()
        cache.crop(-50)
        check()
        cache.batch_repeat_interleave(2)
        check()
        forward(model, cache, tokens(5, 4, 1))
        check()
        cache.batch_select_indices(torch.tensor([3]))
        check()
        forward(model, cache, tokens(5, 1, 1))
        check()
    cache.reset()
    stats = cache.stats
    assert stats == type(stats)()
    assert sum(map(layer_bytes, cache.layers)) == 0


def test_v_of_an_offloaded_layer_is_not_on_the_device_after_prefill() -> None:
    cache = run(WHOLE.replace(tail_rank=2), 64, max_length=64)
    assert cache.stats.resident_v_bytes == 0
    assert cache.stats.k_bytes == 2 * 64 * ROW * LAYERS
    assert cache.stats.host_bytes == 2 * 64 * ROW * LAYERS
    fitted = HEADS * (2 + 1) * DIM * 4  # directions and base, fp32
    assert cache.stats.overhead_bytes == 2 * (64 * 2 * HEADS * ELEMENT + fitted) * LAYERS
    assert all(layer.offloaded for layer in cache.tiered_layers)


def test_nothing_is_kept_beyond_the_tiers_after_a_forward() -> None:
    """No reference to this forward's V survives: not in the layers, nor in what they share."""
    cache = run(WHOLE, 64, max_length=64)
    rest = held_bytes(cache) - cache.stats.device_bytes - cache.stats.host_bytes
    assert rest < 64 * ROW


def test_update_outside_a_forward_keeps_no_more_than_the_last_layers_rows() -> None:
    model = make("llama")
    cache = KCache(model, WHOLE, max_length=640)
    with attach(model):
        for layer in range(LAYERS):
            cache.update(torch.randn(1, 2, 640, 8), torch.randn(1, 2, 640, 8), layer)
    rest = held_bytes(cache) - cache.stats.device_bytes - cache.stats.host_bytes
    assert rest <= 640 * ROW


def test_known_length_is_allocated_exactly_and_once() -> None:
    cache = run(WHOLE, 30, max_length=50)
    pointers = [(k.data_ptr(), v.data_ptr()) for k, v in cache]
    model = make("llama")
    cache = KCache(model, WHOLE, max_length=50)
    with attach(model):
        forward(model, cache, tokens(1, 2, 30))
        pointers = [(k.data_ptr(), v.data_ptr()) for k, v in cache]
        for step in range(20):
            forward(model, cache, tokens(step, 2, 1))
    assert [(k.data_ptr(), v.data_ptr()) for k, v in cache] == pointers
    assert cache.stats.k_bytes == cache.stats.host_bytes == 2 * 50 * ROW * LAYERS


def test_unknown_length_grows_by_a_quarter() -> None:
    model = make("llama", max_position_embeddings=8192)
    cache = KCache(model, WHOLE)
    rooms = []
    with attach(model):
        forward(model, cache, tokens(1, 1, 1000))
        for step in range(700):
            forward(model, cache, tokens(step, 1, 1))
            rooms.append(cache.stats.k_bytes // (ROW * LAYERS))
    assert sorted(set(rooms)) == [1024, 1280, 1600, 2048]
    assert all(room <= max(1.25 * (1001 + step), 1280) + 64 for step, room in enumerate(rooms))


def test_short_caches_do_not_grow_at_every_turn() -> None:
    assert [grown_length(1, 0), grown_length(65, 64), grown_length(700, 192)] == [64, 128, 704]


# -- bytes moved ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("select", ["group", "head"])
def test_bytes_moved_are_exact(select: str) -> None:
    batch, topn = 2, 6
    policy = Policy(
        topn=topn, spread="even", dense_below=0, dense_layers=1, resident_layers=0, select=select, tail="none"
    )
    model = make("llama")
    cache = KCache(model, policy)
    offloaded = LAYERS - 1
    with attach(model):
        forward(model, cache, tokens(1, batch, 40))
        assert (cache.stats.bytes_d2h, cache.stats.bytes_h2d) == (40 * batch * ROW * offloaded, 0)
        assert cache.stats.steps == cache.stats.rows_fetched == 0
        for step in range(5):
            forward(model, cache, tokens(step, batch, 1))
        per_head = HEADS if select == "group" else 4
        rows = 5 * topn * per_head * batch * offloaded
        assert cache.stats.rows_fetched == rows
        assert cache.stats.steps == 5
        assert cache.stats.bytes_h2d == rows * DIM * ELEMENT
        assert cache.stats.bytes_d2h == 45 * batch * ROW * offloaded
        assert cache.stats.hot_hits == 0
        before = cache.stats.bytes_h2d
        forward(model, cache, tokens(2, batch, 10))
        assert cache.stats.bytes_h2d - before == 45 * batch * ROW * offloaded, "an exact pass brings the past back once"
        before = cache.stats.bytes_h2d
        cache.crop(-2)
        assert cache.stats.bytes_h2d == before, "a crop moves nothing"
    layers = cache.snapshot().layers
    assert layers[0].stats.bytes_d2h == layers[0].stats.bytes_h2d == layers[0].stats.rows_fetched == 0
    assert layers[1].stats == layers[2].stats


def test_fitting_directions_anew_brings_the_rows_back() -> None:
    """While rows are few, directions are fitted whenever they have doubled: at 10, then at 20 rows."""
    policy = Policy(topn=3, spread="even", dense_below=0, dense_layers=0, resident_layers=0)
    model = make("llama")
    cache = KCache(model, policy)
    with attach(model):
        forward(model, cache, tokens(1, 1, 10))
        for step in range(15):
            forward(model, cache, tokens(step, 1, 1))
    assert cache.stats.rows_fetched == 15 * 3 * HEADS * LAYERS
    assert cache.stats.bytes_h2d == (15 * 3 * HEADS * DIM * ELEMENT + 20 * ROW) * LAYERS


def test_topn_beyond_the_context_fetches_each_row_once() -> None:
    cache = run(WHOLE, 10, 1, 1, batch=1)
    assert cache.stats.rows_fetched == (11 + 12) * HEADS * LAYERS


def test_leaving_late_moves_the_young_rows_once() -> None:
    cache = run(WHOLE.replace(dense_below=30), 20, 1, 1, 10, 1, batch=1)
    assert cache.stats.bytes_d2h == 33 * ROW * LAYERS
    assert cache.stats.resident_v_bytes == 0


def test_stats_and_snapshots_are_pictures_not_windows() -> None:
    model = make("llama")
    cache = KCache(model, WHOLE.replace(topn=5, spread="even"))
    with attach(model):
        forward(model, cache, tokens(1, 2, 30), left_padding([30, 20]))
        assert cache.snapshot().layers[0].mode == "prefill"
        assert cache.snapshot().layers[0].picks is None
        forward(model, cache, tokens(2, 2, 1), left_padding([31, 21]))
        before = cache.snapshot()
        kept = before.layers[1].picks.copy()
        forward(model, cache, tokens(3, 2, 1), left_padding([32, 22]))
    assert before.step == 1
    assert (before.tokens, before.batch) == (31, 2)
    assert np.array_equal(before.layers[1].picks, kept)
    assert before.layers[1].picks.shape == (2, HEADS, 5)
    assert before.layers[1].mass.shape == (2, HEADS, 2)
    assert ((before.layers[1].mass > 0) & (before.layers[1].mass <= 1 + 1e-6)).all()
    with pytest.raises(ValueError, match="read-only"):
        before.layers[1].picks[0] = 0
    with pytest.raises(AttributeError):
        before.step = 7  # type: ignore[misc]


def test_snapshot_of_stock_layers_counts_them_too() -> None:
    cache = run(WHOLE, 20, 1, kind="gemma3")
    snapshot = cache.snapshot()
    assert [layer.kind for layer in snapshot.layers] == ["stock", "tiered", "tiered"]
    stock = cache.layers[0]
    assert snapshot.layers[0].stats.k_bytes == stock.keys.numel() * 4
    assert snapshot.layers[0].stats.device_bytes == 2 * stock.keys.numel() * 4
    assert snapshot.stats.device_bytes == sum(layer.stats.device_bytes for layer in snapshot.layers)


def test_an_empty_cache_has_empty_figures() -> None:
    cache = KCache(make("llama"))
    assert cache.stats.device_bytes == cache.stats.host_bytes == cache.stats.tokens == 0
    snapshot = cache.snapshot()
    assert (snapshot.step, snapshot.tokens, snapshot.batch) == (0, 0, 0)
    assert list(cache) == [(None, None)] * 3


# -- the parts -----------------------------------------------------------------------------------------------------


def test_row_buffer_keeps_rows_as_it_grows() -> None:
    buffer = RowBuffer(CPU)
    assert (buffer.capacity, buffer.nbytes) == (0, 0)
    with pytest.raises(ValueError, match="no rows"):
        buffer.view(0)
    rows = torch.randn(2, 3, 500, 4)
    for end in (1, 64, 65, 130, 131, 500):
        buffer.reserve(rows, end)
        start = buffer_length(buffer)
        buffer.view(end)[:, :, start:].copy_(rows[:, :, start:end])
        buffer.length_in_test = end  # type: ignore[attr-defined]
        assert torch.equal(buffer.view(end), rows[:, :, :end])
        assert buffer.nbytes == buffer.data.untyped_storage().nbytes()
    buffer.select(torch.tensor([1, 1, 0]))
    assert torch.equal(buffer.view(500), rows[[1, 1, 0]])


def buffer_length(buffer: Any) -> int:
    return getattr(buffer, "length_in_test", 0)


def test_row_buffer_rows_are_contiguous_for_every_capacity() -> None:
    for room, capacity in ((None, 64), (lambda: 7, 7), (lambda: 100, 100), (lambda: 3, 7)):
        buffer = RowBuffer(CPU, room)
        buffer.reserve(torch.empty(2, 3, 1, 5), 7)
        assert buffer.data.stride()[2:] == (5, 1)
        assert buffer.capacity == capacity


def test_host_only_link_copies_and_is_done_on_return() -> None:
    link = Link(CPU)
    rows, host = torch.randn(2, 2, 5, 4), torch.empty(2, 2, 9, 4)
    assert link.to_host(rows, host[:, :, 2:7]) is None
    assert torch.equal(host[:, :, 2:7], rows)
    back, arrived = link.to_device(host[:, :, 2:7], 8)
    assert arrived is None
    assert back.shape == (2, 2, 8, 4)
    assert torch.equal(back[:, :, :5], rows)
    link.wait(None)


def masks(rows: list[list[int]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.bool)[:, None, None, :]


def test_validity_starts_when_the_first_hole_is_seen() -> None:
    validity = Validity()
    validity.record(3, None)
    assert validity.rows(0, 3, CPU) is None
    validity.record(5, masks([[1, 1, 1, 0, 1], [1, 1, 1, 0, 0]]))
    assert validity.rows(0, 5, CPU).tolist() == [[True, True, True, False, True], [True, True, True, False, False]]
    validity.record(5, masks([[0] * 5, [0] * 5]))  # the next layer of the same forward
    assert validity.rows(3, 5, CPU).tolist() == [[False, True], [False, False]]
    validity.record(6, None)
    assert validity.rows(3, 6, CPU).tolist() == [[False, True, True], [False, False, True]]
    validity.select(torch.tensor([1, 1]))
    assert validity.rows(3, 6, CPU).tolist() == [[False, False, True]] * 2
    validity.crop(4)
    assert validity.rows(2, 4, CPU).tolist() == [[True, False]] * 2
    validity.record(6, masks([[1] * 6, [1] * 6]))
    assert validity.rows(2, 6, CPU).tolist() == [[True, False, True, True]] * 2


def test_validity_reads_the_last_query_of_a_chunk() -> None:
    validity = Validity()
    causal = torch.ones(4, 4, dtype=torch.bool).tril().expand(2, 1, 4, 4).clone()
    causal[1, :, :, 0] = False
    validity.record(4, causal)
    assert validity.rows(0, 4, CPU).tolist() == [[True] * 4, [False, True, True, True]]


def test_validity_takes_one_mask_for_the_whole_batch() -> None:
    validity = Validity()
    validity.record(2, masks([[1, 0], [1, 1]]))
    validity.record(3, masks([[1, 1, 0]]))
    assert validity.rows(0, 3, CPU).tolist() == [[True, False, False], [True, True, False]]

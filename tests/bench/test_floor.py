"""The floor of a step against arithmetic by hand, on caches that are really filled."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kcache.attaching import attach
from kcache.bench.context import fill, layer_shapes
from kcache.bench.engines import make_engine
from kcache.bench.floor import Traffic, floor_of, traffic_of
from kcache.decoding.forward import step_logits
from kcache.layers.tiered import TieredLayer
from kcache.policy import Policy
from tests.bench.machines import machine
from tests.tiny_models import make

CTX, BATCH, LAYERS, HKV, HQ, D = 64, 2, 3, 2, 4, 8
ROW = D * 4  # fp32
POLICY = Policy(topn=8, dense_layers=1, dense_below=0, offload="all")


def filled(name: str, policy: Policy = POLICY) -> tuple[torch.nn.Module, Traffic]:
    """One decode step of an engine after ``CTX`` random rows, and its traffic."""
    model, engine = make("llama"), make_engine(name, policy)
    with engine.running(model):
        cache = engine.make(model, CTX + 1)
        fill(cache, layer_shapes(model), CTX, BATCH)
        before = engine.stats(cache)
        step_logits(model, cache, torch.ones(BATCH, 1, dtype=torch.long))
        after = engine.stats(cache)
    return model, traffic_of(model, cache, engine.link_bytes(before, after, 1))


def test_kcache_reads_k_scores_tail_and_its_rows() -> None:
    _, traffic = filled("kcache")
    rows, offloaded = BATCH * HKV * (CTX + 1), LAYERS - 1
    assert traffic.k_bytes == LAYERS * rows * ROW
    assert traffic.v_bytes == rows * ROW
    assert traffic.score_bytes == offloaded * BATCH * HQ * (CTX + 1) * 4 * 2
    assert traffic.tail_bytes == offloaded * rows * ROW // D, "one direction of each row"
    assert traffic.link_bytes >= offloaded * BATCH * HKV * POLICY.topn * ROW
    assert not traffic.link_in_bulk


@pytest.mark.parametrize("k_bits", [8, "8+8"])
def test_rows_in_8_bits_are_counted_and_not_read(monkeypatch: pytest.MonkeyPatch, k_bits: Any) -> None:
    """Of K each byte and its scale; exact copies of K and V, as large as both, are not made for that."""
    for name in ("keys", "values"):
        monkeypatch.setattr(TieredLayer, name, property(lambda self: pytest.fail("a copy of the rows was made")))
    _, traffic = filled("kcache", POLICY.replace(k_bits=k_bits, v_bits=8))
    rows, offloaded = BATCH * HKV * (CTX + 1), LAYERS - 1
    assert traffic.k_bytes == rows * (ROW + offloaded * (D + 4))
    assert traffic.v_bytes == rows * ROW
    assert traffic.tail_bytes == offloaded * rows * ROW // D


@pytest.mark.parametrize("name", ["dense", "hf-dynamic", "hf-static"])
def test_full_attention_owes_all_of_k_and_v(name: str) -> None:
    _, traffic = filled(name)
    assert traffic.k_bytes == traffic.v_bytes == LAYERS * BATCH * HKV * (CTX + 1) * ROW
    assert traffic.score_bytes == traffic.tail_bytes == traffic.link_bytes == 0


def test_static_owes_the_rows_it_holds_not_its_capacity() -> None:
    model, engine = make("llama"), make_engine("hf-static", POLICY)
    cache = engine.make(model, 4 * CTX)
    fill(cache, layer_shapes(model), CTX, BATCH)
    assert traffic_of(model, cache, 0).k_bytes == LAYERS * BATCH * HKV * CTX * ROW


def test_an_embedding_that_is_not_tied_is_not_read() -> None:
    model, traffic = filled("dense")
    everything = sum(parameter.numel() * 4 for parameter in model.parameters())
    assert traffic.weights_bytes == everything - model.get_input_embeddings().weight.numel() * 4


def test_floor_adds_memory_and_link() -> None:
    rows = Traffic(weights_bytes=40_000_000, k_bytes=50_000_000, v_bytes=0, score_bytes=8_000_000, tail_bytes=2_000_000,
                   link_bytes=5e6)  # fmt: skip
    floor = floor_of(rows, machine())
    assert (floor.memory_ms, floor.link_ms, floor.ms) == pytest.approx((1.0, 0.5, 1.5))


def test_large_copies_are_held_to_the_speed_of_large_copies() -> None:
    bulk = Traffic(0, 0, 0, 0, 0, 5e6, link_in_bulk=True)
    assert floor_of(bulk, machine(h2d_gb_s=50.0)).link_ms == pytest.approx(0.1)
    assert floor_of(bulk, machine()).link_ms == pytest.approx(0.5)


def test_attached_or_not_makes_no_difference_to_the_count() -> None:
    model = make("llama")
    with attach(model):
        inside = layer_shapes(model)
    assert inside == layer_shapes(model)

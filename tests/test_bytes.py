"""Rows in 8 bits: what a row loses, and a cache that keeps K and V so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from kcache.attention import attach
from kcache.cache import KCache
from kcache.errors import PolicyError
from kcache.policy import Policy
from kcache.tiers.bytes import ByteRows, dequantise, quantise
from tests.models import left_padding, make, tokens
from tests.pair import forward

CPU = torch.device("cpu")
ALL = Policy(dense_layers=0, dense_below=0, resident_layers=0, topn=1_000_000)
BYTES: list[dict[str, Any]] = [{"k_bits": 8}, {"v_bits": 8}, {"k_bits": 8, "v_bits": 8}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_errs_by_half_a_step_of_its_own_scale(dtype: torch.dtype) -> None:
    rows = (torch.randn(2, 3, 50, 16) * torch.logspace(-3, 3, 50).view(50, 1)).to(dtype)
    rows[0, 0, 7] = 0
    whole, scales = quantise(rows)
    assert whole.dtype == torch.int8
    assert whole.abs().max() == 127
    error = (dequantise(whole, scales, torch.float32) - rows.float()).abs()
    assert (error <= scales * 0.5001).all()
    assert (error[0, 0, 7] == 0).all()


def test_rows_come_back_grown_cut_and_reordered() -> None:
    kept, rows = ByteRows(CPU, CPU), torch.randn(3, 2, 40, 8)
    kept.put(rows[:, :, :10], 0)
    kept.put(rows[:, :, 10:], 10)
    want = dequantise(*quantise(rows), torch.float32)
    torch.testing.assert_close(kept.get(40), want, rtol=0, atol=0)
    twin = copy.deepcopy(kept)
    kept.put(-rows[:, :, 20:25], 20)  # after a crop
    torch.testing.assert_close(kept.get(25)[:, :, 20:], -want[:, :, 20:25], rtol=0, atol=0)
    twin.select(torch.tensor([2, 0]))
    torch.testing.assert_close(twin.get(40), want[[2, 0]], rtol=0, atol=0)
    assert twin.nbytes == 2 * 2 * twin.capacity * 8
    assert twin.scale_bytes == 2 * 2 * twin.capacity * 4


@torch.no_grad()
@pytest.mark.parametrize("bits", BYTES, ids=str)
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_logits_stay_near_those_of_stock(kind: str, bits: dict[str, Any]) -> None:
    """With N over the context the 8 bits are all that differs, through two turns, padding, a crop and a reordering."""
    model = make(kind)
    ours, stock = KCache(model, ALL.replace(**bits)), DynamicCache(config=model.config)
    mask = left_padding([40, 23])

    def step(ids: torch.Tensor) -> float:
        nonlocal mask
        fresh = mask.shape[1] - ours.get_seq_length()
        if fresh < ids.shape[1]:
            mask = torch.cat([mask, mask.new_ones(2, ids.shape[1] - fresh)], 1)
        with attach(model):
            got = forward(model, ours, ids, mask)
        want = forward(model, stock, ids, mask)
        return float((got[:, -1] - want[:, -1]).norm() / want[:, -1].norm())

    assert step(tokens(1, 2, 40)) < 1e-5, "a prompt in one piece attends to its own rows, not to what is kept of them"
    errors = [step(tokens(2 + number, 2, 1)) for number in range(3)]
    errors.append(step(tokens(9, 2, 6)))
    for cache in (ours, stock):
        cache.crop(-4)
        cache.reorder_cache(torch.tensor([1, 0]))
    mask = mask[[1, 0], :-4]
    errors += [step(tokens(20 + number, 2, 1)) for number in range(2)]
    assert ours.stats.rows_fetched > 0
    assert 0 < max(errors) < 0.05


@torch.no_grad()
@pytest.mark.parametrize("bits", BYTES, ids=str)
def test_bytes_are_counted_as_they_are_kept(bits: dict[str, Any]) -> None:
    model = make("llama")
    caches = [KCache(model, ALL.replace(topn=4, spread="even", **more), max_length=64) for more in ({}, bits)]
    with attach(model):
        for cache in caches:
            forward(model, cache, tokens(1, 2, 50))
            forward(model, cache, tokens(2, 2, 1))
    full, half = (cache.stats for cache in caches)
    heads, layers, dim = model.config.num_key_value_heads, len(caches[0].tiered_layers), 8
    assert full.full_kv_bytes == half.full_kv_bytes
    assert full.rows_fetched == half.rows_fetched
    scales = 2 * heads * 64 * 4 * layers
    k8, v8 = bits.get("k_bits") == 8, bits.get("v_bits") == 8
    assert half.k_bytes == (full.k_bytes // 4 + scales if k8 else full.k_bytes)
    assert half.host_bytes == (full.host_bytes // 4 if v8 else full.host_bytes)
    assert half.overhead_bytes == full.overhead_bytes + (scales if v8 else 0)
    assert half.bytes_d2h == (full.bytes_d2h // 4 if v8 else full.bytes_d2h)
    assert half.bytes_h2d == half.rows_fetched * dim * (1 if v8 else 4)
    assert half.device_bytes == half.k_bytes + half.resident_v_bytes + half.overhead_bytes


def test_other_numbers_of_bits_are_refused() -> None:
    for name in ("k_bits", "v_bits"):
        for value in (4, 32, "8"):
            with pytest.raises(PolicyError, match=f"{name} must be 16 or 8"):
                Policy(**{name: value})

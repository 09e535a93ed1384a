"""Rows in 8 bits: what a row loses, and a cache that keeps K and V so."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from kcache.attaching import attach
from kcache.backends.rounding import PIECE, quantise, remainder
from kcache.cache import KCache
from kcache.errors import PolicyError
from kcache.planning.fitting import Fitter, Pools
from kcache.planning.need import ModelShape, cache_bytes
from kcache.policy import Policy
from kcache.telemetry import Stats
from kcache.tiers.bytes import ByteRows, dequantise
from tests.pair import forward
from tests.tiny_models import left_padding, make, tokens

CPU = torch.device("cpu")
ALL = Policy(dense_layers=0, dense_below=0, resident_layers=0, topn=1_000_000)
BYTES: list[dict[str, Any]] = [
    {"k_bits": 8}, {"v_bits": 8}, {"k_bits": 8, "v_bits": 8}, {"k_bits": "8+8"}, {"k_bits": "8+8", "v_bits": 8},
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_errs_by_half_a_step_of_its_own_scale(dtype: torch.dtype) -> None:
    rows = (torch.randn(2, 3, 50, 16) * torch.logspace(-3, 3, 50).view(50, 1)).to(dtype)
    rows[0, 0, 7] = 0
    whole, scales = quantise(rows)
    assert whole.dtype == torch.int8
    assert whole.abs().max() == 127
    error = (dequantise(whole, scales, torch.empty(rows.shape)) - rows.float()).abs()
    assert (error <= scales * 0.5001).all()
    assert (error[0, 0, 7] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_both_planes_err_by_half_a_step_of_the_lower_one(dtype: torch.dtype) -> None:
    rows = (torch.randn(2, 3, 50, 16) * torch.logspace(-3, 3, 50).view(50, 1)).to(dtype)
    rows[0, 0, 7] = 0
    whole, scales = quantise(rows)
    lower = remainder(rows, whole, scales)
    assert lower.dtype == torch.int8
    assert lower.abs().max() == 127
    back = dequantise(whole, scales, torch.empty(rows.shape), lower)
    assert ((back - rows.float()).abs() <= scales * (0.51 / 254)).all()
    if dtype == torch.bfloat16:
        large = rows.float().abs() > scales * 1.01
        assert torch.equal(dequantise(whole, scales, torch.empty_like(rows), lower)[large], rows[large])


class _Widest(TorchDispatchMode):
    """Notes the most fp32 values that one operator gives."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
            self.most = max(self.most, result.numel())
        return result


def test_long_rows_are_turned_in_pieces() -> None:
    rows = torch.randn(1, 2, 2 * PIECE + 5, 16).bfloat16()
    with _Widest() as seen:
        whole, scales = quantise(rows)
        back = dequantise(whole, scales, torch.empty_like(rows))
        lower = remainder(rows, whole, scales)
        near = dequantise(whole, scales, torch.empty_like(rows), lower)
    assert seen.most <= 2 * PIECE * 16
    exact = rows.float()
    torch.testing.assert_close(scales, exact.abs().amax(-1, keepdim=True) / 127, rtol=0, atol=0)
    assert torch.equal(whole, (exact / scales).round().to(torch.int8))
    assert torch.equal(back, (whole.float() * scales).bfloat16())
    assert torch.equal(near, ((whole + lower.float() / 254) * scales).bfloat16())


def test_room_for_rows_is_room_for_their_scales() -> None:
    """So that what is moved there next cannot be refused halfway."""
    kept = ByteRows(CPU, CPU)
    kept.reserve(torch.zeros(2, 3, 10, 8), 10)
    assert kept.scale_bytes == 2 * 3 * kept.capacity * 4


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("planes", [1, 2])
def test_rows_come_back_grown_cut_and_reordered(planes: int, centred: bool) -> None:
    kept, rows = ByteRows(CPU, CPU, planes=planes, centred=centred), torch.randn(3, 2, 40, 8)
    kept.put(rows[:, :, :10], 0)
    kept.put(rows[:, :, 10:], 10)
    centre = rows[:, :, :10].mean(2) if centred else None
    whole, scales = quantise(rows, centre)
    lower = remainder(rows, whole, scales, centre) if planes == 2 else None
    want = dequantise(whole, scales, torch.empty(rows.shape), lower, centre)
    torch.testing.assert_close(kept.get(40), want, rtol=0, atol=0)
    twin = copy.deepcopy(kept)
    kept.put(rows[:, :, 30:35], 20)  # after a crop
    torch.testing.assert_close(kept.get(25)[:, :, 20:], want[:, :, 30:35], rtol=0, atol=0)
    twin.select(torch.tensor([2, 0]))
    torch.testing.assert_close(twin.get(40), want[[2, 0]], rtol=0, atol=0)
    assert twin.nbytes == planes * 2 * 2 * twin.capacity * 8
    assert twin.scale_bytes == 2 * 2 * (twin.capacity + (8 if centred else 0)) * 4


@pytest.mark.parametrize("planes", [1, 2])
def test_what_all_rows_have_in_common_costs_no_precision(planes: int) -> None:
    """A bias, and numbers that are none in a row, which the mean passes over."""
    bias = torch.tensor([0.0, 300.0, -80.0, *[0.0] * 13])
    rows = torch.randn(2, 3, 3000, 16)
    apart, near = ByteRows(CPU, CPU, planes=planes, centred=True), ByteRows(CPU, CPU, planes=planes, centred=True)
    for kept, given in ((apart, rows + bias), (near, rows)):
        kept.put(given[:, :, :2500], 0)
        kept.put(given[:, :, 2500:], 2500)
    torch.testing.assert_close(apart.scales, near.scales, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(apart.get(3000) - bias, near.get(3000), rtol=0, atol=0.06 if planes == 1 else 3e-4)
    rows[0, 0, 1, 3], rows[0, 0, 2, 5] = float("inf"), float("nan")
    spoilt = ByteRows(CPU, CPU, planes=planes, centred=True)
    spoilt.put(rows, 0)
    finite = [row for row in range(3000) if row not in (1, 2)]
    assert spoilt.get(3000)[0, 0, finite].isfinite().all()


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
    assert 0 < max(errors) < (5e-4 if bits == {"k_bits": "8+8"} else 0.05)


@torch.no_grad()
@pytest.mark.parametrize(
    ("dtype", "kernels", "given", "planes"),
    [
        (torch.bfloat16, True, "auto", 2),
        (torch.float16, True, "auto", 2),
        (torch.bfloat16, True, 16, 0),
        (torch.bfloat16, True, 8, 1),
        (torch.bfloat16, False, "auto", 0),
        (torch.float32, True, "auto", 0),
    ],
)
def test_k_is_kept_as_the_policy_says_or_as_kernels_read_it_best(
    dtype: torch.dtype, kernels: bool, given: Any, planes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kcache.cache.decodes_by_kernels", lambda device, policy: kernels)
    model = make("llama", head_dim=16).to(dtype)
    policy = ALL.replace(k_bits=given)
    cache = KCache(model, policy)
    with attach(model):
        forward(model, cache, tokens(1, 2, 40))
        forward(model, cache, tokens(2, 2, 1))
    assert cache.policy == policy, "as it was given"
    kept = cache.tiered_layers[0].buffers()
    assert kept.keys.dtype == (torch.int8 if planes else dtype)
    assert (kept.narrow is None) == (planes == 0)
    if kept.narrow is not None:
        assert (kept.narrow.lower is None) == (planes == 1)


@torch.no_grad()
def test_the_centre_of_k_is_that_of_real_rows_and_of_most_there_are() -> None:
    model, policy = make("llama"), ALL.replace(k_bits="8+8")
    ids, mask = tokens(0, 2, 60), left_padding([60, 10])
    cache = KCache(model, policy)
    with attach(model):
        forward(model, cache, ids, mask)
    for layer in cache.tiered_layers[1:]:  # which rows are real is known once the first has attended
        narrow = layer.buffers().narrow
        assert narrow is not None and layer.keys is not None
        for sequence, first in ((0, 0), (1, 50)):
            mean = layer.keys[sequence, :, first:].mean(1)
            torch.testing.assert_close(narrow.centre[sequence], mean, rtol=0, atol=1e-3)
    cache = KCache(model, policy.replace(dense_below=30))
    with attach(model):
        forward(model, cache, tokens(0, 1, 1))
        forward(model, cache, tokens(1, 1, 60))
    for layer in cache.tiered_layers:
        narrow = layer.buffers().narrow
        assert narrow is not None and layer.keys is not None
        torch.testing.assert_close(narrow.centre, layer.keys[:, :, 1:].mean(2), rtol=0, atol=1e-3)


@torch.no_grad()
def test_k_is_not_lost_where_there_is_no_memory_to_narrow_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model, policy = make("llama"), ALL.replace(k_bits="8+8", dense_below=30)
    ids, more = tokens(0, 1, 20), tokens(1, 1, 20)
    cache, whole = KCache(model, policy), KCache(model, policy)
    with attach(model):
        forward(model, whole, ids[:, :15])
        want = forward(model, whole, more)
        forward(model, cache, ids)
        with monkeypatch.context() as patch:
            patch.setattr("kcache.tiers.bytes.narrowed", raises_out_of_memory)
            with pytest.raises(torch.OutOfMemoryError):
                forward(model, cache, more)
        cache.crop(-5)
        got = forward(model, cache, more)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-3)


def raises_out_of_memory(*given: Any) -> None:
    raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("sizes", [{"num_attention_heads": 32, "num_key_value_heads": 1}, {"head_dim": 8}], ids=str)
def test_k_stays_in_one_piece_where_heads_are_not_for_kernels(
    sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference decodes such layers on a card too, and is quicker with K as it comes."""
    monkeypatch.setattr("kcache.cache.decodes_by_kernels", lambda device, policy: True)
    model = make("llama", **{"head_dim": 16, **sizes}).to(torch.bfloat16)
    assert KCache(model).shared.policy == Policy(k_bits=16)
    fitter = Fitter(ModelShape.of(model.config, 2), Policy(), Pools(2**34, 2**34))
    assert fitter.policy == Policy(k_bits=16)


def test_where_no_layer_is_tiered_nothing_is_said_to_be_in_8_bits() -> None:
    model = make("mistral", sliding_window=12).to(torch.bfloat16)
    cache = KCache(model)
    assert not cache.tiered_layers
    assert cache.shared.policy == Policy(k_bits=16)


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
    planes, v8 = Policy(**bits).key_planes, bits.get("v_bits") == 8
    centres = 2 * heads * dim * 4 * layers
    assert half.k_bytes == (planes * full.k_bytes // 4 + scales + centres if planes else full.k_bytes)
    assert half.host_bytes == (full.host_bytes // 4 if v8 else full.host_bytes)
    assert half.overhead_bytes == full.overhead_bytes + (scales if v8 else 0)
    assert half.bytes_d2h == (full.bytes_d2h // 4 if v8 else full.bytes_d2h)
    assert half.bytes_h2d == half.rows_fetched * dim * (1 if v8 else 4)
    assert half.device_bytes == half.k_bytes + half.resident_v_bytes + half.overhead_bytes


@torch.no_grad()
@pytest.mark.parametrize("bits", BYTES, ids=str)
@pytest.mark.parametrize("room", [1.0, 1.1, 1.7])
def test_a_budget_holds_while_v_is_young_and_after(bits: dict[str, Any], room: float) -> None:
    """K is as it came until V leaves, but never at the length that only K in 8 bits has room for."""
    model = make("llama", head_dim=16, num_hidden_layers=3)
    policy = Policy(dense_layers=0, dense_below=30, topn=8, **bits)
    need = cache_bytes(model.config, 512, 1, policy, dtype_bytes=4, budget=0)
    policy = policy.replace(kv_budget=int(need.device_bytes * room))
    cache, seen = KCache(model, policy, max_length=512), list[Stats]()
    with attach(model):
        for number, count in enumerate((10, 1, 15, 1, 1, 1, 1, 1, 40)):
            forward(model, cache, tokens(number, 1, count))
            seen.append(cache.stats)
    assert max(stats.device_bytes for stats in seen) <= policy.kv_budget
    assert cache.stats.host_bytes > 0


@torch.no_grad()
@pytest.mark.parametrize("bits", BYTES, ids=str)
def test_a_mix_of_layers_that_crosses_into_8_bits_stays_near_stock(bits: dict[str, Any]) -> None:
    """A dense layer beside tiered ones, pieces of prompts, V that leaves on the way, other batches, and a copy."""
    model = make("llama", head_dim=16, num_hidden_layers=3)
    ours = KCache(model, Policy(topn=10**6, dense_layers=1, dense_below=30, **bits))
    stock = DynamicCache(config=model.config)
    errors = []

    def step(seed: int, batch: int, count: int) -> None:
        with attach(model):
            got = forward(model, ours, tokens(seed, batch, count))
        want = forward(model, stock, tokens(seed, batch, count))
        errors.append(float((got[:, -1] - want[:, -1]).norm() / want[:, -1].norm()))

    for seed, count in enumerate((20, 1, 7, 1)):
        step(seed, 2, count)
    assert max(errors) < 1e-5, "V is young, and so are the rows as they came"
    for seed, count in enumerate((7, 1, 1)):
        step(seed + 10, 2, count)
    assert errors[-1] > (1e-7 if bits == {"k_bits": "8+8"} else 1e-5)
    for cache in (ours, stock):
        cache.batch_repeat_interleave(2)
    step(20, 4, 1)
    for cache in (ours, stock):
        cache.batch_select_indices(torch.tensor([3, 0]))
    step(21, 2, 30)
    twin = copy.deepcopy(ours)
    assert max(errors) < 0.05
    with attach(model):
        got = [forward(model, cache, tokens(22, 2, 1)) for cache in (ours, twin)]
    assert torch.equal(*got)
    kept = [type(layer._k).__name__ for layer in ours.tiered_layers]
    assert kept == ["RowBuffer"] + ["ByteRows" if "k_bits" in bits else "RowBuffer"] * 2


@torch.no_grad()
def test_who_wants_v_alone_does_not_have_k_widened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does a prompt in one piece, which attends to its own rows."""
    model = make("llama")
    cache = KCache(model, ALL.replace(k_bits=8), max_length=64)
    widened = []
    monkeypatch.setattr("kcache.tiers.bytes.dequantise", lambda *given: widened.append(given))
    with attach(model):
        forward(model, cache, tokens(1, 1, 40))
    assert all(layer.values is not None for layer in cache.tiered_layers)
    assert not widened


def test_other_numbers_of_bits_are_refused() -> None:
    for name, known in (("k_bits", "auto, 16, 8 or 8[+]8"), ("v_bits", "16 or 8")):
        for value in (4, 32, "8.0", "16+8", None, True, "1" * 5000):
            with pytest.raises(PolicyError, match=f"{name} must be {known}, got"):
                Policy(**{name: value})
        for value in ("8", 8.0, torch.tensor(8)):
            assert repr(getattr(Policy(**{name: value}), name)) == "8"

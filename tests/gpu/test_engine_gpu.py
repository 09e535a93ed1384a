"""The engine on a CUDA device: the same answers as stock transformers, V really off the device, and no races."""

from __future__ import annotations

import copy
import gc
import random

import pytest
import torch
from transformers import DynamicCache, PreTrainedModel

from kcache.attaching import attach
from kcache.cache import KCache
from kcache.policy import Policy
from tests.pair import WHOLE, Pair, forward
from tests.tiny_models import KINDS, holding, left_padding, make, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BACKENDS = ("reference", "auto")
SIZES = {
    "hidden_size": 256,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_hidden_layers": 4,
    "max_position_embeddings": 65536,
    "initializer_range": 0.08,
}
LOOSE = 1e-3  # fp32 on tensor cores and other summation orders


def big(dtype: torch.dtype = torch.float32, **changes: object) -> PreTrainedModel:
    return make("llama", dtype=dtype, **{**SIZES, **changes}).cuda()


def ids_of(seed: int, *shape: int) -> torch.Tensor:
    return tokens(seed, *shape).cuda()


def settle() -> None:
    """Let copies end and the allocator take back what they read."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


@torch.no_grad()
def warm_up(model: PreTrainedModel) -> None:
    """Let torch take the scratch memory of matrix products, which it keeps for good."""
    model(input_ids=ids_of(0, 1, 64), use_cache=False)


# -- equality ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [*KINDS, "gemma2", "gpt_oss"])
def test_logits_equal_stock_on_every_family(kind: str) -> None:
    attention = "eager" if kind in ("gemma2", "gpt_oss") else "sdpa"
    pair = Pair(make(kind, attention=attention).cuda(), WHOLE.replace(backend="reference"), tolerance=LOOSE)
    pair.forward(ids_of(1, 2, 30), left_padding([30, 17]).cuda())
    pair.decode(6)
    pair.forward(ids_of(2, 2, 9), left_padding([4, 9]).cuda())
    pair.decode(6)
    assert pair.ours.stats.rows_fetched > 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("topn", [64, 1_000_000])
@pytest.mark.parametrize("chunks", [(300,), (130, 1, 169)])
def test_prefill_decode_and_second_turn(backend: str, topn: int, chunks: tuple[int, ...]) -> None:
    """TopN covers the context only in the second case; prefill is exact in both."""
    policy = WHOLE.replace(backend=backend, topn=topn)
    pair = Pair(big(), policy, tolerance=LOOSE)
    with pair.ours.exact():
        for number, size in enumerate(chunks):
            pair.forward(ids_of(number, 3, size), left_padding([size, size - size // 3, size]).cuda())
    if topn > 1000:
        pair.decode(12)
        assert pair.ours.stats.rows_fetched > 0
    pair.forward(ids_of(9, 3, 40), left_padding([40, 8, 31]).cuda())
    if topn > 1000:
        pair.decode(5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
def test_half_precision_is_as_near_the_truth_as_stock(backend: str, dtype: torch.dtype, kv_heads: int) -> None:
    model = big(dtype, num_key_value_heads=kv_heads)
    truth_model = copy.deepcopy(model).float()
    stock, truth = DynamicCache(config=model.config), DynamicCache(config=model.config)
    ours = KCache(model, WHOLE.replace(backend=backend))
    ours_error = stock_error = 0.0
    for step, size in enumerate([500, 1, 1, 1, 60, 1, 1]):
        ids = ids_of(step, 2, size)
        want = forward(truth_model, truth, ids)
        with attach(model):
            got = forward(model, ours, ids).float()
        ours_error += float((got - want).abs().mean())
        stock_error += float((forward(model, stock, ids).float() - want).abs().mean())
    assert ours.stats.rows_fetched > 0
    assert ours_error <= 1.5 * stock_error


@pytest.mark.parametrize(
    "policy",
    [
        Policy(dense_below=0),
        Policy.paper(dense_below=0),
        Policy(dense_below=0, tail="none"),
        Policy(dense_below=0, hot_rows=0),
        Policy(dense_below=0, k_bits=8, v_bits=8),
        Policy(dense_below=0, k_bits="8+8"),
    ],
)
def test_fast_backend_equals_reference_below_full_topn(policy: Policy) -> None:
    """N = L/8: both must pick alike and weigh alike, so the logits agree."""
    model = big()
    policy = policy.replace(topn=64, dense_below=0, resident_layers=0)
    caches = [KCache(model, policy.replace(backend=backend)) for backend in BACKENDS]
    mask = left_padding([512, 301]).cuda()
    ids = ids_of(1, 2, 512)
    with attach(model):
        for cache in caches:
            forward(model, cache, ids, mask)
        for step in range(20):
            mask = torch.cat([mask, mask.new_ones(2, 1)], 1)
            ids = ids_of(step, 2, 1)
            want, got = (forward(model, cache, ids, mask) for cache in caches)
            torch.testing.assert_close(got, want, atol=2e-3 * float(want.abs().max()), rtol=0)
            if step == 9:
                for cache in caches:
                    cache.crop(-5)
                mask = mask[:, :-5]
    fetched = [cache.stats.rows_fetched for cache in caches]
    assert 0 < fetched[0] == pytest.approx(fetched[1], rel=1e-3), "rounding decides about rows at the threshold alone"


@pytest.mark.parametrize("backend", BACKENDS)
def test_cache_operations_on_the_device(backend: str) -> None:
    pair = Pair(big(), WHOLE.replace(backend=backend), tolerance=LOOSE)
    pair.forward(ids_of(1, 3, 90), left_padding([90, 50, 71]).cuda())
    pair.decode(3)
    pair.reorder(torch.tensor([2, 0, 0]).cuda())
    pair.decode(3)
    pair.crop(7)
    pair.decode(3)
    pair.repeat(2)
    pair.decode(2)
    pair.select(torch.tensor([5, 1]).cuda())
    pair.decode(70)
    pair.reset()
    pair.forward(ids_of(2, 1, 33))
    pair.decode(3)


@pytest.mark.parametrize("backend", BACKENDS)
def test_generate_gives_the_same_tokens(backend: str) -> None:
    model = big()
    ids, mask = ids_of(1, 2, 200), left_padding([200, 120]).cuda()
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 2}):
        torch.manual_seed(0)
        want = model.generate(ids, attention_mask=mask, max_new_tokens=20, **options)
        torch.manual_seed(0)
        with attach(model):
            cache = KCache(model, WHOLE.replace(backend=backend))
            got = model.generate(ids, attention_mask=mask, max_new_tokens=20, **holding(cache), **options)
        assert torch.equal(got, want), options
        assert cache.stats.rows_fetched > 0


# -- memory --------------------------------------------------------------------------------------------------------

WIDE = {"hidden_size": 64, "num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 128, "num_hidden_layers": 16}
CONTEXT = 16384


@pytest.mark.parametrize("chunk", [CONTEXT, 4096])
def test_v_of_offloaded_layers_leaves_the_device(chunk: int) -> None:
    """V a layer is 32 MiB, all V 512 MiB: after prefill none of it is there, and the peak never held much of it."""
    model = big(torch.bfloat16, **WIDE)
    ids = ids_of(1, 1, CONTEXT)
    warm_up(model)
    settle()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad():
        model(input_ids=ids[:, :chunk], use_cache=False, logits_to_keep=1)
    activations = torch.cuda.max_memory_allocated() - base
    settle()

    cache = KCache(model, WHOLE.replace(topn=64, hot_rows=0, k_bits=16), max_length=CONTEXT + 64)
    torch.cuda.reset_peak_memory_stats()
    with attach(model), cache.exact():
        for piece in ids.split(chunk, 1):
            forward(model, cache, piece, logits_to_keep=1)
    settle()
    peak = torch.cuda.max_memory_allocated() - base
    held = torch.cuda.memory_allocated() - base

    stats = cache.stats
    layers = WIDE["num_hidden_layers"]
    row = 8 * 128 * 2
    v_layer = CONTEXT * row
    k_bytes = layers * (CONTEXT + 64) * row
    assert stats.k_bytes == k_bytes
    assert stats.resident_v_bytes == 0
    assert stats.host_bytes == k_bytes
    assert stats.device_bytes <= held <= stats.device_bytes + v_layer // 4, "more on the device than the cache counts"
    assert peak <= stats.device_bytes + activations + 3.5 * v_layer
    assert stats.bytes_d2h == layers * v_layer
    assert all(layer.values.device.type == "cpu" for layer in cache.tiered_layers)

    with attach(model):
        for step in range(3):
            forward(model, cache, ids_of(step, 1, 1))
    settle()
    assert torch.cuda.memory_allocated() - base <= stats.device_bytes + v_layer // 4 + 2**24
    del cache
    settle()
    assert torch.cuda.memory_allocated() - base <= 2**24, "a cache that is gone keeps device memory"


def test_resident_layers_follow_the_budget() -> None:
    model = big(torch.bfloat16, **WIDE)
    row = 8 * 128 * 2
    length = 2048
    k_bytes = 16 * length * row
    budget = k_bytes + 6 * length * row + 16 * (length // 16) * row
    policy = Policy(dense_below=0, dense_layers=0, kv_budget=budget, hot_rows=0, k_bits=16)
    cache = KCache(model, policy, max_length=length)
    warm_up(model)
    settle()
    base = torch.cuda.memory_allocated()
    with attach(model):
        forward(model, cache, ids_of(1, 1, length - 8), logits_to_keep=1)
    settle()
    kinds = [layer.kind for layer in cache.snapshot().layers]
    assert kinds == ["resident"] * 6 + ["tiered"] * 10
    assert cache.stats.device_bytes <= budget
    assert torch.cuda.memory_allocated() - base <= budget + 2**22


def test_a_roomy_card_keeps_everything_and_fetches_nothing() -> None:
    pair = Pair(big(), Policy(dense_below=0), tolerance=LOOSE)
    pair.forward(ids_of(1, 2, 200))
    pair.decode(5)
    stats = pair.ours.stats
    assert stats.host_bytes == stats.rows_fetched == stats.bytes_d2h == stats.bytes_h2d == 0


# -- streams -------------------------------------------------------------------------------------------------------


def churn() -> None:
    """Take the memory just freed and write over it: a copy that still reads it would see this."""
    junk = [torch.full((size,), float("nan"), device="cuda") for size in (2**12, 2**16, 2**18, 2**20)]
    del junk


@pytest.mark.parametrize("seed", range(20))
def test_copies_out_survive_reuse_of_the_device_memory(seed: int) -> None:
    """Bitwise: what ``update`` was given is what the host tier holds, though its memory is overwritten at once."""
    draw = random.Random(seed)
    model = big(num_hidden_layers=3)
    batch, dim = draw.randint(1, 4), 64
    cache = KCache(model, WHOLE, max_length=draw.choice([None, 4096]))
    kept: list[list[torch.Tensor]] = [[], [], []]
    for _ in range(draw.randint(2, 6)):
        count = draw.choice([1, 1, draw.randint(2, 700)])
        for layer in range(3):
            k = torch.randn(batch, count, 2, dim, device="cuda").transpose(1, 2)
            v = torch.randn(batch, count, 2, dim, device="cuda").transpose(1, 2)
            kept[layer].append(v.cpu())
            v = v * 1.0  # a tensor whose only owner is the cache
            with attach(model):
                cache.update(k, v, layer)
            del k, v
            churn()
    for layer in range(3):
        values = cache.layers[layer].values
        assert torch.equal(values.cpu(), torch.cat(kept[layer], 2))


@pytest.mark.parametrize("seed", range(8))
def test_random_runs_equal_stock(seed: int) -> None:
    """Chunks, turns, padding and decode in random shapes, with the freed memory overwritten between forwards."""
    draw = random.Random(1000 + seed)
    heads = draw.choice([(8, 1), (8, 2), (8, 8)])
    model = big(num_attention_heads=heads[0], num_key_value_heads=heads[1], num_hidden_layers=3)
    policy = WHOLE.replace(backend=draw.choice(BACKENDS), dense_below=draw.choice([0, 0, 150]))
    pair = Pair(model, policy, max_length=None if seed % 4 == 0 else 3000, tolerance=LOOSE)
    batch = draw.randint(1, 4)
    for turn in range(draw.randint(1, 4)):
        lengths = [draw.randint(2, 600) for _ in range(batch)]
        padded = left_padding(lengths).cuda() if draw.random() < 0.7 else None
        with pair.ours.exact():
            pair.forward(ids_of(turn, batch, max(lengths)), padded)
        churn()
        for step in range(draw.randint(0, 12)):
            pair.forward(ids_of(100 * turn + step, batch, 1))
            churn()
    torch.cuda.synchronize()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reader", ["values", "crop", "select", "grow"])
def test_the_host_never_reads_rows_that_are_still_on_their_way(backend: str, reader: str) -> None:
    """The device is kept busy first, so a decode step's copies are late; host reads must wait for them."""
    model = big(num_hidden_layers=3)
    cache, calm = (KCache(model, WHOLE.replace(backend=backend)) for _ in range(2))
    with attach(model):
        for each in (cache, calm):
            forward(model, each, ids_of(1, 2, 191))
        torch.cuda.synchronize()
        token = ids_of(2, 2, 1)
        forward(model, calm, token)
        torch.cuda.synchronize()
        torch.cuda._sleep(300_000_000)
        forward(model, cache, token)
        for each in (cache, calm):
            if reader == "crop":
                each.crop(-1)
            elif reader == "select":
                each.batch_select_indices(torch.tensor([1, 0], device="cuda"))
            elif reader == "grow":
                forward(model, each, ids_of(3, 2, 1))
        early = [layer.values.clone() for layer in cache.tiered_layers]
        torch.cuda.synchronize()
        for mine, layer in zip(early, calm.tiered_layers, strict=True):
            torch.testing.assert_close(mine, layer.values)
        token = ids_of(4, 2, 1)
        torch.testing.assert_close(forward(model, cache, token), forward(model, calm, token))


def test_two_caches_in_turn_on_one_model() -> None:
    pairs = [Pair(big(), WHOLE, tolerance=LOOSE) for _ in range(2)]
    for step, size in enumerate([200, 1, 1, 50, 1]):
        for number, pair in enumerate(pairs):
            pair.forward(ids_of(10 * step + number, 2, size))


def test_a_user_stream_of_his_own() -> None:
    """A forward on a side stream is ordered with the cache's copies like one on the default stream."""
    model = big()
    pair = Pair(model, WHOLE, tolerance=LOOSE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step, size in enumerate([400, 1, 1, 120, 1]):
            pair.forward(ids_of(step, 2, size))
            churn()
    stream.synchronize()


def test_deep_copy_of_a_prompt_cache_goes_on_alone() -> None:
    """The documented way to reuse a prompt: copy its cache and continue."""
    model = big()
    first = KCache(model, WHOLE)
    with attach(model):
        forward(model, first, ids_of(1, 1, 300))
        second = copy.deepcopy(first)
        got = [forward(model, second, ids_of(step, 1, 1)) for step in range(4)]
        assert first.get_seq_length() == 300
        want = [forward(model, first, ids_of(step, 1, 1)) for step in range(4)]
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, atol=LOOSE * float(other.abs().max()), rtol=0)


@pytest.mark.parametrize("padded", [False, True])
def test_a_step_does_not_wait_for_the_device(padded: bool) -> None:
    """Synchronising calls inside a TopN step of the fast backend are an error in torch's debug mode."""
    pytest.importorskip("kcache.backends.triton.backend")
    model = big(torch.bfloat16)
    ids, token = ids_of(1, 2, 512), ids_of(2, 2, 1)
    mask = left_padding([512, 300 if padded else 512]).cuda()
    masks = [torch.nn.functional.pad(mask, (0, extra), value=1) for extra in range(6)]
    cache = KCache(model, WHOLE.replace(backend="auto", topn=64), max_length=600)
    with attach(model):
        forward(model, cache, ids, masks[0])
        forward(model, cache, token, masks[1])
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for step in range(2, 5):
                forward(model, cache, token, masks[step])
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert cache.stats.rows_fetched > 0

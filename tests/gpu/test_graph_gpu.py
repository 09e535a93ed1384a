"""Decode steps replayed as CUDA graphs: the logits of steps taken one by one, at real lengths and in real dtypes.

Freed memory is overwritten with NaN between steps, so a graph that reads what it does not own shows.
"""

from __future__ import annotations

import gc

import pytest
import torch
from transformers import PreTrainedModel

from kcache.attaching import attach
from kcache.decoding.loop import decode, graph_of
from kcache.graph.decoder import PROOFS, GraphDecoder
from kcache.graph.fuse import Fusion
from kcache.machine.tape import CudaTape
from kcache.policy import Policy
from tests.gpu.test_engine_gpu import big, churn, ids_of, settle
from tests.graph.samplers import Forced
from tests.graph.twins import Twins
from tests.tiny_models import left_padding, make, tokens

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
pytest.importorskip("triton")

OFFLOADED = Policy(topn=64, dense_below=0, dense_layers=0, resident_layers=0, offload="all")
MIXED = OFFLOADED.replace(dense_layers=2, resident_layers=None)
CLOSE = 2e-3  # fp32 products on tensor cores, and other splits
LOOSE = 3e-2  # 16-bit


def twins_of(model: PreTrainedModel, policy: Policy, **more: object) -> Twins:
    close = CLOSE if model.dtype == torch.float32 else LOOSE
    return Twins(model, policy, close=close, between=churn, exact=False, **more)  # type: ignore[arg-type]


def replays(twins: Twins, least: int) -> None:
    assert twins.graph.reason is None
    assert twins.graph.replayed >= least


@pytest.mark.parametrize("policy", [MIXED, MIXED.replace(spread="even"), Policy(offload="none"), Policy.paper(64)],
                         ids=["need", "even", "dense", "paper"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_long_contexts_in_every_dtype(policy: Policy, dtype: torch.dtype) -> None:
    model = big(dtype).requires_grad_(False)
    twins = twins_of(model, policy.replace(offload=policy.offload if policy.offload == "none" else "all"),
                     max_length=6000)  # fmt: skip
    twins.prefill(ids_of(1, 2, 5000))
    twins.decode(24)
    replays(twins, 24 - PROOFS - 1)
    assert set(twins.graph.fused) == {"norm", "gated", "rotary", "joint"}


@pytest.mark.parametrize("policy", [MIXED, OFFLOADED.replace(spread="even")], ids=["need", "even"])
def test_padded_batches_turns_and_sequences_that_end_apart(policy: Policy) -> None:
    twins = twins_of(big(), policy, max_length=4000)
    twins.prefill(ids_of(1, 3, 2500), left_padding([2500, 1300, 2100]).cuda())
    twins.decode(12, end=lambda step, ended: ended.__setitem__(1, step >= 5))
    for cache in (twins.plain, twins.taped):
        cache.crop(-4)
    assert twins.mask is not None
    twins.mask = twins.mask[:, :-4]
    twins.prefill(ids_of(2, 3, 40), left_padding([40, 40, 11]).cuda())
    twins.decode(12)
    replays(twins, 12)


@pytest.mark.parametrize(
    "policy",
    [MIXED, OFFLOADED.replace(k_bits=8, v_bits=8), OFFLOADED.replace(k_bits="8+8")],
    ids=["need", "8 bits", "two planes"],
)
def test_sequences_that_leave_a_batch(policy: Policy) -> None:
    twins = twins_of(big(), policy, max_length=4000)
    twins.prefill(ids_of(1, 4, 2500), left_padding([2500, 1300, 2100, 1900]).cuda())
    twins.leave([1, 3], 6, 8)
    replays(twins, 6)


def test_growth_past_the_buffers() -> None:
    twins = twins_of(big(), MIXED)
    twins.prefill(ids_of(1, 2, 2040))
    before = twins.taped.tiered_layers[0].buffers()[0].shape[2]
    twins.decode(before - 2040 + 12)
    assert twins.graph.recorded >= 2
    replays(twins, 8)


@pytest.mark.parametrize("kind", ["ministral", "gemma2", "gemma3"])
def test_windows_and_soft_caps(kind: str) -> None:
    sizes = {"hidden_size": 256, "num_attention_heads": 8, "head_dim": 64, "sliding_window": 128}
    model = make(kind, attention="eager" if kind == "gemma2" else "sdpa", **sizes).cuda()
    twins = twins_of(model, OFFLOADED, max_length=900)
    twins.prefill(ids_of(1, 2, 600), left_padding([600, 450]).cuda())
    twins.decode(20)
    replays(twins, 8)


@pytest.mark.parametrize("kind", ["llama", "mha", "mqa", "qwen3", "phi3"])
def test_other_families(kind: str) -> None:
    model = make(kind, hidden_size=256, num_attention_heads=8, head_dim=64).cuda()
    twins = twins_of(model, OFFLOADED, max_length=900)
    twins.prefill(ids_of(1, 1, 700))
    twins.decode(10)
    replays(twins, 4)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "phi3"])
def test_joint_products_take_no_more_memory_and_leave_the_model_as_it_was(kind: str) -> None:
    """Projections hold 228 MiB; a stream's own scratch memory of matrix products is less than half of that."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 8, "num_key_value_heads": 2}
    model = make(kind, dtype=torch.bfloat16, **sizes, head_dim=128, num_hidden_layers=12, initializer_range=0.05)
    model = model.cuda().requires_grad_(False)
    ids = ids_of(3, 2, 40)
    with torch.no_grad():
        before = model(ids, use_cache=False).logits
    twins = twins_of(model, OFFLOADED, max_length=900)
    twins.prefill(ids_of(1, 2, 600))
    settle()
    held = torch.cuda.memory_allocated()
    fusion, stream = Fusion(model), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), fusion.applied(), torch.cuda.stream(stream):
        model(ids[:, :1], use_cache=False)
    settle()
    assert fusion.used.get("joint", 0) == (0 if kind == "phi3" else 24)
    assert torch.cuda.memory_allocated() - held <= 2**27
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, before, rtol=0, atol=0)
    twins.decode(8)
    assert twins.graph.recorded == 1
    replays(twins, 4)


def test_two_caches_replay_in_turn() -> None:
    model = big()
    pairs = [twins_of(model, MIXED, max_length=900) for _ in range(2)]
    for number, twins in enumerate(pairs):
        twins.prefill(ids_of(number, 2, 500 + 100 * number))
    for turn in range(3):
        for twins in pairs:
            twins.decode(6, seed=turn)
    for twins in pairs:
        assert twins.graph.recorded == 1
        replays(twins, 10)


def test_long_generation() -> None:
    """Thousands of replays keep to what steps taken one by one would say, at the end as in the beginning."""
    twins = twins_of(big(torch.bfloat16, num_hidden_layers=2), OFFLOADED.replace(spread="even"), max_length=6000)
    twins.prefill(ids_of(1, 2, 1500))
    forced = tokens(3, 4097, 2).cuda()
    for cache in (twins.plain, twins.taped):
        steps = decode(twins.model, cache, twins.logits, Forced(forced), forced[:1].T)
        with attach(twins.model):
            for _ in range(4097):
                next(steps)
            steps.close()  # type: ignore[attr-defined]
    twins.decode(4)
    replays(twins, 4000)


def test_a_replayed_step_does_not_wait_for_the_device() -> None:
    model = big(torch.bfloat16)
    twins = twins_of(model, MIXED, max_length=900)
    twins.prefill(ids_of(1, 2, 600))
    twins.decode(PROOFS + 3)
    graph, token = twins.graph, ids_of(2, 2, 1)[:, 0]
    with attach(model):
        run = graph.begin(model, twins.taped)
        assert graph.launch(run, token) is not None
        graph.commit(run)
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(4):
                assert graph.launch(run, token) is not None
                graph.commit(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        graph.leave(run)


def test_reading_a_token_does_not_wait_for_the_step_that_follows() -> None:
    """The device is kept busy behind the choice of a token: the token is there long before that ends."""
    model = big(torch.bfloat16)
    twins = twins_of(model, MIXED, max_length=900)
    twins.prefill(ids_of(1, 1, 600))
    cache = twins.taped
    replay = GraphDecoder.launch
    busy: list[torch.cuda.Event] = []

    def slow(self: GraphDecoder, *values: object) -> torch.Tensor | None:
        result = replay(self, *values)  # type: ignore[arg-type]
        if len(busy) == 6:
            torch.cuda._sleep(2_000_000_000)
        busy.append(torch.cuda.current_stream().record_event())
        return result

    forced = tokens(3, 12, 1).cuda()
    steps = decode(model, cache, twins.logits, Forced(forced), forced[:1].T)
    with pytest.MonkeyPatch.context() as patch, attach(model):
        patch.setattr(GraphDecoder, "launch", slow)
        for _ in range(7):
            next(steps)
        assert not busy[-1].query(), "the token was read only after the device had gone on"
        steps.close()  # type: ignore[attr-defined]
    torch.cuda.synchronize()


def test_a_cache_that_is_gone_gives_its_graph_back() -> None:
    model = big(torch.bfloat16)
    twins_of(model, MIXED, max_length=900).prefill(ids_of(1, 2, 600))  # what torch keeps for good is there before
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    base = torch.cuda.memory_allocated()
    twins = twins_of(model, MIXED, max_length=4000)
    twins.prefill(ids_of(1, 2, 3000))
    twins.decode(8)
    replays(twins, 4)
    del twins
    gc.collect()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() - base <= 2**27


def device_is_as_before() -> None:
    """Allocator and generator know of no capture."""
    torch.cuda.empty_cache()
    assert torch.randn(8, device="cuda").isfinite().all()
    assert not torch.cuda.is_current_stream_capturing()


def test_a_capture_that_fails_in_its_midst_is_undone() -> None:
    x = torch.ones(1000, device="cuda")

    def step() -> torch.Tensor:
        y = x * 2
        if torch.cuda.is_current_stream_capturing():
            return y * float(y.sum())  # waits for the device, which ends the capture
        return y

    with pytest.raises(RuntimeError):
        CudaTape().record(step, torch.device("cuda", torch.cuda.current_device()))
    device_is_as_before()
    tape = CudaTape()
    y = tape.record(lambda: x * 3, x.device)
    tape.replay()
    assert torch.equal(y, x * 3)


def test_a_graph_that_cannot_be_captured_is_done_without() -> None:
    """A step that asks the device for a value fails while it is captured; decoding goes on, and so does the device."""
    rope = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    model = big(rope_parameters=rope)
    twins = twins_of(model, MIXED, max_length=900)
    cache, plain = twins.taped, twins.plain
    assert cache.shared.make_tape is CudaTape
    twins.prefill(ids_of(1, 1, 600))
    forced = tokens(3, 6, 1).cuda()
    seen = []
    for each in (plain, cache):
        sampler = Forced(forced)
        steps = decode(model, each, twins.logits, sampler, forced[:1].T)
        with attach(model):
            for _ in range(6):
                next(steps)
            steps.close()  # type: ignore[attr-defined]
        seen.append(sampler.seen)
    graph = graph_of(cache)
    assert graph is not None
    assert graph.reason is not None
    device_is_as_before()
    for want, got in zip(*seen, strict=True):
        torch.testing.assert_close(got, want, atol=CLOSE * float(want.abs().max()), rtol=0)

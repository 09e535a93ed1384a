"""Recorded steps against steps taken one by one: the same logits and tokens, whatever happens to the cache in between.

The tape of these tests replays operators and kernels on the very tensors it recorded, so a length or a choice that was
worked out on the host is wrong from the second step on.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kcache.attaching import attach
from kcache.cache import KCache
from kcache.decoding.forward import prefill, step_logits
from kcache.decoding.loop import decode, graph_of
from kcache.graph.decoder import PROOFS
from kcache.machine.arriving import Arriving
from kcache.policy import Policy
from kcache.watch.capture import Capture
from tests.graph.recorder import RecordedTape
from tests.graph.samplers import Forced
from tests.graph.twins import Twins
from tests.tiny_models import left_padding, make, tokens

OFFLOADED = Policy(
    topn=6, dense_below=0, dense_layers=0, resident_layers=0, offload="all", backend="triton", spread="even",
    hot_rows=0,
)  # fmt: skip
MIXED = OFFLOADED.replace(dense_layers=1, resident_layers=None)
SMALL = {"head_dim": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


@pytest.fixture(scope="module")
def llama() -> PreTrainedModel:
    return make("llama", **SMALL)


def test_triton_replayed_steps_equal_steps_taken_one_by_one() -> None:
    twins = Twins(make("llama", head_dim=16, num_hidden_layers=2), MIXED, RecordedTape, max_length=64)
    twins.prefill(tokens(1, 1, 24))
    twins.decode(5)
    assert twins.graph.recorded == 1
    assert twins.graph.replayed == 5 - PROOFS
    kinds = [layer.mode for layer in twins.taped.snapshot().layers]
    assert kinds == ["dense", "topn"]


def test_triton_a_second_turn_needs_no_second_recording(llama: PreTrainedModel) -> None:
    """Prompt, answer, the answer cut back, another prompt, another answer: buffers stay, so the recording does."""
    twins = Twins(llama, MIXED, RecordedTape, max_length=64)
    twins.prefill(tokens(1, 1, 20))
    twins.decode(5)
    for cache in (twins.plain, twins.taped):
        cache.crop(-3)
    twins.prefill(tokens(2, 1, 9))
    twins.decode(4)
    assert twins.graph.recorded == 1
    assert twins.graph.replayed == 9 - PROOFS


def test_triton_a_threshold_goes_on_from_replay_to_replay(llama: PreTrainedModel) -> None:
    """The first step makes the threshold; then it follows on the device, and rows are tallied there."""
    twins = Twins(llama, OFFLOADED.replace(spread="need"), RecordedTape, max_length=48)
    twins.prefill(tokens(1, 2, 24), left_padding([24, 17]))
    twins.decode(5)
    assert twins.graph.recorded == 1
    assert twins.graph.replayed == 5 - PROOFS - 1
    got, want = (cache.shared.spread for cache in (twins.taped, twins.plain))
    assert got is not None and want is not None
    for mine, theirs in zip(got.state, want.state, strict=True):
        torch.testing.assert_close(mine, theirs)
    assert len(set(want.state[-1].tolist())) == 2


@pytest.mark.parametrize("steps", [2, 5])
def test_triton_hot_rows_of_a_step_that_was_not_taken_in_are_forgotten(llama: PreTrainedModel, steps: int) -> None:
    """The store may hold V of the row past the end; another token's row comes to that place in the next turn.

    After two steps the one past the end was on trial, after five it was under way.
    """
    twins = Twins(llama, OFFLOADED.replace(hot_rows=32, topn=30), RecordedTape, max_length=48)
    twins.prefill(tokens(1, 1, 12))
    twins.decode(steps)
    twins.prefill(tokens(2, 1, 12))
    twins.decode(3)
    assert twins.taped.stats.hot_hits > 0
    assert twins.graph.recorded == 1


def test_triton_padded_batches_whose_sequences_end_apart(llama: PreTrainedModel) -> None:
    """Ended sequences are fed padding that nobody may attend; the next turn goes on from there."""
    twins = Twins(llama, OFFLOADED, RecordedTape, max_length=64)
    twins.prefill(tokens(1, 2, 20), left_padding([11, 20]))
    twins.decode(5, end=lambda step, ended: ended.__setitem__(1, step >= 2))
    twins.prefill(tokens(2, 2, 4), left_padding([4, 2]))
    twins.decode(2)
    assert twins.graph.recorded == 1
    assert twins.graph.replayed == 7 - PROOFS - 1, "one step fits the directions of V anew"


def test_triton_a_sequence_that_ends_first_makes_a_mask(llama: PreTrainedModel) -> None:
    """Nothing is padded until a sequence ends: from then on the recording has to read a mask."""
    twins = Twins(llama, OFFLOADED, RecordedTape, max_length=64)
    twins.prefill(tokens(1, 2, 20))
    twins.decode(6, end=lambda step, ended: ended.__setitem__(0, step >= 3))
    assert twins.graph.recorded == 2


@pytest.mark.parametrize(
    ("policy", "lengths"),
    [
        (MIXED.replace(spread="need", hot_rows=8), [11, 9, 14]),
        (MIXED.replace(spread="need", k_bits=8, v_bits=8), None),
        (MIXED.replace(spread="need", hot_rows=8, k_bits="8+8"), [11, 9, 14]),
    ],
    ids=["padded", "8 bits", "two planes"],
)
def test_triton_sequences_that_leave_a_batch(llama: PreTrainedModel, policy: Policy, lengths: list[int] | None) -> None:
    """Those that stay are shown what they would be without; the step is recorded anew for so many."""
    twins = Twins(llama, policy, RecordedTape, max_length=32)
    twins.prefill(tokens(1, 3, 14), None if lengths is None else left_padding(lengths))
    twins.leave([0, 2], 3, 6)
    assert twins.graph.recorded == 2
    assert twins.graph.replayed >= 2


def test_triton_growth_past_the_buffers_records_anew(llama: PreTrainedModel) -> None:
    twins = Twins(llama, MIXED, RecordedTape)
    twins.prefill(tokens(1, 1, 60))
    assert twins.taped.tiered_layers[0].buffers()[0].shape[2] == 64
    twins.decode(9)
    assert twins.taped.tiered_layers[0].buffers()[0].shape[2] == 128
    assert twins.graph.recorded == 2
    assert twins.graph.replayed == 9 - 2 * PROOFS - 1


@pytest.mark.parametrize("tail", ["none", "renormalise"])
@pytest.mark.parametrize("select", ["group", "head"])
def test_triton_other_tails_and_selections(llama: PreTrainedModel, tail: Any, select: Any) -> None:
    twins = Twins(llama, OFFLOADED.replace(tail=tail, select=select), RecordedTape, max_length=40)
    twins.prefill(tokens(1, 1, 20))
    twins.decode(4)
    assert twins.graph.replayed == 4 - PROOFS


@pytest.mark.parametrize("bits", [{"k_bits": 8, "v_bits": 8}, {"k_bits": "8+8"}], ids=str)
def test_triton_rows_in_8_bits(llama: PreTrainedModel, bits: dict[str, Any]) -> None:
    twins = Twins(llama, OFFLOADED.replace(**bits), RecordedTape, max_length=40)
    twins.prefill(tokens(1, 1, 20))
    twins.decode(4)
    assert twins.graph.replayed == 4 - PROOFS


def test_triton_v_that_leaves_the_device_does_so_between_recordings(llama: PreTrainedModel) -> None:
    twins = Twins(llama, OFFLOADED.replace(dense_below=24), RecordedTape, max_length=64)
    twins.prefill(tokens(1, 1, 18))
    twins.decode(10)
    assert [layer.mode for layer in twins.taped.snapshot().layers] == ["topn"] * 2
    assert twins.graph.recorded == 2


def test_triton_copies_of_a_cache_and_two_caches_do_not_meet(llama: PreTrainedModel) -> None:
    one, other = (Twins(llama, OFFLOADED, RecordedTape, max_length=48) for _ in range(2))
    one.prefill(tokens(1, 1, 20))
    other.prefill(tokens(2, 1, 14))
    one.decode(3)
    twin = copy.deepcopy(one.taped)
    assert graph_of(twin) is not one.graph
    other.decode(3)
    one.decode(2)
    other.decode(1)
    assert one.graph.recorded == other.graph.recorded == 1
    assert twin.get_seq_length() == 23
    assert torch.equal(twin.tiered_layers[0].keys, one.taped.tiered_layers[0].keys[:, :, :23])


@pytest.mark.parametrize("kind", ["ministral", "gemma2", "gemma3", "gpt_oss"])
def test_triton_sliding_windows_in_a_ring(kind: str) -> None:
    """The window (12 rows) fills, wraps round, and is handed back in order for the next prompt."""
    changes = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
    model = make(kind, attention="eager" if kind in ("gemma2", "gpt_oss") else "sdpa", **{**SMALL, **changes})
    if kind == "gpt_oss":
        model.set_experts_implementation("batched_mm")
    twins = Twins(model, OFFLOADED.replace(tail="renormalise"), RecordedTape, max_length=32)
    twins.prefill(tokens(1, 2, 9), left_padding([9, 5]))
    twins.decode(5)
    twins.prefill(tokens(2, 2, 3), left_padding([3, 3]))
    twins.decode(2)
    assert twins.graph.recorded == 1
    assert twins.graph.replayed == 7 - PROOFS


def test_triton_a_run_that_ends_early_leaves_the_cache_as_the_caller_saw_it(llama: PreTrainedModel) -> None:
    """The step under way when the caller leaves was never taken in: the cache goes on as if it had not been."""
    twins = Twins(llama, MIXED, RecordedTape, max_length=64)
    twins.prefill(tokens(1, 1, 20))
    twins.decode(4)
    forced = tokens(5, 2, 1)
    run = decode(llama, twins.taped, twins.logits, Forced(forced), forced[:1].T)
    with attach(llama):
        next(run)
        assert twins.graph._launched
        run.close()  # type: ignore[attr-defined]
    twins.check_state()
    with attach(llama):
        got, want = (step_logits(llama, cache, tokens(6, 1, 1)) for cache in (twins.taped, twins.plain))
    torch.testing.assert_close(got, want, atol=twins.close * float(want.abs().max()), rtol=0)


def test_triton_viewers_see_replayed_steps(llama: PreTrainedModel) -> None:
    """Frames of a run that replays are those of a run that does not, token ids and picks included."""
    frames = []
    for tape in (None, RecordedTape):
        cache = KCache(llama, MIXED, max_length=64)
        cache.shared.make_tape = tape
        forced = tokens(7, 7, 1)
        capture = Capture(llama, lambda: None, cache)
        capture.due_s = 0.0
        with attach(llama):
            *_, (logits, _) = prefill(llama, cache, tokens(1, 1, 20), None)
            steps = decode(llama, cache, logits, Forced(forced), forced[:1].T)
            for _ in range(7):
                next(steps)
            steps.close()  # type: ignore[attr-defined]
        capture.stop()
        assert not vars(llama)["_kcache_watchers"]
        seen = [forward.ids.numpy().tolist() for forward in capture.forwards if forward.ids is not None]
        frames.append((seen, [(frame.counts, frame.modes, _values(frame.positions)) for frame in capture.ready]))
        if tape is not None:
            graph = graph_of(cache)
            assert graph is not None
            assert graph.replayed == 6 - PROOFS
    assert frames[0] == frames[1]
    assert len(frames[0][1]) == 7


def _values(parts: tuple[Arriving, ...]) -> list[list[int]]:
    return [part.numpy().tolist() for part in parts]

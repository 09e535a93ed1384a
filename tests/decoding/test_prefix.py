"""Sequences that are read once or leave a batch: where that must not be, and what it takes of memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kcache.attaching import attach
from kcache.cache import KCache
from kcache.decoding.forward import prefill, step_logits
from kcache.decoding.pieces import keeps_states
from kcache.decoding.prefix import read_once, shared_length
from kcache.decoding.sampling import Sampling
from kcache.errors import DoesNotFitError
from kcache.generation import generate
from kcache.layers.residency import Residency
from kcache.models.loaded import LoadedModel
from kcache.policy import Policy
from kcache.tiers.rows import RowBuffer
from kcache.verify.judge import _build
from kcache.verify.shrink import shrink
from tests.saved import byte_tokenizer, byte_vocabulary
from tests.tiny_models import make, tokens

OFFLOADED = Policy(topn=6, dense_below=0, dense_layers=0, offload="all")
BEGINNING = list(range(3, 23))
EVEN = [[*BEGINNING, 30 + index, 7] for index in range(3)]
UNEVEN = [[*BEGINNING, 30], [*BEGINNING, 31, 7, 8], [*BEGINNING, 32, 9]]


@pytest.mark.parametrize(("kind", "even", "uneven"), [("opt", 20, 20), ("bart", 20, 0), ("doge", 0, 0)])
def test_who_counts_positions_or_has_masks_of_its_own_reads_prompts_as_ever(
    kind: str, even: int, uneven: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Padding in the middle would be counted by a model that takes no positions."""
    monkeypatch.setattr("kcache.decoding.prefix.LEAST_SHARED", 8)
    alone: dict[str, Any] = {"is_decoder": True, "is_encoder_decoder": False} if kind == "bart" else {}
    model = _build(shrink(CONFIG_MAPPING[kind](**alone)))
    assert shared_length(model, KCache(model), EVEN) == even
    assert shared_length(model, KCache(model), UNEVEN) == uneven


def recurrent_gemma() -> LoadedModel:
    config = RecurrentGemmaConfig(
        vocab_size=len(byte_vocabulary()), hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=1, lru_width=32, attention_window_size=16, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = RecurrentGemmaForCausalLM(config).eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    model.generation_config.eos_token_id = 1
    return LoadedModel("tiny", model, byte_tokenizer())


def test_nobody_leaves_a_batch_whose_state_is_in_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody could take a sequence out of it: the tokens are those of a batch where none may leave."""
    lm = recurrent_gemma()
    prompts = ["ab", "xyz and so", "a quick brown fox"]

    def ids(stop: list[str]) -> list[list[int]]:
        found: list[list[int]] = [[], [], []]
        for event in generate(lm, prompts, sampling=Sampling(temperature=0), max_new_tokens=30, stop=stop):
            found[event.index].append(event.token_id)
        return found

    texts = [str(lm.tokenizer.decode(row)) for row in ids([])]
    stop = [texts[0][3:5]]
    monkeypatch.setattr("kcache.generation._MOVE", (2, 1))
    want = ids(stop)
    assert len({len(row) for row in want}) > 1, "one was meant to end before the others"
    monkeypatch.setattr("kcache.generation._MOVE", (1 / 8, 1))
    assert ids(stop) == want


def test_states_in_the_cache_are_found() -> None:
    model = _build(shrink(CONFIG_MAPPING["jamba"]()))
    cache = KCache(model)
    with attach(model):
        step_logits(model, cache, torch.tensor([[3, 4, 5]]))
    assert keeps_states(cache)


def test_those_that_stay_are_not_refused_what_they_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that others have taken meanwhile is not asked for again when sequences leave."""
    model = make("llama")
    cache = KCache(model, OFFLOADED.replace(offload="auto"), max_length=40)
    budget: list[int | None] = [None]
    monkeypatch.setattr(Residency, "_budget", lambda self, place: budget[0])
    monkeypatch.setattr(Residency, "_working", lambda *args: 0)
    with attach(model):
        step_logits(model, cache, tokens(1, 4, 20))
        kinds = [layer.kind for layer in cache.tiered_layers]
        cache.reorder_cache(torch.tensor([1, 3]))
        budget[0] = 1
        step_logits(model, cache, tokens(2, 2, 1))
        assert [layer.kind for layer in cache.tiered_layers] == kinds
        with pytest.raises(DoesNotFitError):
            step_logits(model, cache, tokens(3, 2, 30))


@pytest.mark.parametrize("v_bits", [16, 8])
def test_host_rows_read_once_stay_where_they_are(v_bits: Any) -> None:
    """Else the host tier would hold them twice for a while: what has been prepared is as much as there will be."""
    model = make("llama")
    cache = KCache(model, OFFLOADED.replace(v_bits=v_bits), max_length=40)
    ids = tokens(1, 1, 20)
    with attach(model):
        reading = read_once(model, cache, ids, 3)
        next(reading)
        places = [layer.buffers().values.data_ptr() for layer in cache.tiered_layers]
        taken = cache.stats.host_bytes
        list(reading)
        assert [layer.buffers().values.data_ptr() for layer in cache.tiered_layers] == places
        assert cache.stats.host_bytes == taken
        other = KCache(model, OFFLOADED.replace(v_bits=v_bits), max_length=40)
        list(prefill(model, other, ids.expand(3, -1), None))
        assert other.stats.host_bytes == taken
        for layer, twin in zip(cache.tiered_layers, other.tiered_layers, strict=True):
            assert layer.values is not None and twin.values is not None
            assert torch.allclose(layer.values, twin.values, atol=1e-4)


@pytest.mark.parametrize("order", [[0, 0, 0], [0, 0, 1, 2], [0, 1, 0, 1], [0, 1, 2, 2], [1, 0, 0]])
def test_copies_to_places_there_is_room_for(order: list[int]) -> None:
    buffer = RowBuffer(torch.device("cpu"), sequences=lambda: 4)
    count = max(order) + 1
    rows = torch.randn(count, 3, 5, 4)
    buffer.put(rows, 0)
    assert (buffer.places, len(buffer.view(5))) == (4, count)
    place = buffer.view(5).data_ptr()
    buffer.select(torch.tensor(order))
    assert torch.equal(buffer.view(5), rows[order])
    assert (buffer.view(5).data_ptr() == place) == (order[0] == 0)

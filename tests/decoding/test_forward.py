"""A prompt in chunks: which ids were taken in, and that the host asks the device for nothing between them."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from kcache.attaching import attach
from kcache.cache import KCache
from kcache.decoding.forward import prefill, step_logits
from kcache.decoding.pieces import takes_pieces
from kcache.policy import Policy
from kcache.verify.shrink import shrink
from kcache.verify.unusual import DEFAULTS
from tests.pair import WHOLE
from tests.tiny_models import make, tokens


def test_a_prompt_is_not_waited_for_between_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ids come to the host before the first chunk: read behind it, they would wait for the device to finish."""
    model, ids = make("llama"), tokens(1, 2, 50)
    cache, reads = KCache(model, Policy(prefill_chunk=16)), list[int]()
    want, tolist = ids[0].tolist(), torch.Tensor.tolist

    def counted(self: torch.Tensor) -> object:
        if self.dtype == torch.long:
            reads.append(cache.get_seq_length())
        return tolist(self)

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    with attach(model):
        got = [piece for _, piece in prefill(model, cache, ids, None)]
    assert reads == [0], "ids were read at these lengths"
    assert [len(piece) for piece in got] == [13, 13, 12, 12]
    assert [token for piece in got for token in piece] == want


def test_who_reads_a_prompt_is_told_how_far_layer_by_layer() -> None:
    model = make("gemma3")
    cache, told = KCache(model, Policy(prefill_chunk=16)), list[tuple[int, int]]()
    layers = len(cache.layers)
    with attach(model):
        pieces = prefill(model, cache, tokens(1, 2, 30), None, lambda done, total: told.append((done, total)))
        for number, (_, piece) in enumerate(pieces):
            assert len(piece) == 15
            assert len(told) == layers * (number + 1)
            assert told[-1] == (15 * (number + 1), 30)
        step_logits(model, cache, tokens(2, 2, 1))
    assert told == sorted(told) and len(told) == 2 * layers


def test_memory_for_a_prompt_is_made_once() -> None:
    """Its length is known before its first chunk, also where the cache does not know how long it will be."""
    model = make("llama")
    cache = KCache(model, WHOLE.replace(prefill_chunk=32))
    places = set()
    with attach(model):
        for _ in prefill(model, cache, tokens(1, 1, 200), None):
            places.add(tuple((k.data_ptr(), v.data_ptr()) for k, v in cache))
    assert len(places) == 1
    assert cache.stats.host_bytes == sum(*cache.shared.residency.host_bytes.values(), 0)
    assert cache.shared.residency.expected == 0


def test_host_memory_is_prepared_for_the_layers_that_leave() -> None:
    model = make("llama")
    for policy in (WHOLE, WHOLE.replace(dense_layers=1), WHOLE.replace(v_bits=8), Policy(offload="none")):
        cache = KCache(model, policy, max_length=70)
        with attach(model):
            for _ in prefill(model, cache, tokens(1, 2, 40), None):
                pass
        (sizes,) = cache.shared.residency.host_bytes.values()
        assert sizes == [layer.stats().host_bytes for layer in cache.tiered_layers if layer.offloaded]


def recurrent(model_type: str) -> PreTrainedModel:
    """A tiny model with recurrent states beside attention."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        small = shrink(CONFIG_MAPPING[model_type](**DEFAULTS.get(model_type, {})))
        return AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("model_type", "whether"), [("jamba", False), ("zamba", False), ("falcon_h1", True), ("bamba", True)]
)
def test_a_prompt_in_pieces_and_a_later_one_are_answered_with_all_of_the_past(model_type: str, whether: bool) -> None:
    """Where a model begins anew with several tokens, they do not come; without positions, Bamba counts from 0."""
    model, ids = recurrent(model_type), tokens(1, 1, 60)
    with torch.no_grad():
        want = model(input_ids=ids).logits[0]
    atol = 1e-4 * float(want.abs().max())
    cache = KCache(model, WHOLE.replace(prefill_chunk=16))
    with attach(model):
        for start, end in ((0, 40), (40, 59)):
            logits = [newest for newest, _ in prefill(model, cache, ids[:, start:end], None)]
            torch.testing.assert_close(logits[-1][0], want[end - 1], rtol=0, atol=atol)
        step = step_logits(model, cache, ids[:, 59:])
    torch.testing.assert_close(step[0], want[59], rtol=0, atol=atol)
    assert takes_pieces(model) is whether
    assert takes_pieces(make("llama"))


@pytest.mark.parametrize(
    ("model_type", "whether"),
    [("deepseek_v32", False), ("doge", False), ("moshi", False), ("recurrent_gemma", False), ("deepseek_v3", True)],
)
def test_models_of_stock_layers_alone_get_prompts_as_stock_gives_them(model_type: str, whether: bool) -> None:
    """In pieces some of them answer otherwise; those that keep latents do not."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shrink(CONFIG_MAPPING[model_type]())).eval()
    ids = tokens(1, 1, 41) % model.config.get_text_config().vocab_size
    cache, stock = KCache(model, WHOLE.replace(prefill_chunk=16)), KCache(model, WHOLE)
    with attach(model), torch.no_grad():
        for start, end in ((0, 32), (32, 40)):
            *_, (got, _) = prefill(model, cache, ids[:, start:end], None)
        want = step_logits(model, stock, ids[:, :32])
        for at in range(32, 40):
            want = step_logits(model, stock, ids[:, at : at + 1])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-4 * float(want.abs().max()))
    assert takes_pieces(model) is whether

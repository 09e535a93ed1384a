"""A prompt in chunks: which ids were taken in, and that the host asks the device for nothing between them."""

from __future__ import annotations

import pytest
import torch

from kcache.attention import attach
from kcache.cache import KCache
from kcache.forward import prefill, step_logits
from kcache.policy import Policy
from tests.models import make, tokens
from tests.pair import WHOLE


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

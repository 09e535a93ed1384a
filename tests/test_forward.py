"""A prompt in chunks: which ids were taken in, and that the host asks the device for nothing between them."""

from __future__ import annotations

import pytest
import torch

from kcache.attention import attach
from kcache.cache import KCache
from kcache.forward import prefill
from kcache.policy import Policy
from tests.models import make, tokens


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

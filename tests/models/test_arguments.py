"""A cache is handed over by the name that a model's forward has for it, be it of transformers or of someone else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache, LlamaForCausalLM
from transformers.cache_utils import DynamicLayer

from kcache.attaching import attach
from kcache.attention.probe import probe
from kcache.cache import KCache
from kcache.decoding.forward import step_logits
from kcache.errors import UnsupportedModelError
from kcache.models.arguments import cache_in, with_cache
from kcache.models.support import check_supported, untried
from tests.pair import WHOLE
from tests.tiny_models import config, holding, make, tokens


class Earlier(LlamaForCausalLM):  # as code that comes with a model's weights is written
    def forward(  # type: ignore[override]
        self, input_ids: Any = None, attention_mask: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> Any:
        return super().forward(input_ids, attention_mask, **holding(past_key_values), **kwargs)


class Later(LlamaForCausalLM):
    def forward(  # type: ignore[override]
        self, input_ids: Any = None, attention_mask: Any = None, cache: Any = None, **kwargs: Any
    ) -> Any:
        return super().forward(input_ids, attention_mask, **holding(cache), **kwargs)


class Unnamed(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("kind", [Earlier, Later, Unnamed])
def test_a_cache_is_given_by_the_name_that_the_model_has_for_it(kind: type[LlamaForCausalLM]) -> None:
    model = kind(config("llama")).eval()
    stock = make("llama")
    stock.load_state_dict(model.state_dict())
    cache, past = KCache(model, WHOLE), DynamicCache(config=stock.config)
    assert cache_in(with_cache(model, cache)) is cache
    with attach(model), torch.no_grad():
        for count in (20, 1, 1):
            ids = tokens(count, 1, count)
            want = stock(ids, **holding(past)).logits[:, -1]
            torch.testing.assert_close(step_logits(model, cache, ids), want, rtol=1e-5, atol=1e-5)
    assert cache.get_seq_length() == 22


class Growing(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        cache: Any = cache_in(kwargs)
        if len(cache.layers) == self.config.num_hidden_layers:
            cache.layers.append(DynamicLayer())
        return super().forward(*args, **kwargs)


def test_a_model_that_adds_layers_to_its_cache_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="adds layers to its cache"):
        probe(Growing(config("llama")).eval())


def test_recurrent_states_alone_are_no_kv_cache() -> None:
    from transformers import JambaConfig, MambaConfig

    with pytest.raises(UnsupportedModelError, match="keeps no KV cache"):
        check_supported(MambaConfig(), "it")
    check_supported(JambaConfig(), "it")


@pytest.mark.parametrize(
    ("version", "newer"),
    [("5.17.0", False), ("5.24.3", False), ("5.25.0.dev0", True), ("6.0.0rc1", True), ("?", False)],
)
def test_which_transformers_are_newer_than_any_that_was_tried(version: str, newer: bool) -> None:
    found = untried(version)
    assert (found is not None) == newer
    if found is not None:
        what, command = found
        assert version in what
        assert "transformers<5.25" in command

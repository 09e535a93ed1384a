"""A block replayed inside the layers is the same as stepping token by token: logits, picks, counters, tiers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kcache import KCache, Policy, attach
from kcache.attention.handles import AttentionCall
from kcache.errors import CacheStateError
from kcache.layers.tiered import TieredLayer
from tests.tiny_models import holding, left_padding, tokens

Tiny = Callable[..., PreTrainedModel]
PROMPT, STEPS = 37, 23
IDS = tokens(1, 1, PROMPT + STEPS)


class Seen:
    """Everything a run shows."""

    def __init__(self) -> None:
        self.logits: list[torch.Tensor] = []
        self.picks: dict[tuple[int, int], Any] = {}
        self.outs: dict[tuple[int, int], torch.Tensor] = {}

    def look(self, layer: TieredLayer, call: AttentionCall, out: torch.Tensor) -> None:
        self.picks[layer.index, layer.length] = _sorted(layer.picks)
        self.outs[layer.index, layer.length] = out


def _sorted(picks: torch.Tensor | None) -> Any:
    return None if picks is None else picks.sort(-1).values.tolist()


@torch.no_grad()
def step(model: PreTrainedModel, policy: Policy) -> tuple[Seen, KCache]:
    """Token by token."""
    seen, cache = Seen(), KCache(model, policy, max_length=PROMPT + STEPS)
    with attach(model):
        with cache.exact():
            model(IDS[:, :PROMPT], **holding(cache))
        for token in IDS[:, PROMPT:].split(1, 1):
            seen.logits.append(model(token, **holding(cache)).logits[0])
            for layer in cache.tiered_layers:
                if layer.offloaded:
                    seen.picks[layer.index, layer.length] = _sorted(layer.picks)
    return seen, cache


@torch.no_grad()
def block(model: PreTrainedModel, policy: Policy, sizes: tuple[int, ...]) -> tuple[Seen, KCache]:
    """In blocks of these sizes."""
    seen, cache = Seen(), KCache(model, policy, max_length=PROMPT + STEPS)
    with attach(model):
        with cache.exact():
            model(IDS[:, :PROMPT], **holding(cache))
        with cache.stepwise(seen.look):
            for piece in IDS[:, PROMPT:].split(sizes, 1):
                seen.logits.append(model(piece, **holding(cache)).logits[0])
    return seen, cache


BASE = Policy(topn=5, spread="even", dense_layers=1, dense_below=0, backend="reference")
POLICIES = {
    "group, directions": BASE,
    "head, directions": BASE.replace(select="head"),
    "group, renormalised": BASE.replace(tail="renormalise"),
    "head, no tail": BASE.replace(select="head", tail="none"),
    "nothing dense": BASE.replace(dense_layers=0),
    "offloaded in the middle of a block": BASE.replace(dense_below=PROMPT + 9),
    "offloaded at the block's last row": BASE.replace(dense_below=PROMPT + 16),
    "never offloaded": BASE.replace(dense_below=1000),
    "cpu backend": BASE.replace(backend="cpu"),
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("sizes", [(STEPS,), (16, 7), (3, 1, 12, 7)], ids=str)
def test_a_block_is_its_steps(tiny_model: Tiny, policy: Policy, sizes: tuple[int, ...]) -> None:
    model = tiny_model("llama")
    stepped, one = step(model, policy)
    replayed, many = block(model, policy, sizes)
    torch.testing.assert_close(torch.cat(replayed.logits), torch.cat(stepped.logits), rtol=1e-4, atol=1e-4)
    offloaded = {key: picks for key, picks in stepped.picks.items() if key in replayed.picks}
    assert {key: replayed.picks[key] for key in offloaded} == offloaded
    for alone, together in zip(one.tiered_layers, many.tiered_layers, strict=True):
        assert together.offloaded == alone.offloaded
        assert together.stats().rows_fetched == alone.stats().rows_fetched
        assert together.stats().steps == alone.stats().steps == STEPS
        assert together.stats().bytes_h2d == alone.stats().bytes_h2d
        assert together.stats().device_bytes == alone.stats().device_bytes
        torch.testing.assert_close(together.values, alone.values, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_layers_that_depend_on_each_other_replay_single_tokens_alone(tiny_model: Tiny, backend: Any) -> None:
    """A block would let the first layer run ahead of the thresholds that all layers share."""
    model, policy = tiny_model("llama"), BASE.replace(spread="need", backend=backend)
    stepped, one = step(model, policy)
    replayed, many = block(model, policy, (1,) * STEPS)
    torch.testing.assert_close(torch.cat(replayed.logits), torch.cat(stepped.logits), rtol=1e-4, atol=1e-4)
    assert replayed.picks == stepped.picks
    assert many.stats.rows_fetched == one.stats.rows_fetched
    assert len(replayed.outs) == 2 * STEPS
    with pytest.raises(CacheStateError, match="feed the tokens one by one"):
        block(model, policy, (STEPS,))


def test_every_step_of_every_offloaded_layer_is_shown(tiny_model: Tiny) -> None:
    seen, cache = block(tiny_model("llama"), BASE, (16, 7))
    lengths = range(PROMPT + 1, PROMPT + STEPS + 1)
    assert set(seen.outs) == {(index, length) for index in (1, 2) for length in lengths}
    assert all(out.shape == (1, 4, 1, 8) for out in seen.outs.values())
    assert cache.stats.steps == STEPS


@pytest.mark.parametrize("kind", ["qwen3", "mqa", "gpt2", "gemma2", "gemma3", "gpt_oss"])
def test_other_shapes(tiny_model: Tiny, kind: str) -> None:
    model = tiny_model(kind, attention="eager" if kind in ("gemma2", "gpt_oss") else "sdpa")
    stepped, _ = step(model, BASE)
    replayed, _ = block(model, BASE, (10, 13))
    torch.testing.assert_close(torch.cat(replayed.logits), torch.cat(stepped.logits), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_topn_makes_a_difference_here(tiny_model: Tiny) -> None:
    """Otherwise the tests above could not fail."""
    model = tiny_model("llama")
    few, _ = block(model, BASE, (STEPS,))
    every, _ = block(model, BASE.replace(topn=1000), (STEPS,))
    exact = model(IDS).logits[0, PROMPT:]
    torch.testing.assert_close(torch.cat(every.logits), exact, rtol=1e-4, atol=1e-4)
    assert (torch.cat(few.logits) - exact).abs().max() > 0.1


@torch.no_grad()
def test_outside_of_the_block_a_chunk_is_attended_exactly(tiny_model: Tiny) -> None:
    model = tiny_model("llama")
    cache = KCache(model, BASE)
    with attach(model):
        model(IDS[:, :PROMPT], **holding(cache))
        with cache.stepwise():
            pass
        logits = model(IDS[:, PROMPT:], **holding(cache)).logits[0]
    torch.testing.assert_close(logits, model(IDS).logits[0, PROMPT:], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_and_batches_are_refused(tiny_model: Tiny) -> None:
    model = tiny_model("llama")
    batch, mask = tokens(2, 2, 40), left_padding([40, 31])
    for ids, padding in ((batch, None), (batch[:1], mask[1:])):
        cache = KCache(model, BASE)
        with attach(model):
            model(ids[:, :30], **holding(cache), attention_mask=None if padding is None else padding[:, :30])
            with cache.stepwise(), pytest.raises(CacheStateError, match="one sequence without padding"):
                model(ids[:, 30:], **holding(cache), attention_mask=padding)

"""The thresholds that spread rows over layers and heads: they follow the average, each sequence for itself."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kcache import KCache, Policy, attach
from kcache.backends.base import MOST
from kcache.layers.spread import Spread, spread_of
from tests.tiny_models import holding

Tiny = Callable[..., PreTrainedModel]
CPU = torch.device("cpu")
POLICY = Policy(topn=16, dense_layers=0, dense_below=0)


def drive(spread: Spread, probs: torch.Tensor, steps: int) -> torch.Tensor:
    """Rows per head and step ``[steps, B]``; each step's ``probs`` are ``[B, layers, heads, L]``."""
    fetched = []
    for _ in range(steps):
        rows = torch.zeros(len(probs))
        for layer in range(probs.shape[1]):
            threshold, tally = spread.begin(layer, probs.shape[2], len(probs), CPU)
            counts = (probs[:, layer] > threshold.view(-1, 1, 1)).flatten(1).sum(1)
            tally += counts
            rows = rows + counts
        fetched.append(rows / probs.shape[1] / probs.shape[2])
    return torch.stack(fetched)


def attention(sharpness: float, length: int = 4096) -> torch.Tensor:
    """Probabilities of a sequence whose layers differ in how sharp they are, ``[1, 6, 2, L]``."""
    draw = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.3, 1, 6).view(1, 6, 1, 1) * sharpness
    return (torch.randn(1, 6, 2, length, generator=draw) * scale).softmax(-1)


@pytest.mark.parametrize("topn", [8, 64, 256])
@pytest.mark.parametrize("sharpness", [2.0, 5.0])
def test_the_average_comes_to_topn(topn: int, sharpness: float) -> None:
    rows = drive(Spread(Policy(topn=topn)), attention(sharpness), 60)
    assert rows[20:].mean().item() == pytest.approx(topn, rel=0.1)


def test_rows_go_where_attention_is_diffuse_enough_to_need_them() -> None:
    spread, probs = Spread(Policy(topn=64)), attention(5.0)
    drive(spread, probs, 40)
    least, _ = spread.begin(0, 2, 1, CPU)
    counts = (probs[0] > least).sum(-1).float().mean(-1)
    assert counts.max() > 1.5 * counts.min()


def test_a_sequence_does_not_know_of_its_batch() -> None:
    sharp, flat = attention(5.0), attention(2.0)
    together = drive(Spread(POLICY), torch.cat([sharp, flat]), 30)
    assert torch.equal(together[:, 0], drive(Spread(POLICY), sharp, 30)[:, 0])
    assert torch.equal(together[:, 1], drive(Spread(POLICY), flat, 30)[:, 0])


def test_thresholds_move_with_their_sequences() -> None:
    both = torch.cat([attention(5.0), attention(2.0)])
    spread, turned = Spread(POLICY), Spread(POLICY)
    drive(spread, both, 10)
    drive(turned, both, 10)
    turned.select(torch.tensor([1, 0, 0]))
    want, got = drive(spread, both, 10), drive(turned, both[[1, 0, 0]], 10)
    assert torch.equal(got, want[:, [1, 0, 0]])


def test_rows_stay_counted_when_sequences_change() -> None:
    """Also those of sequences that are dropped: they were fetched."""
    spread = Spread(POLICY)
    rows = drive(spread, torch.cat([attention(5.0), attention(2.0)]), 4)
    assert sum(spread.fetched(layer) for layer in range(6)) == int((rows * 12).sum())
    before = [spread.fetched(layer) for layer in range(6)]
    spread.select(torch.tensor([1]))
    assert [spread.fetched(layer) for layer in range(6)] == before
    spread.begin(0, 2, 3, CPU)
    assert [spread.fetched(layer) for layer in range(6)] == before


def test_an_even_policy_has_none() -> None:
    assert spread_of(Policy(spread="even")) is None
    assert spread_of(Policy.paper()) is None
    assert spread_of(Policy()) is not None


@torch.no_grad()
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_a_batch_decodes_as_its_sequences_alone(tiny_model: Tiny, backend: Any) -> None:
    model, policy = tiny_model("llama"), POLICY.replace(topn=4, backend=backend)
    ids = torch.randint(0, 64, (3, 70), generator=torch.Generator().manual_seed(1))

    def run(rows: torch.Tensor) -> tuple[torch.Tensor, KCache]:
        cache, logits = KCache(model, policy), []
        with attach(model):
            model(rows[:, :50], **holding(cache))
            for token in rows[:, 50:].split(1, 1):
                logits.append(model(token, **holding(cache)).logits)
        return torch.cat(logits, 1), cache

    together, cache = run(ids)
    alone = [run(row[None]) for row in ids]
    torch.testing.assert_close(together, torch.cat([logits for logits, _ in alone]), rtol=1e-4, atol=1e-4)
    assert cache.stats.rows_fetched == sum(one.stats.rows_fetched for _, one in alone)
    heads = cache.batch_size * model.config.num_key_value_heads * len(cache.tiered_layers)
    assert 0 < cache.stats.rows_fetched <= MOST * 4 * heads * 20
    assert cache.stats.bytes_h2d >= cache.stats.rows_fetched * 2


@torch.no_grad()
def test_a_reset_cache_begins_anew(tiny_model: Tiny) -> None:
    model = tiny_model("llama")
    ids = torch.randint(0, 64, (1, 40), generator=torch.Generator().manual_seed(2))
    cache, seen = KCache(model, POLICY.replace(topn=4)), []
    for _ in range(2):
        cache.reset()
        with attach(model):
            model(ids[:, :30], **holding(cache))
            seen.append(torch.cat([model(t, **holding(cache)).logits for t in ids[:, 30:].split(1, 1)], 1))
    assert torch.equal(*seen)

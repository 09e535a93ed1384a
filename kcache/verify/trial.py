"""One model put through what a chat and a batch do: with stock's cache, and with a KCache whose TopN covers everything.

The stock side is the model as it was loaded, not attached, with the attention that transformers chose for it. The
other sides are fed the tokens that stock picked, so that a difference at one step does not become one at all later
steps. Two scenarios: one sequence, and a batch of two with left padding; each has a prompt, decode steps, a second
turn of several tokens, and more decode steps.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import Cache

from kcache.attaching import attach
from kcache.attention.switching import text_config
from kcache.cache import KCache
from kcache.models.arguments import with_cache
from kcache.policy import Policy

EXACT = Policy(topn=1_000_000, dense_below=0, dense_layers=0, offload="all")
FEW = Policy(topn=2, dense_below=0, dense_layers=0, offload="all", spread="even", tail="none")
TOLERANCE = 1e-4
"""Of the largest logit: fp32 sums in another order differ by less, a wrong row or mask by far more."""


@dataclass(frozen=True)
class Difference:
    """What a model with a KCache does otherwise than stock.

    Attributes
    ----------
    logits : float
        Largest difference of two logits of real tokens, relative to the largest logit.
    tokens : bool
        Whether the greedy token was the same everywhere.
    few : float
        The same as ``logits`` with two V rows per head and step: what this comparison is able to see.
    rows_fetched : int
        V rows that came from the host tier.
    tiered, layers : int
        Layers of the cache that are tiered, and all of them.
    """

    logits: float
    tokens: bool
    few: float
    rows_fetched: int
    tiered: int
    layers: int

    @property
    def exact(self) -> bool:
        """Whether nothing beyond rounding differs."""
        return self.tokens and self.logits <= TOLERANCE


@dataclass(frozen=True)
class _Scenario:
    prompt: tuple[int, ...]
    turn: tuple[int, ...]
    steps: int
    later: int


_FEW_FORWARDS = 8
SCENARIOS = (_Scenario((40,), (9,), 24, 6), _Scenario((40, 23), (5, 9), 8, 4))


@dataclass(frozen=True)
class _Forward:
    """One forward of a scenario: ids ``[B, T]``, the mask of past and new rows ``[B, L]``, stock's logits."""

    ids: torch.Tensor
    mask: torch.Tensor | None
    logits: torch.Tensor

    def real(self, logits: torch.Tensor) -> torch.Tensor:
        """Logits of tokens that are not padding, ``[N, vocabulary]`` fp32."""
        count = logits.shape[1]
        if self.mask is None:
            return logits.flatten(0, 1).float()
        return logits[self.mask[:, -count:].bool()].float()


def compare(model: PreTrainedModel, seed: int = 0) -> Difference:
    """Run the trial; ``model`` is in evaluation mode and not attached.

    Raises
    ------
    UnsupportedModelError
        If kcache refuses the model.
    """
    worst, few, same, rows, cache = 0.0, 0.0, True, 0, KCache(model, EXACT)
    for number, scenario in enumerate(SCENARIOS):
        recorded = list(_record(model, scenario, seed + number))
        cache = KCache(model, EXACT)
        for forward, logits in zip(recorded, _replay(model, cache, recorded), strict=True):
            worst = max(worst, _difference(forward, logits))
            same = same and _same_tokens(forward, logits)
        rows += cache.stats.rows_fetched
        few = max(few, _loss(model, recorded[:_FEW_FORWARDS]) if cache.tiered_layers else 0.0)
    return Difference(worst, same, few, rows, len(cache.tiered_layers), len(cache.layers))


def _loss(model: PreTrainedModel, recorded: list[_Forward]) -> float:
    """The difference that two V rows instead of all make; inf if a logit is not finite."""
    got = _replay(model, KCache(model, FEW), recorded)
    return max(_difference(forward, logits) for forward, logits in zip(recorded, got, strict=True))


def _record(model: PreTrainedModel, scenario: _Scenario, seed: int) -> Iterator[_Forward]:
    """The scenario with stock's cache and stock's greedy tokens."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = text_config(model).vocab_size
    cache = DynamicCache(config=text_config(model))
    mask: torch.Tensor | None = None
    batch = len(scenario.prompt)
    for lengths, steps in ((scenario.prompt, scenario.steps), (scenario.turn, scenario.later)):
        ids = torch.randint(3, vocabulary, (batch, max(lengths)), generator=generator).to(model.device)
        new = torch.tensor([[0] * (max(lengths) - length) + [1] * length for length in lengths], device=ids.device)
        for _ in range(steps + 1):
            if batch > 1:
                mask = new if mask is None else torch.cat([mask, new], 1)
            logits = _forward(model, cache, ids, mask)
            yield _Forward(ids, mask, logits)
            ids = logits[:, -1:].argmax(-1)
            new = torch.ones_like(ids)


def _replay(model: PreTrainedModel, cache: Cache, recorded: list[_Forward]) -> Iterator[torch.Tensor]:
    with attach(model):
        for forward in recorded:
            yield _forward(model, cache, forward.ids, forward.mask)


def _same_tokens(forward: _Forward, logits: torch.Tensor) -> bool:
    """Whether the likeliest token is the same wherever stock's two likeliest are not level but for rounding."""
    got, want = forward.real(logits), forward.real(forward.logits)
    best = want.topk(2, dim=-1)
    clear = best.values[:, 0] - best.values[:, 1] > 2 * TOLERANCE * want.abs().max()
    return bool(((got.argmax(-1) == best.indices[:, 0]) | ~clear).all())


def _difference(forward: _Forward, logits: torch.Tensor) -> float:
    got, want = forward.real(logits), forward.real(forward.logits)
    largest = float(want.abs().max())
    difference = float((got - want).abs().max()) / largest if largest else 0.0
    return difference if difference == difference else float("inf")


@torch.no_grad()
def _forward(model: PreTrainedModel, cache: Cache, ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    extra: dict[str, Any] = {}
    if mask is not None:
        positions = (mask.long().cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        extra = {"attention_mask": mask, "position_ids": positions}
    logits: torch.Tensor = model(input_ids=ids, **with_cache(model, cache), **extra).logits
    return logits

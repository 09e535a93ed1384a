"""One exact prefill shared by full attention and every policy, and what a model says after it.

Prefill is exact under any policy, so its rows need computing once: they are copied into a cache under each policy, as
that policy's own prefill would have filled it in one piece. What differs from there on is decoding alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kcache.attaching import attach
from kcache.cache import KCache
from kcache.decoding.forward import prefill, step_logits
from kcache.decoding.loop import decode
from kcache.decoding.sampling import Sampler, Sampling
from kcache.decoding.text import Detokenizer
from kcache.models.ends import end_ids
from kcache.policy import Policy

if TYPE_CHECKING:
    from kcache.models.loaded import LoadedModel

FULL = Policy(offload="none")


@dataclass(frozen=True)
class Contender:
    """One way of decoding: ``"dense"``, which is full attention, or ``"kcache"`` under a policy."""

    engine: str
    policy: Policy

    @property
    def topn(self) -> int | None:
        """Rows fetched per KV head and step; None for full attention, which reads them all."""
        return None if self.engine == "dense" else self.policy.topn

    @property
    def label(self) -> str:
        """The contender in a word: ``dense`` or ``N=64``."""
        return "dense" if self.topn is None else f"N={self.topn}"


def contenders(policy: Policy, topns: Sequence[int]) -> tuple[Contender, ...]:
    """Full attention, then ``policy`` with each N."""
    return Contender("dense", FULL), *(Contender("kcache", policy.replace(topn=topn)) for topn in topns)


class Prefix:
    """Tokens that have been prefilled exactly, once, and whose rows any number of caches can begin with.

    Parameters
    ----------
    lm : LoadedModel
    ids : sequence of int
        May be empty.
    """

    def __init__(self, lm: LoadedModel, ids: Sequence[int] = ()) -> None:
        self.lm, self.ids = lm, list(ids)
        self._cache = KCache(lm.model, FULL, max_length=max(1, len(self.ids)))
        self._logits = self._prefill(self._cache, self.ids)

    def fork(self, more: Sequence[int], policies: Sequence[Policy], room: int) -> Fork:
        """Prefill ``more`` after the prefix, exactly, and make a cache that holds both under each policy.

        Parameters
        ----------
        more : sequence of int
            May be empty.
        policies : sequence of Policy
        room : int
            Tokens that will come after.
        """
        ids = [*self.ids, *more]
        length = len(ids) + room
        source, logits = self._cache, self._logits
        if more:
            source = self._copy(self._cache, FULL, self.ids, length)
            logits = self._prefill(source, list(more))
        return Fork(self.lm, [self._copy(source, policy, ids, length) for policy in policies], logits)

    def _prefill(self, cache: KCache, ids: list[int]) -> torch.Tensor | None:
        logits = None
        if ids:
            with attach(self.lm.model):
                for newest, _ in prefill(self.lm.model, cache, torch.tensor([ids], device=self.lm.device), None):
                    logits = newest
        return logits

    def _copy(self, source: KCache, policy: Policy, ids: list[int], length: int) -> KCache:
        """Make a cache that holds ``ids``: by copying rows, or by a prefill of its own where a layer is not tiered."""
        cache = KCache(self.lm.model, policy, max_length=length)
        if len(source.tiered_layers) < len(source.layers):
            self._prefill(cache, ids)
            return cache
        with attach(self.lm.model):
            for index, layer in enumerate(source.tiered_layers):
                if layer.keys is not None and layer.values is not None:
                    cache.update(layer.keys, layer.values, index)
                    cache.tiered_layers[index].settle()
        return cache


@dataclass(frozen=True)
class Fork:
    """Caches that hold the same tokens, one per policy, and the logits ``[1, vocabulary]`` after the last of them."""

    lm: LoadedModel
    caches: list[KCache]
    logits: torch.Tensor | None

    def read(self, cache: KCache, ids: Sequence[int]) -> torch.Tensor | None:
        """Feed tokens by decode steps, each of which reads the past as the policy says; returns the last logits."""
        logits = self.logits
        with attach(self.lm.model):
            for token in ids:
                logits = step_logits(self.lm.model, cache, torch.tensor([[token]], device=self.lm.device))
        return logits

    def reply(self, cache: KCache, ids: Sequence[int], max_new_tokens: int, stop: Sequence[str] = ()) -> str:
        """Feed ``ids`` by decode steps, then decode greedily up to an end token, a stop string or the limit."""
        logits = self.read(cache, ids)
        assert logits is not None, "there is nothing to go on from"
        model, tokenizer = self.lm.model, self.lm.tokenizer
        sampler = Sampler(Sampling(temperature=0, repetition_penalty=1.0), model.generation_config, self.lm.device)
        text, ends, said = Detokenizer(tokenizer, stop), end_ids(model, tokenizer), ""
        history = torch.zeros(1, 0, dtype=torch.long, device=self.lm.device)
        with attach(model):
            for count, (token,) in enumerate(decode(model, cache, logits, sampler, history), start=1):
                if token in ends:
                    break
                said += text.push(token)
                if text.stopped or count == max_new_tokens:
                    break
        return said + text.finish()

    def log_likelihood(self, cache: KCache, ids: Sequence[int], continuation: Sequence[int]) -> tuple[float, bool]:
        """Feed ``ids``, then ``continuation``, by decode steps; its log-probability, and whether greedy says it."""
        logits = self.read(cache, ids)
        total, greedy = 0.0, True
        for number, token in enumerate(continuation, start=1):
            assert logits is not None, "there is nothing to go on from"
            scores = logits[0].float().log_softmax(-1)
            total += float(scores[token])
            greedy = greedy and int(scores.argmax()) == token
            if number < len(continuation):
                logits = self.read(cache, [token])
        return total, greedy

"""Random lives of a cache: any sequence of operations gives what DynamicCache gives, and what the oracle gives."""

from __future__ import annotations

from functools import cache

import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from transformers import PreTrainedModel

from kcache.policy import Policy
from tests.oracle import OraclePair
from tests.pair import Pair
from tests.tiny_models import make, tokens

LONGEST = 120
WIDEST = 4


@cache
def model(kind: str) -> PreTrainedModel:
    return make(kind, num_hidden_layers=2) if kind != "gpt2" else make(kind)


class CacheLife(RuleBasedStateMachine):
    """Operations on a stock cache and a KCache side by side; every forward compares logits."""

    pair: Pair
    seed = 0
    batch = 1

    def ids(self, count: int) -> torch.Tensor:
        self.seed += 1
        return tokens(self.seed, self.batch, count)

    def start(self, kind: str, policy: Policy, max_length: int | None) -> Pair:
        return Pair(model(kind), policy, max_length=max_length, tolerance=1e-4)

    policies = st.builds(
        Policy,
        topn=st.just(10**6),
        dense_layers=st.integers(0, 1),
        dense_below=st.sampled_from([0, 0, 20, 64]),
        select=st.sampled_from(["group", "head"]),
        tail=st.sampled_from(["lowrank", "renormalise", "none"]),
        tail_rank=st.sampled_from([None, 3]),
        resident_layers=st.just(0),
        backend=st.sampled_from(["auto", "reference"]),
    )

    @initialize(
        kind=st.sampled_from(["llama", "mqa", "gpt2"]),
        policy=st.deferred(lambda: CacheLife.policies),
        max_length=st.sampled_from([None, 30, 200]),
        batch=st.integers(1, 3),
    )
    def begin(self, kind: str, policy: Policy, max_length: int | None, batch: int) -> None:
        self.batch = batch
        self.pair = self.start(kind, policy, max_length)

    def has_rows(self) -> bool:
        return self.pair.length > 0

    def has_room(self) -> bool:
        return self.pair.length < LONGEST

    @precondition(has_room)
    @rule(count=st.integers(1, 40), data=st.data())
    def turn(self, count: int, data: st.DataObject) -> None:
        """A prompt, padded on the left, at least one sequence of it whole."""
        real = [data.draw(st.integers(1, count)) for _ in range(self.batch)]
        real[data.draw(st.integers(0, self.batch - 1))] = count
        new = torch.tensor([[0] * (count - n) + [1] * n for n in real])
        self.prefill(self.ids(count), None if all(n == count for n in real) else new)

    def prefill(self, ids: torch.Tensor, new: torch.Tensor | None) -> None:
        with self.pair.ours.exact():
            self.pair.forward(ids, new)

    @precondition(has_rows)
    @rule(steps=st.integers(1, 6))
    def decode(self, steps: int) -> None:
        for _ in range(steps):
            self.pair.forward(self.ids(1))

    @precondition(has_rows)
    @rule(share=st.floats(0, 1))
    def crop(self, share: float) -> None:
        """Leaves every sequence with a real row, as a prompt always has."""
        keep = self.pair.length - 1
        if self.pair.mask is not None:
            first_real = int(self.pair.mask.argmax(1).max())
            keep = max(0, keep - first_real)
        self.pair.crop(int(share * keep))

    @precondition(has_rows)
    @rule(data=st.data())
    def reorder(self, data: st.DataObject) -> None:
        self.pair.reorder(torch.tensor([data.draw(st.integers(0, self.batch - 1)) for _ in range(self.batch)]))

    @precondition(has_rows)
    @rule(data=st.data(), count=st.integers(1, WIDEST))
    def select(self, data: st.DataObject, count: int) -> None:
        self.pair.select(torch.tensor([data.draw(st.integers(0, self.batch - 1)) for _ in range(count)]))
        self.batch = count

    @precondition(lambda self: self.has_rows() and self.batch * 2 <= WIDEST)
    @rule()
    def repeat(self) -> None:
        self.pair.repeat(2)
        self.batch *= 2

    @rule(batch=st.integers(1, 3))
    def reset(self, batch: int) -> None:
        self.pair.reset()
        self.batch = batch

    @invariant()
    def lengths_and_bytes_agree(self) -> None:
        if not hasattr(self, "pair"):
            return
        stats = self.pair.ours.stats
        lengths = {layer.get_seq_length() for layer in self.pair.ours.layers}
        assert lengths == {self.pair.stock.get_seq_length()}
        assert stats.device_bytes == stats.k_bytes + stats.resident_v_bytes + stats.overhead_bytes
        assert stats.tokens == self.pair.length


class TopNLife(CacheLife):
    """The same lives with few picks, beside the brute-force oracle."""

    def start(self, kind: str, policy: Policy, max_length: int | None) -> Pair:
        return OraclePair(model(kind), policy.replace(topn=5), max_length=max_length)

    def prefill(self, ids: torch.Tensor, new: torch.Tensor | None) -> None:
        assert isinstance(self.pair, OraclePair)
        self.pair.exact = True
        super().prefill(ids, new)
        self.pair.exact = False


_FAST = settings(
    max_examples=80,
    stateful_step_count=25,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.explicit, Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
TestCacheLife = CacheLife.TestCase
TestCacheLife.settings = _FAST
TestTopNLife = TopNLife.TestCase
TestTopNLife.settings = _FAST

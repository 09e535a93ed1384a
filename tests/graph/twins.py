"""Two caches of one model that are fed the same tokens, one of which replays recorded steps."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from kcache.attaching import attach
from kcache.cache import KCache
from kcache.decoding.forward import prefill
from kcache.decoding.loop import decode, graph_of
from kcache.graph.decoder import GraphDecoder
from kcache.policy import Policy
from kcache.telemetry import LayerSnapshot
from tests.graph.samplers import Forced
from tests.tiny_models import tokens


class Twins:
    """A cache that replays and one that does not; logits are compared step by step.

    Parameters
    ----------
    model : PreTrainedModel
    policy : Policy
    make_tape : callable, optional
        What records; by default what the model's device has.
    max_length : int, optional
    close : float
        The largest difference of two logits, relative to the largest logit.
    between : callable, optional
        Called between steps.
    exact : bool
        Whether counters and picks must be the same to a row; on a device a row near a threshold may fall either way.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: Policy,
        make_tape: Callable[[], Any] | None = None,
        *,
        max_length: int | None = None,
        close: float = 2e-5,
        between: Callable[[], None] = lambda: None,
        exact: bool = True,
    ) -> None:
        self.model, self.close, self.between = model, close, between
        self.plain = KCache(model, policy.replace(graph="off"), max_length=max_length)
        self.taped = KCache(model, policy, max_length=max_length)
        if make_tape is not None:
            self.taped.shared.make_tape = make_tape
        self.mask: torch.Tensor | None = None
        # Steps on trial leave no hot rows behind, so those after them find fewer.
        self.compare_counters = exact and policy.hot_rows == 0
        self.exact = exact

    @property
    def graph(self) -> GraphDecoder:
        found = graph_of(self.taped)
        assert found is not None
        return found

    def prefill(self, ids: torch.Tensor, new: torch.Tensor | None = None) -> None:
        if new is not None or self.mask is not None:
            before = ids.new_ones(len(ids), self.plain.get_seq_length()) if self.mask is None else self.mask
            self.mask = torch.cat([before, ids.new_ones(ids.shape) if new is None else new.to(ids)], 1)
        with attach(self.model):
            for cache in (self.plain, self.taped):
                for logits, _ in prefill(self.model, cache, ids, self.mask):
                    self.logits = logits

    def run(self, cache: KCache, forced: torch.Tensor, ended: list[bool]) -> Iterator[torch.Tensor]:
        """The logits after each of ``forced`` ``[steps, B]``."""
        sampler = Forced(forced)
        steps = decode(self.model, cache, self.logits, sampler, forced[:1].T, self.mask, ended)
        with attach(self.model):
            for _ in steps:
                if len(sampler.seen) > 1:
                    yield sampler.seen[-1]

    def decode(self, steps: int, seed: int = 7, end: Callable[[int, list[bool]], None] | None = None) -> None:
        """Decode the same random tokens with both; ``end`` may end sequences after a step."""
        batch = self.plain.batch_size
        forced = tokens(seed, steps + 1, batch).to(self.model.device)
        flags: list[list[bool]] = [[False] * batch if end is not None else [] for _ in range(2)]
        runs = [self.run(cache, forced, ended) for cache, ended in zip((self.plain, self.taped), flags, strict=True)]
        length = self.plain.get_seq_length()
        for step in range(steps):
            want, got = (next(run) for run in runs)
            torch.testing.assert_close(got, want, atol=self.close * float(want.abs().max()), rtol=0)
            self.between()
            if end is not None:
                for ended in flags:
                    end(step, ended)
            assert self.taped.get_seq_length() == self.plain.get_seq_length() == length + step + 1
        for run in runs:
            run.close()  # type: ignore[attr-defined]
        if self.mask is not None or end is not None:
            rows = self.plain.shared.validity.rows(0, length + steps, forced.device)
            self.mask = None if rows is None else rows.long()
        self.check_state()

    def leave(self, places: list[int], before: int, after: int, seed: int = 7) -> None:
        """Decode, after some steps with the sequences at ``places`` alone, and compare what they are shown throughout.

        A third cache, where nobody leaves and no step is recorded, must show the same of them.
        """
        whole = copy.deepcopy(self.plain)
        forced = tokens(seed, before + after + 1, whole.batch_size).to(self.model.device)
        seen = []
        for cache, leaves in ((whole, False), (self.plain, True), (self.taped, True)):
            sampler = Forced(forced)
            with attach(self.model):
                steps = decode(self.model, cache, self.logits, sampler, forced[:1].T, self.mask)
                for step in range(before + after):
                    kept = leaves and step == before
                    if kept:
                        sampler.keep(places)
                    steps.send(places if kept else None)
                    self.between()
                steps.close()
            seen.append([logits if len(logits) == len(places) else logits[places] for logits in sampler.seen])
            assert cache.batch_size == len(places) or not leaves
        for want, *others in zip(*seen, strict=True):
            for got in others:
                torch.testing.assert_close(got, want, atol=self.close * float(want.abs().max()), rtol=0)
        self.check_state()

    def check_state(self) -> None:
        """What the caches hold and have counted is the same."""
        assert self.graph.reason is None
        plain, taped = self.plain, self.taped
        if self.compare_counters:
            assert taped.stats == plain.stats
        off = abs(taped.stats.rows_fetched - plain.stats.rows_fetched)
        assert off <= (0 if self.exact else plain.stats.rows_fetched // 50)
        mine, theirs = taped.shared.validity, plain.shared.validity
        assert mine.length == theirs.length
        if theirs.bitmap is not None:
            assert torch.equal(mine.bitmap, theirs.bitmap)
        for got, want in zip(taped.layers, plain.layers, strict=True):
            assert got.get_seq_length() == want.get_seq_length()
            torch.testing.assert_close(got.keys, want.keys, atol=self.close * 10, rtol=self.close * 10)
            torch.testing.assert_close(got.values, want.values, atol=self.close * 10, rtol=self.close * 10)
        for got, want in zip(taped.snapshot().layers, plain.snapshot().layers, strict=True):
            assert got.mode == want.mode
            if want.picks is not None and self.exact:
                for mine, theirs in zip(_weighed(got), _weighed(want), strict=True):
                    assert mine == pytest.approx(theirs, rel=1e-3, abs=1e-5)


def _weighed(layer: LayerSnapshot) -> list[dict[int, float]]:
    """What each pick of each head weighs; recordings have room for more, filled up with -1."""
    assert layer.picks is not None and layer.weights is not None
    heads = (values.reshape(-1, values.shape[-1]).tolist() for values in (layer.picks, layer.weights))
    return [{at: share for at, share in zip(*rows, strict=True) if at >= 0} for rows in zip(*heads, strict=True)]

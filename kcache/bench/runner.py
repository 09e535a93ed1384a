"""One engine in one case: its cache, the decode loop that runs on it, and the times of its steps.

The loop is :func:`kcache.decoding.loop.decode`, kept alive from turn to turn; a step is the time from one token to the
next, sampling and the wait for the device included.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import GenerationConfig
from transformers.cache_utils import Cache

from kcache.bench.cases import Case
from kcache.bench.context import LayerShape, fill, real_ids
from kcache.bench.engines import Engine
from kcache.bench.floor import Traffic, traffic_of
from kcache.bench.peak import PeakMemory
from kcache.bench.spec import Spec
from kcache.cache import KCache
from kcache.decoding.forward import step_logits
from kcache.decoding.loop import decode, graph_of
from kcache.decoding.sampling import Sampler, Sampling
from kcache.layers.tiered import TieredLayer
from kcache.telemetry import Stats

if TYPE_CHECKING:
    from kcache.models.loaded import LoadedModel

_WARM_PROMPT = 256
_LEAST_STEPS = 4


class VariedSampler(Sampler):
    """Greedy, each choice moved on by a random number of places: decoding after random rows never falls into a loop.

    A loop would look up the same rows every step, and flatter whoever keeps recent rows at hand.
    """

    def __init__(self, device: torch.device, vocabulary: int) -> None:
        super().__init__(Sampling(temperature=0), GenerationConfig(), device)
        self._random = torch.Generator(device).manual_seed(0)
        self._vocabulary = vocabulary

    def pick(self, logits: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        """Choose a token for each sequence, ``[B]``."""
        picked = super().pick(logits, history)
        moves = torch.randint(self._vocabulary, picked.shape, generator=self._random, device=picked.device)
        return (picked + moves) % self._vocabulary


@dataclass
class Measured:
    """What one engine's turns gave; times in milliseconds, one list per turn."""

    turns: list[list[float]] = field(default_factory=list)
    ttft_ms: list[float] = field(default_factory=list)
    link_bytes: float = 0.0
    peak_bytes: int | None = None
    stats: Stats = field(default_factory=Stats)
    rows_fetched: int = 0
    hot_hits: int = 0
    traffic: Traffic | None = None
    mode: str | None = None
    graph: str | None = None


class Runner:
    """Runs one engine through its turns.

    Parameters
    ----------
    lm : LoadedModel
    engine : Engine
    case : Case
    spec : Spec
    shapes : list of LayerShape
        For a context that is filled in.
    """

    def __init__(self, lm: LoadedModel, engine: Engine, case: Case, spec: Spec, shapes: list[LayerShape]) -> None:
        self.engine, self.case = engine, case
        self.measured = Measured()
        self._lm, self._spec, self._shapes = lm, spec, shapes
        self._cache: Cache | None = None
        self._tokens: Iterator[list[int]] | None = None

    @property
    def alive(self) -> bool:
        """Whether it holds a cache."""
        return self._cache is not None

    def prepare(self) -> None:
        """Make the cache, fill it, and run a turn that is not timed."""
        peak = PeakMemory(self._lm.device)
        room = self.case.ctx + self._spec.new_tokens
        with self.engine.running(self._lm.model):
            if self._spec.real_prefill:
                self._warm_prefill()
            self._cache = self.engine.make(self._lm.model, room)
            self._tokens = self._prefilled() if self._spec.real_prefill else self._filled()
            for _ in range(self._spec.warmup + 1):
                next(self._tokens)
        self.measured.peak_bytes = peak.added_bytes()

    def turn(self) -> None:
        """Time a few steps."""
        assert self._cache is not None and self._tokens is not None
        times: list[float] = []
        with self.engine.running(self._lm.model):
            for _ in range(self._spec.warmup - 1):
                next(self._tokens)
            before = self.engine.stats(self._cache)
            next(self._tokens)  # not timed: while the counters were read, the device finished it ahead of the clock
            first = began = time.perf_counter()
            while len(times) < self._spec.steps:
                next(self._tokens)
                ended = time.perf_counter()
                times.append((ended - began) * 1e3)
                began = ended
                if len(times) >= _LEAST_STEPS and ended - first > self._spec.turn_s:
                    break
        self._look(before, len(times) + 1)
        self.measured.turns.append(times)

    def free(self) -> None:
        """Give the cache's memory back."""
        self._tokens = self._cache = None

    def _look(self, before: Stats, steps: int) -> None:
        """Read the counters after a turn."""
        assert self._cache is not None
        measured, after = self.measured, self.engine.stats(self._cache)
        measured.link_bytes = self.engine.link_bytes(before, after, steps)
        measured.rows_fetched += after.rows_fetched - before.rows_fetched
        measured.hot_hits += after.hot_hits - before.hot_hits
        measured.stats = after
        measured.traffic = traffic_of(self._lm.model, self._cache, measured.link_bytes)
        modes = {layer.mode for layer in self._cache.layers if isinstance(layer, TieredLayer)}
        measured.mode = "topn" if "topn" in modes else "dense" if modes else None
        graph = graph_of(self._cache) if isinstance(self._cache, KCache) else None
        if graph is not None:
            measured.graph = "replayed" if graph.replayed else graph.reason or "no step was replayed"

    def _filled(self) -> Iterator[list[int]]:
        """Put random rows into the cache and begin to decode."""
        assert self._cache is not None
        model, batch = self._lm.model, self.case.batch
        fill(self._cache, self._shapes, self.case.ctx, batch)
        vocabulary = len(cast(Any, model.get_input_embeddings()).weight)
        ids = (torch.arange(batch, device=self._lm.device)[:, None] + 3) % vocabulary
        logits = step_logits(model, self._cache, ids)
        return decode(model, self._cache, logits, VariedSampler(self._lm.device, vocabulary), ids)

    def _prefilled(self) -> Iterator[list[int]]:
        """Run the text through the model, time it, and begin to decode greedily."""
        assert self._cache is not None
        ids = real_ids(self._lm, self.case.ctx, self.case.batch)
        sampler = Sampler(Sampling(temperature=0, repetition_penalty=1.0), GenerationConfig(), self._lm.device)
        if self._lm.device.type == "cuda":
            torch.cuda.synchronize(self._lm.device)
        began = time.perf_counter()
        logits = self.engine.prefill(self._lm.model, self._cache, ids)
        tokens = decode(self._lm.model, self._cache, logits, sampler, ids)
        next(tokens)
        self.measured.ttft_ms.append((time.perf_counter() - began) * 1e3)
        return tokens

    def _warm_prefill(self) -> None:
        """Run a prompt that is thrown away, so that nobody's first one pays for what happens once.

        On CUDA it is as long as the real one: kernels are chosen by size there.
        """
        length = self.case.ctx if self._lm.device.type == "cuda" else min(self.case.ctx, _WARM_PROMPT)
        ids = real_ids(self._lm, length, self.case.batch)
        self.engine.prefill(self._lm.model, self.engine.make(self._lm.model, length + 1), ids)

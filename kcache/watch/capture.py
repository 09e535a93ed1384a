"""The engine's side of watching: what a forward hands over, in a few microseconds a layer and without a wait.

Hooks on the model note when a forward with a :class:`~kcache.KCache` begins and ends. While nobody watches that is
all. While somebody does, the end of a step puts the picks of all layers together into one tensor, and where a frame is
due its counters too, and wakes the publisher's thread, which does the rest. On CUDA picks and token ids travel to
pinned memory behind the step's own work, and only that thread waits for them.
"""

from __future__ import annotations

import math
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from kcache.cache import KCache
from kcache.machine.arriving import Arriving
from kcache.models.arguments import cache_in
from kcache.watch.frame import Phase
from kcache.watch.moment import Captured, Picks, moment_of, picks_of

QUEUE = 256
"""Frames that may wait for the publisher; then the oldest give way."""
_FORWARDS = 65_536
NEVER = math.inf
_WATCHERS = "_kcache_watchers"


@dataclass(frozen=True, slots=True)
class Forward:
    """A forward that began.

    ``past`` positions were in the cache and ``count`` come; ``ids`` ``[B, count]`` and, for a prompt with padding,
    ``mask`` ``[B, count]``; ``at_s`` is of the monotonic clock.
    """

    run: int
    at_s: float
    past: int
    count: int
    batch: int
    prompt: bool
    ids: Arriving | None
    mask: Arriving | None


@dataclass(frozen=True, slots=True)
class Finish:
    """Sequences that have had their last token, which nobody feeds: how many tokens each got, by its index."""

    run: int
    made: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class Kept:
    """The cache goes on with the sequences that were at these places: some of them, or one several times."""

    run: int
    places: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Names:
    """What the sequences of the next run are called."""

    names: tuple[str, ...]


class Capture:
    """Watches the forwards of one model.

    Parameters
    ----------
    model : PreTrainedModel
    wake : callable
        Called on the engine's thread when something waits in ``ready``; must not block.
    only : KCache, optional
        Take no notice of the model's other caches.

    Attributes
    ----------
    due_s : float
        When the next frame is wanted, by the monotonic clock: 0 for every step, :data:`NEVER` while nobody watches.
        Set by the publisher, and moved on by ``interval_s`` when a frame was taken.
    forwards, ready : deque
        Forwards that began, and what else was said of sequences, and frames that were taken, for the publisher to
        remove.
    probe : bool
        Whether layers that attend exactly shall say what they would pick, in steps whose frame is taken.
    running : bool
        Whether a forward is under way.
    ended_s : float
        When the last one ended.
    lost : int
        Frames that gave way to newer ones.
    told : int
        How much was said of forwards in all.
    took_s : float
        What the latest frame cost the engine's thread.
    """

    def __init__(self, model: PreTrainedModel, wake: Callable[[], None], only: KCache | None = None) -> None:
        self.due_s, self.interval_s = NEVER, 0.0
        self.forwards: deque[Forward | Finish | Kept | Names] = deque(maxlen=_FORWARDS)
        self.ready: deque[Captured] = deque()
        self.running, self.ended_s, self.lost = False, -math.inf, 0
        self.took_s, self._began_s, self._prompt = 0.0, 0.0, False
        self.probe, self._taking = False, False
        self.run = self.told = 0
        self._wake = wake
        self._on_cuda = model.device.type == "cuda"
        self._only = None if only is None else weakref.ref(only)
        self._cache: weakref.ref[KCache] | None = None
        self._latest: Picks | None = None
        self._earlier: Picks | None = None
        self._hooks = [
            model.register_forward_pre_hook(self._before, with_kwargs=True),
            model.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]
        self._others = vars(model).setdefault(_WATCHERS, [])
        self._others.append(self)

    def stop(self) -> None:
        """Take the hooks off the model."""
        for hook in self._hooks:
            hook.remove()
        if self in self._others:
            self._others.remove(self)

    @property
    def cache(self) -> KCache | None:
        """The cache of the latest forward, while it lives."""
        return None if self._cache is None else self._cache()

    def take_now(self) -> Captured | None:
        """Capture the present state, from another thread than the engine's: for a viewer who comes in between steps."""
        cache = self.cache
        if cache is None:
            return None
        try:
            picks = self._latest if self.running or self._latest is not None else picks_of(cache, self.run)
            return moment_of(cache, self.run, picks, self._earlier, self.told)
        except AttributeError:  # the engine has just moved V of a layer; the frame at the end of its step will do
            return None

    def _before(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        cache = self._ours(cache_in(kwargs))
        ids = kwargs.get("input_ids", args[0] if args else None)
        given = ids if ids is not None else kwargs.get("inputs_embeds")
        if cache is not None and given is not None:
            self._begins(cache, ids, given, kwargs.get("attention_mask"))

    def _after(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        cache = self._ours(cache_in(kwargs))
        if cache is not None:
            self._ends(cache)

    def step_begins(self, cache: KCache, ids: torch.Tensor) -> None:
        """Note a decode step that runs without a forward; ``ids`` ``[B, 1]``."""
        if self._ours(cache) is not None:
            self._begins(cache, ids, ids, None)

    def step_ends(self, cache: KCache) -> None:
        """Note that it has been taken in."""
        if self._ours(cache) is not None:
            self._ends(cache)

    def name(self, names: Sequence[str]) -> None:
        """Say what the sequences of the next run are called."""
        self._tell(Names(tuple(names)))

    def finish(self, cache: Any, made: Mapping[int, int], last: bool) -> None:
        """Note that sequences have had their last token, and how many that made; after the ``last`` of them a frame.

        That token is not fed, so no forward would tell.
        """
        ours = self._ours(cache)
        if ours is None or ours is not self.cache:
            return
        self._tell(Finish(self.run, dict(made)))
        if not last or self.due_s == NEVER:
            return
        if not self._on_cuda:  # where a step that nobody will take may be writing its own already
            latest = picks_of(ours, self.run)
            if latest is not None and (self._latest is None or latest.step != self._latest.step):
                self._earlier, self._latest = self._latest, latest
        self._take(ours, self._earlier, time.perf_counter(), "idle")

    def keep(self, cache: KCache, places: Sequence[int]) -> None:
        """Note that a cache goes on with the sequences at ``places`` alone, which may be one several times."""
        if self._ours(cache) is not None and cache is self.cache:
            self._tell(Kept(self.run, tuple(places)))
            self._latest = self._earlier = None

    def _begins(self, cache: KCache, ids: torch.Tensor | None, given: torch.Tensor, mask: torch.Tensor | None) -> None:
        past, (batch, count) = cache.get_seq_length(), given.shape[:2]
        if self.cache is not cache or past == 0:
            self._cache, self._latest, self._earlier = weakref.ref(cache), None, None
            self.run += 1
        prompt = count > 1 or cache.shared.force_exact
        mask = mask if prompt and batch > 1 else None
        now = time.perf_counter()
        self.running, self._began_s, self._prompt, self._taking = True, now, prompt, now >= self.due_s
        cache.shared.probing = self.probe and self._taking
        self._tell(
            Forward(
                self.run,
                now,
                past,
                count,
                batch,
                prompt,
                None if ids is None else Arriving(ids),
                None if mask is None or mask.dim() != 2 else Arriving(mask[:, -count:]),
            )
        )
        if prompt and self.due_s < NEVER:
            self._wake()

    def _ends(self, cache: KCache) -> None:
        if cache is not self.cache:
            return
        now = self.ended_s = time.perf_counter()
        self.running = cache.shared.probing = False
        if self.due_s == NEVER:
            self._latest = self._earlier = None
            return
        if not self._taking and now + 2 * (now - self._began_s) < self.due_s:
            return  # neither this step nor the next is wanted
        before, self._latest = self._latest, picks_of(cache, self.run)
        self._earlier = before
        if not self._taking and (self.probe or now < self.due_s):
            return
        self._take(cache, before, now, "prefill" if self._prompt else "decode")

    def _take(self, cache: KCache, before: Picks | None, now: float, phase: Phase) -> None:
        """Hand over a frame of the present state."""
        if self.interval_s:
            self.due_s = now + self.interval_s
        if len(self.ready) >= QUEUE:
            self.ready.popleft()
            self.lost += 1
        self.ready.append(moment_of(cache, self.run, self._latest, before, self.told, phase))
        self.took_s = time.perf_counter() - now
        self._wake()

    def _tell(self, told: Forward | Finish | Kept | Names) -> None:
        self.forwards.append(told)
        self.told += 1

    def _ours(self, cache: Any) -> KCache | None:
        """The cache of a forward, if we watch it."""
        if not isinstance(cache, KCache) or (self._only is not None and self._only() is not cache):
            return None
        if self._on_cuda and torch.cuda.is_current_stream_capturing():
            return None
        return cache


def watchers_of(model: PreTrainedModel) -> list[Capture]:
    """Who watches a model."""
    return list(vars(model).get(_WATCHERS, ()))

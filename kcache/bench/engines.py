"""Who is timed: KCache, our own exact attention, and the caches that come with transformers.

An engine makes a cache and says how the model runs with it. All of them decode in :func:`kcache.decoding.loop.decode`,
the loop of chat and generate, so that nothing but the cache differs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import AbstractContextManager, nullcontext
from typing import ClassVar

import torch
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.cache_utils import Cache

from kcache.attaching import attach
from kcache.bench.context import LayerShape, held_bytes
from kcache.bench.spec import check_engine
from kcache.cache import KCache
from kcache.decoding.forward import prefill, step_logits
from kcache.machine.devices import decodes_by_kernels
from kcache.planning.sizes import TierSizes
from kcache.policy import Policy
from kcache.telemetry import Stats


class Engine(ABC):
    """A cache to time.

    Attributes
    ----------
    name : str
    ours : bool
        Whether kcache's attention runs with it.
    planned_as : {"full", "kcache"} or None
        Which of the plan's methods predicts it; the plan's full attention is ours.
    policy : Policy or None
        Of a KCache.
    """

    name: ClassVar[str]
    ours: ClassVar[bool] = False
    planned_as: ClassVar[str | None] = None
    policy: Policy | None = None

    @property
    def topn(self) -> int | None:
        """Rows fetched per KV head and step; None where that says nothing."""
        return None

    @property
    def label(self) -> str:
        """The engine in words, its N included."""
        return self.name if self.topn is None else f"{self.name} N={self.topn}"

    def unavailable(self, device: torch.device) -> str | None:
        """Why the engine cannot run on this device; None when it can."""
        return None

    @abstractmethod
    def make(self, model: PreTrainedModel, room: int) -> Cache:
        """Make a cache for ``room`` tokens."""

    def running(self, model: PreTrainedModel) -> AbstractContextManager[object]:
        """Inside this block the model runs with the engine's cache."""
        return nullcontext()

    def prefill(self, model: PreTrainedModel, cache: Cache, ids: torch.Tensor) -> torch.Tensor:
        """Run ``ids`` ``[B, T]`` through the model as the engine's users would; returns the last logits."""
        return step_logits(model, cache, ids)

    def need(self, shapes: list[LayerShape], room: int, batch: int) -> tuple[int, int]:
        """Bytes on the device and in host memory."""
        return sum(shape.k_bytes(room, batch) + shape.v_bytes(room, batch) for shape in shapes), 0

    def stats(self, cache: Cache) -> Stats:
        """Bytes held per tier, and counters where the cache keeps any."""
        device, host = held_bytes(cache)
        return Stats(device_bytes=device, host_bytes=host)

    def link_bytes(self, before: Stats, after: Stats, steps: int) -> float:
        """Bytes brought to the device per step, of ``steps`` steps between two looks at :meth:`stats`."""
        return 0.0


class HfDynamic(Engine):
    """DynamicCache, which transformers makes when told nothing: it copies itself to grow, each step."""

    name = "hf-dynamic"

    def make(self, model: PreTrainedModel, room: int) -> Cache:
        """See :class:`Engine`."""
        return DynamicCache(config=model.config)


class HfStatic(Engine):
    """StaticCache, allocated once."""

    name = "hf-static"

    def make(self, model: PreTrainedModel, room: int) -> Cache:
        """See :class:`Engine`."""
        return StaticCache(config=model.config, max_cache_len=room)


class HfOffloaded(Engine):
    """DynamicCache that keeps all K and V in RAM and brings them back whole, a layer at a time."""

    name = "hf-offloaded"

    def unavailable(self, device: torch.device) -> str | None:
        """See :class:`Engine`."""
        return None if device.type == "cuda" else "moves K and V between a CUDA device and RAM; this run has no CUDA"

    def make(self, model: PreTrainedModel, room: int) -> Cache:
        """See :class:`Engine`."""
        return DynamicCache(config=model.config, offloading=True)

    def need(self, shapes: list[LayerShape], room: int, batch: int) -> tuple[int, int]:
        """See :class:`Engine`; two layers are on the device at a time."""
        layers = [shape.k_bytes(room, batch) + shape.v_bytes(room, batch) for shape in shapes]
        return 2 * max(layers, default=0), sum(layers)

    def link_bytes(self, before: Stats, after: Stats, steps: int) -> float:
        """See :class:`Engine`: every step brings every layer."""
        return float(after.device_bytes + after.host_bytes)


class Tiered(Engine):
    """KCache under the policy given."""

    name = "kcache"
    ours = True
    planned_as = "kcache"

    def __init__(self, policy: Policy) -> None:
        self.policy: Policy = policy

    @property
    def topn(self) -> int | None:
        """See :class:`Engine`."""
        return self.policy.topn

    def make(self, model: PreTrainedModel, room: int) -> Cache:
        """See :class:`Engine`."""
        return KCache(model, self.policy, max_length=room)

    def running(self, model: PreTrainedModel) -> AbstractContextManager[object]:
        """See :class:`Engine`."""
        return attach(model)

    def prefill(self, model: PreTrainedModel, cache: Cache, ids: torch.Tensor) -> torch.Tensor:
        """See :class:`Engine`: in chunks, as generation does."""
        assert isinstance(cache, KCache)
        *_, (logits, _) = prefill(model, cache, ids, None)
        return logits

    def need(self, shapes: list[LayerShape], room: int, batch: int) -> tuple[int, int]:
        """See :class:`Engine`; with ``offload="auto"`` the device may have to hold all."""
        if self.policy.offload != "all":
            return super().need(shapes, room, batch)
        stay = max(self.policy.dense_layers, self.policy.resident_layers or 0)
        device = host = 0
        for index, shape in enumerate(shapes):
            if index < stay or shape.window is not None:
                device += shape.k_bytes(room, batch) + shape.v_bytes(room, batch)
                continue
            rows = shape.k_bytes(1, batch), shape.v_bytes(1, batch)
            kernels, itemsize = decodes_by_kernels(shape.device, self.policy), shape.dtype.itemsize
            policy = self.policy.settled(kernels, itemsize)
            sizes = TierSizes.of(policy, 1, *rows, shape.v_dim, itemsize, hot=kernels)
            device += sizes.device(room, 0)
            host += sizes.host(room, 0)
        return device, host

    def stats(self, cache: Cache) -> Stats:
        """See :class:`Engine`."""
        assert isinstance(cache, KCache)
        return cache.stats

    def link_bytes(self, before: Stats, after: Stats, steps: int) -> float:
        """See :class:`Engine`: what the cache has counted."""
        return (after.bytes_h2d - before.bytes_h2d) / steps


class Dense(Tiered):
    """KCache with V kept on the device: our exact full attention."""

    name = "dense"
    planned_as = "full"

    def __init__(self, policy: Policy) -> None:
        super().__init__(policy.replace(offload="none", resident_layers=None, kv_budget=None))

    @property
    def topn(self) -> int | None:
        """See :class:`Engine`: every row is read."""
        return None


_HF: dict[str, type[Engine]] = {engine.name: engine for engine in (HfDynamic, HfStatic, HfOffloaded)}
_OURS: dict[str, type[Tiered]] = {engine.name: engine for engine in (Tiered, Dense)}


def make_engine(name: str, policy: Policy) -> Engine:
    """Return the engine called ``name``; the policy is for those that are ours.

    Raises
    ------
    InputError
        If there is none of that name.
    """
    check_engine(name)
    return _OURS[name](policy) if name in _OURS else _HF[name]()

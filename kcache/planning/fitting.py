"""Whether a cache fits the memory there is, and the largest context and batch that do."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from kcache.machine.devices import runs_kernels
from kcache.machine.ram import read_ram
from kcache.planning.need import MemoryNeed, ModelShape
from kcache.planning.sizes import LEAST_RESERVE, in_units, reserve
from kcache.policy import Policy

MOST_TOKENS = 2**27
MOST_SEQUENCES = 2**16


@dataclass(frozen=True)
class Split:
    """How a model, and the memory it runs in, are divided.

    Attributes
    ----------
    ranks : int
        Processes that share out the heads and weights (tensor parallelism).
    sharers : int
        Processes on this machine that share its RAM.
    gpus : int
        GPUs that one process spreads the model over.
    gpu_share : float
        The part of a GPU that is a process's own.
    """

    ranks: int = 1
    sharers: int = 1
    gpus: int = 1
    gpu_share: float = 1.0


WHOLE = Split()


@dataclass(frozen=True)
class Pools:
    """Memory there is, before the weights are loaded.

    Attributes
    ----------
    device_bytes : int or None
        Device memory; None where the device is the host, so that both tiers share ``host_bytes``.
    host_bytes : int
    working : bool
        Whether to leave room for activations and scratch in the pool the device uses.
    kernels : bool
        Whether a device runs our kernels, which keep hot rows there, and K in two planes.
    """

    device_bytes: int | None
    host_bytes: int
    working: bool = True
    kernels: bool = True

    @classmethod
    def of(cls, device: torch.device, split: Split = WHOLE) -> Pools:
        """What is free on this machine now. RAM is taken as it is, since only the cache asks for it in large pieces."""
        available = read_ram().available // split.sharers
        if device.type != "cuda":
            return cls(None, available, working=False)
        cards = [device] if split.gpus == 1 else [torch.device("cuda", number) for number in range(split.gpus)]
        free = sum(int(torch.cuda.mem_get_info(card)[0]) for card in cards)
        return cls(int(free * split.gpu_share), available, kernels=runs_kernels(device))

    def after(self, weights_bytes: int) -> Pools:
        """What is left once the weights are loaded."""
        if self.device_bytes is None:
            return replace(self, host_bytes=max(0, self.host_bytes - weights_bytes))
        return replace(self, device_bytes=max(0, self.device_bytes - weights_bytes))

    def part(self, device: float, host: float) -> Pools:
        """Such parts of either; a CPU has but the host's."""
        device_bytes = None if self.device_bytes is None else int(self.device_bytes * device)
        return replace(self, device_bytes=device_bytes, host_bytes=int(self.host_bytes * host))


@dataclass(frozen=True)
class Fit:
    """How a cache fits.

    Attributes
    ----------
    need : MemoryNeed
    activation_bytes, scratch_bytes : int
        What the model and the decode steps work in, on the device.
    unused_bytes : int
        Of the device, what a cache leaves to everything else, beside these.
    short : {"device", "host"} or None
        Which memory does not suffice.
    wanted_bytes, allowed_bytes : int
        Of the memory that is short (of the device where none is): what the cache takes and what it may.
    """

    need: MemoryNeed
    activation_bytes: int
    scratch_bytes: int
    unused_bytes: int
    short: Literal["device", "host"] | None
    wanted_bytes: int
    allowed_bytes: int


@dataclass(frozen=True)
class Fitter:
    """One model under one policy in the memory there is.

    Attributes
    ----------
    shape : ModelShape
    policy : Policy
        K as it is kept there, where the policy leaves that open.
    pools : Pools
    weights_bytes : int
    """

    shape: ModelShape
    policy: Policy
    pools: Pools
    weights_bytes: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "policy", self.shape.settled(self.policy, self._kernels))

    def fit(self, ctx: int, batch: int) -> Fit:
        """Plan residency and compare with what there is.

        A cache that stays on the device as a whole needs no room for decode scratch or for V on its way through.
        """
        fit = self._fit(ctx, batch, offloads=False)
        if fit.short is None and fit.need.host_bytes == 0:
            return fit
        return self._fit(ctx, batch, offloads=self.policy.offload != "none" and ctx >= self.policy.dense_below)

    @property
    def _kernels(self) -> bool:
        return self.pools.device_bytes is not None and self.pools.kernels and self.policy.backend != "reference"

    def fits(self, ctx: int, batch: int) -> bool:
        """Whether it fits."""
        return self.fit(ctx, batch).short is None

    def _fit(self, ctx: int, batch: int, offloads: bool) -> Fit:
        activations = self.shape.activation_bytes(ctx, batch, self.policy, offloads)
        scratch = self.shape.scratch_bytes(ctx, batch, self.policy, offloads)
        working = activations + scratch if self.pools.working else 0
        room, unused = None, 0
        if self.pools.device_bytes is not None:
            left = self.pools.after(self.weights_bytes).device_bytes or 0
            unused = max(reserve(left) - working, LEAST_RESERVE)  # working memory is an estimate
            room = max(0, left - working - unused)
        need = self.shape.need(ctx, batch, self.policy, room, hot=self._kernels)
        limits = [limit for limit in (self.policy.kv_budget, room) if isinstance(limit, int)]
        allowed = min(limits, default=None)
        if allowed is not None and need.device_bytes > allowed:
            return Fit(need, activations, scratch, unused, "device", need.device_bytes, allowed)
        available, wanted = self.pools.host_bytes, need.host_bytes
        if self.pools.device_bytes is None:
            available = max(0, self.pools.after(self.weights_bytes).host_bytes - working)
            wanted += need.device_bytes
        if wanted > available:
            return Fit(need, activations, scratch, unused, "host", wanted, available)
        allowed = available if allowed is None else allowed
        return Fit(need, activations, scratch, unused, None, need.device_bytes, allowed)

    def largest_ctx(self, batch: int, below: int = MOST_TOKENS) -> int:
        """The longest context, less than ``below``, that fits; 0 if none does.

        V leaves the device at ``dense_below`` tokens, so what is longer may fit where what is shorter does not.
        """
        turn = self.policy.dense_below
        if 0 < turn < below and self.fits(turn, batch):
            return _last(lambda ctx: self.fits(ctx, batch), turn, below)
        return _last(lambda ctx: self.fits(ctx, batch), 0, min(below, turn) if turn else below)

    def largest_batch(self, ctx: int, below: int = MOST_SEQUENCES) -> int:
        """The largest batch, less than ``below``, that fits; 0 if none does."""
        return _last(lambda batch: self.fits(ctx, batch), 0, below)

    def refusal(self, fit: Fit, ctx: int, batch: int) -> str:
        """Say what is short, by how much, and what would fit."""
        pool = self.pools.host_bytes if self.pools.device_bytes is None else self.pools.device_bytes
        if self.weights_bytes >= pool:
            return (
                f"the weights alone take {in_units(self.weights_bytes)} and there are {in_units(pool)} for them, so no "
                "context would fit; use a larger device, a smaller model, or a smaller dtype"
            )
        what = f"a context of {ctx:,} tokens" + (f" in a batch of {batch}" if batch > 1 else "")
        where = "device" if fit.short == "device" else "host"
        there = "allowed" if fit.short == "device" else "available"
        return (
            f"{what} needs {in_units(fit.wanted_bytes)} of {where} memory for the cache ({there}: "
            f"{in_units(fit.allowed_bytes)}); {self.advice(ctx, batch)}"
        )

    def advice(self, ctx: int, batch: int) -> str:
        """What would fit instead."""
        ways = []
        if self.policy.offload == "none" and self._under(offload="auto").fits(ctx, batch):
            ways.append("with V in host memory (--offload auto)")
        slow = ", and slow" if self.pools.device_bytes is None else ""
        if not ways and self.policy.k_bits == "8+8" and self._under(k_bits=16).fits(ctx, batch):
            ways.append("with K in one piece (--k-bits 16: steps read twice as much of it)")
        elif not ways and self._under(k_bits=8).fits(ctx, batch):
            ways.append(f"with K in 8 bits (--k-bits 8: scores close to exact ones, not exact{slow})")
        elif not ways and self._under(v_bits=8).fits(ctx, batch):
            ways.append(f"with V in 8 bits (--v-bits 8: close to exact, not exact{slow})")
        if batch > 1 and (smaller := self.largest_batch(ctx, batch)):
            ways.append(f"in a batch of {smaller:,}")
        if self.policy.kv_budget is not None and self._under(kv_budget=None).fits(ctx, batch):
            ways.append("with more allowed (--kv-budget)")
        if longest := self.largest_ctx(batch, ctx):
            ways.append(f"with about {longest:,} tokens (--ctx {longest})")
        return f"it would fit {', or '.join(ways)}" if ways else "no context would fit"

    def _under(self, **changes: Any) -> Fitter:
        """The same under another policy."""
        return replace(self, policy=self.policy.replace(**changes))


def _last(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The largest number below ``high`` for which ``holds``, which is true of ``low`` (or taken so)."""
    step = max(1, low)
    while low + step < high and holds(low + step):
        low += step
        step *= 2
    high = min(high, low + step)
    while high - low > 1:
        middle = (low + high) // 2
        if holds(middle):
            low = middle
        else:
            high = middle
    return low

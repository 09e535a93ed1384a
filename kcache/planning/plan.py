"""What a model, a context and a policy take and how fast they should go, before anything is loaded.

Memory is counted (:mod:`kcache.planning.need`), speed is *predicted* by a roofline: a decode step reads weights, K,
scores, resident V and tail at the speed of device memory, or computes if that takes longer, and then waits for the
picked rows over the link. Full attention beside it reads all of V instead. What a layer takes beside its reads
(``layer_ms``) comes on top.

Where both tiers are the same RAM, the reads of V that TopN spares are as fast as choosing the rows and all that goes
with it (measured from 2k to 32k tokens, docs/benchmarks.md), so both methods are predicted to take the same time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, Protocol

import torch
from transformers import PreTrainedConfig

from kcache.models.weights import Weights
from kcache.planning.fitting import Fit, Fitter, Pools
from kcache.planning.need import MemoryNeed, ModelShape
from kcache.policy import Policy

SCORE_PASSES = 2  # scores are written once and read once at least
SCORE_BYTES = 4
METHODS = ("full", "kcache")
Bound = Literal["memory", "compute", "link", "overhead"]


class Speeds(Protocol):
    """What a prediction needs of a :class:`~kcache.speed.machine.Machine` or a :class:`~kcache.speed.cards.Card`."""

    @property
    def memory_gb_s(self) -> float:
        """Device memory."""

    @property
    def host_only(self) -> bool:
        """Whether both tiers are the same RAM."""

    @property
    def product_gb_s(self) -> float:
        """What products with single rows read in a decode step: weights, K and V."""

    @property
    def layer_ms(self) -> float:
        """Time of a layer in a decode step beside what its products read, milliseconds."""

    @property
    def gather_gb_s(self) -> float:
        """Single rows from the host tier."""

    @property
    def compute_tflops(self) -> float:
        """Matrix products."""


@dataclass(frozen=True)
class Prediction:
    """A decode step as the roofline has it.

    Attributes
    ----------
    step_ms, tok_s : float
        Time of a step, and tokens per second of all sequences together.
    floor_ms : float
        The part no implementation can avoid: bytes over bandwidths.
    memory_ms, compute_ms, link_ms, overhead_ms : float
        Reading device memory, arithmetic, waiting for the link, and what a layer's small operators take on a CPU.
    memory_bytes, link_bytes : int
        Bytes over the device's memory bus and over the link, per step.
    bound : {"memory", "compute", "link", "overhead"}
        What takes longest.
    """

    step_ms: float
    tok_s: float
    floor_ms: float
    memory_ms: float
    compute_ms: float
    link_ms: float
    overhead_ms: float
    memory_bytes: int
    link_bytes: int
    bound: Bound


@dataclass(frozen=True)
class Method:
    """One way to keep the cache, at one context and batch.

    Attributes
    ----------
    name : {"full", "kcache"}
    batch : int
        Sequences the figures are for.
    weights_bytes : int
    fit : Fit
        The cache's bytes per tier, working memory, and whether it all fits.
    device_bytes, host_bytes : int
        Everything on the device (weights, cache, activations, scratch), and in the host tier.
    max_batch, max_ctx : int
        The largest batch at this context, and the longest context at this batch (at batch 1 if the batch is free).
    predicted : Prediction or None
        None where it does not fit.
    """

    name: str
    batch: int
    weights_bytes: int
    fit: Fit
    max_batch: int
    max_ctx: int
    predicted: Prediction | None

    @property
    def need(self) -> MemoryNeed:
        """The cache's bytes per tier."""
        return self.fit.need

    @property
    def device_bytes(self) -> int:
        """Everything on the device."""
        return self.weights_bytes + self.need.device_bytes + self.fit.activation_bytes + self.fit.scratch_bytes

    @property
    def host_bytes(self) -> int:
        """Everything in the host tier."""
        return self.need.host_bytes


@dataclass(frozen=True)
class Planner:
    """Plans for one model on one machine.

    Attributes
    ----------
    shape : ModelShape
    weights : Weights
    policy : Policy
        K as it is kept there, where the policy leaves that open.
    pools : Pools
    speeds : Speeds
    hit_rate : float
        Part of the picked rows found on the device; 0 without hot rows.
    """

    shape: ModelShape
    weights: Weights
    policy: Policy
    pools: Pools
    speeds: Speeds
    hit_rate: float = 0.0

    def __post_init__(self) -> None:
        kernels = self.pools.kernels and not self.speeds.host_only
        object.__setattr__(self, "policy", self.shape.settled(self.policy, kernels))

    def fitter(self, name: str) -> Fitter:
        """Who knows what fits."""
        return Fitter(self.shape, self._policy_of(name), self.pools, self.weights.total_bytes)

    def method(self, name: str, ctx: int, batch: int | None) -> Method:
        """Plan one method; with ``batch`` None, at the batch that is predicted to be fastest."""
        fitter = self.fitter(name)
        max_batch = fitter.largest_batch(ctx)
        chosen = batch or self.best_batch(name, ctx, max_batch) or 1
        fit = fitter.fit(ctx, chosen)
        predicted = None if fit.short else self.predict(fit.need, ctx, chosen)
        max_ctx = fitter.largest_ctx(batch or 1)
        return Method(name, chosen, self.weights.total_bytes, fit, max_batch, max_ctx, predicted)

    def best_batch(self, name: str, ctx: int, max_batch: int) -> int:
        """The batch with the most predicted tokens per second; 0 if none fits.

        That is nearly always the largest. Where the link is slow, a smaller one of which more V stays on the device
        can be faster.
        """
        best, best_tok_s, fitter = 0, 0.0, self.fitter(name)
        resident = self.fitter("full").largest_batch(ctx)
        for batch in sorted({*_ladder(max_batch), min(resident, max_batch)} - {0}):
            tok_s = self.predict(fitter.fit(ctx, batch).need, ctx, batch).tok_s
            if tok_s > best_tok_s:
                best, best_tok_s = batch, tok_s
        return best

    def curve(self, name: str, ctxs: list[int], batch: int | None) -> list[float | None]:
        """Predicted tokens per second at each context; None where it does not fit."""
        values: list[float | None] = []
        for ctx in ctxs:
            fitter = self.fitter(name)
            chosen = batch or self.best_batch(name, ctx, fitter.largest_batch(ctx))
            fit = fitter.fit(ctx, chosen) if chosen else None
            values.append(None if fit is None or fit.short else self.predict(fit.need, ctx, chosen).tok_s)
        return values

    def predict(self, need: MemoryNeed, ctx: int, batch: int) -> Prediction:
        """A decode step of ``batch`` sequences at ``ctx`` tokens with a cache laid out as ``need`` says."""
        shape, offloaded = self.shape, need.layers - need.resident_layers
        scores = SCORE_PASSES * SCORE_BYTES * shape.query_heads * batch * ctx * offloaded
        fetches = shape.group if self.policy.select == "head" else 1
        row = shape.v_row // shape.dtype_bytes if self.policy.v_bits == 8 else shape.v_row
        picked = offloaded * batch * row * min(self.policy.topn, ctx) * fetches
        link_bytes = int(picked * (1 - self.hit_rate))
        weights_bytes = self.weights.read_bytes(batch)
        if self.speeds.host_only:  # TopN takes as long as reading all of V
            product_bytes = memory_bytes = weights_bytes + need.k_bytes + need.v_bytes
            link_ms = 0.0
        else:
            product_bytes = weights_bytes
            # Of K in two planes a step reads the upper one, and a few rows of the lower.
            lower = offloaded * batch * ctx * shape.k_row // shape.dtype_bytes if self.policy.key_planes == 2 else 0
            memory_bytes = weights_bytes + need.device_bytes - lower + scores + picked - link_bytes
            link_ms = link_bytes / self.speeds.gather_gb_s / 1e6
        attended = (shape.layers + shape.untiered) * ctx + sum(min(ctx, window) for window in shape.windows)
        flops = 2 * batch * (self.weights.used_per_token + 2 * shape.query_width * attended)
        memory_ms = memory_bytes / self.speeds.memory_gb_s / 1e6
        compute_ms = flops / self.speeds.compute_tflops / 1e9
        slower_ms = product_bytes * (1 / self.speeds.product_gb_s - 1 / self.speeds.memory_gb_s) / 1e6
        overhead_ms = self.speeds.layer_ms * (shape.layers + shape.untiered + len(shape.windows))
        step_ms = max(memory_ms + slower_ms, compute_ms) + link_ms + overhead_ms
        parts: dict[Bound, float] = {
            "memory": memory_ms + slower_ms, "compute": compute_ms, "link": link_ms, "overhead": overhead_ms
        }  # fmt: skip
        return Prediction(
            step_ms=step_ms,
            tok_s=batch / step_ms * 1e3,
            floor_ms=memory_ms + link_ms,
            memory_ms=memory_ms,
            compute_ms=compute_ms,
            link_ms=link_ms,
            overhead_ms=overhead_ms,
            memory_bytes=memory_bytes,
            link_bytes=link_bytes,
            bound=max(parts, key=lambda part: parts[part]),
        )

    def _policy_of(self, name: str) -> Policy:
        return self.policy if name == "kcache" else full_attention(self.policy)


def full_attention(policy: Policy) -> Policy:
    """The policy that keeps everything on the device."""
    return replace(policy, offload="none", resident_layers=None)


def predict(
    config: PreTrainedConfig,
    ctx: int,
    batch: int,
    policy: Policy,
    machine: Speeds,
    *,
    weights: Weights | None = None,
    dtype: torch.dtype | None = None,
    hit_rate: float = 0.0,
) -> dict[str, Prediction]:
    """Predict a decode step of full attention and of KCache, without asking whether they fit.

    Parameters
    ----------
    config : PreTrainedConfig
    ctx, batch : int
        Tokens in the cache, sequences.
    policy : Policy
        Without ``kv_budget``, ``offload="auto"`` keeps V of the dense layers only on the device.
    machine : Machine or Card
    weights : Weights, optional
        Counted from the config if not given.
    dtype : torch.dtype, optional
        Of weights and cache; default: the config's.
    hit_rate : float
        Part of the picked rows found on the device.

    Returns
    -------
    dict
        ``{"full": Prediction, "kcache": Prediction}``
    """
    weights = weights or Weights.of(config, dtype)
    wanted = dtype or config.dtype
    shape = ModelShape.of(config, wanted.itemsize if isinstance(wanted, torch.dtype) else 4)
    planner = Planner(shape, weights, policy, Pools(None, 0), machine, hit_rate)
    policies = {"full": full_attention(policy), "kcache": planner.policy}
    return {name: planner.predict(shape.need(ctx, batch, how, None), ctx, batch) for name, how in policies.items()}


def _ladder(most: int) -> Iterator[int]:
    """Batches worth a look: up to ``most`` in steps of about a quarter."""
    batch = 1
    while batch < most:
        yield batch
        batch = max(batch + 1, batch * 5 // 4)
    yield most

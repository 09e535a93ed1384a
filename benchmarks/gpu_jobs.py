"""What the GPU benchmark measures, in order of worth, and how one of its jobs is run.

A job is one engine at one context and batch. Its caches are filled with random rows and it decodes on the loop that
``chat`` and ``generate`` run; both engines of kcache replay recorded steps there.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import torch

from benchmarks.pick_trace import FILE, Trace, replayed
from kcache.attaching import attach
from kcache.backends import dense
from kcache.bench.cases import Case
from kcache.bench.context import LayerShape, layer_shapes
from kcache.bench.engines import Engine, make_engine
from kcache.bench.floor import Bandwidths
from kcache.bench.peak import PeakMemory
from kcache.bench.rows import Row
from kcache.bench.run import run
from kcache.bench.runner import Runner
from kcache.bench.spec import Spec
from kcache.cache import KCache
from kcache.decoding.forward import prefill
from kcache.machine.ram import read_ram
from kcache.models.loaded import LoadedModel
from kcache.policy import Policy
from kcache.tiers.spare import spare_of

TOPN = 128
GIB = 2**30
_SCRATCH = 4 * GIB
_SHARE_OF_RAM = 0.8
_HOLD = Policy(topn=TOPN, offload="all")


@dataclass(frozen=True)
class Job:
    """One engine at one context and batch.

    Attributes
    ----------
    name : str
        ``case/engine``.
    shape : str
        The model's.
    engine : str
        Out of :data:`~kcache.bench.spec.ENGINES`, or ``prefill`` for the time of a prompt, of which there are
        shorter ones, padded, in a batch.
    ctx : int
    batch : int or None
        None for the largest that fits ``budget``.
    budget : int or None
        Bytes of device memory for the cache, or, with ``whole_card``, for everything.
    policy : Policy
    traced : bool
        Whether steps fetch the picks of a trace of real text, so that hot rows are found as often as there; without,
        random rows are picked, which are hardly ever hot.
    kernels : bool
        Of a padded batch's prompt: whether our kernel attends it, or what torch has.
    seconds : float
        What it takes, roughly; it is not begun with less time left.
    """

    name: str
    shape: str
    engine: str
    ctx: int
    batch: int | None = None
    budget: int | None = None
    whole_card: bool = False
    policy: Policy = _HOLD
    traced: bool = False
    kernels: bool = True
    seconds: float = 15.0


def all_jobs() -> list[Job]:
    """Every job, the most telling first; jobs of one model follow each other as far as that allows."""
    large, paper = "llama-3.1-8b", "llama-2-7b"
    at_budget = {"budget": 40 * GIB}
    on_card = {"budget": 80 * GIB, "whole_card": True}
    tiered = [
        Job("batch8_32k/kcache", large, "kcache", 32768, 8, traced=True, seconds=15),
        Job("equal_hbm_32k/kcache", large, "kcache", 32768, traced=True, seconds=22, **at_budget),
        Job("llama2_7b_15k/kcache", paper, "kcache", 15360, traced=True, seconds=28, **on_card),
    ]
    cold = [
        replace(job, name=job.name.replace("/kcache", "/no-hits"), traced=False, policy=_HOLD.replace(hot_rows=0))
        for job in tiered
    ]
    return [
        Job("batch8_32k/dense", large, "dense", 32768, 8, seconds=8),
        tiered[0],
        Job("prefill_32k/dense", large, "prefill", 32768, 1, policy=_HOLD.replace(offload="none"), seconds=10),
        Job("prefill_32k/kcache", large, "prefill", 32768, 1, seconds=12),
        Job("equal_hbm_32k/dense", large, "dense", 32768, seconds=8, **at_budget),
        tiered[1],
        replace(tiered[1], name="equal_hbm_32k/k8", policy=_HOLD.replace(k_bits=8), seconds=30),
        replace(tiered[0], name="batch8_32k/k8", policy=_HOLD.replace(k_bits=8)),
        replace(tiered[0], name="batch8_32k/k16", policy=_HOLD.replace(k_bits=16)),
        replace(tiered[1], name="equal_hbm_32k/k16", policy=_HOLD.replace(k_bits=16)),
        Job("batch1_128k/dense", large, "dense", 131072, 1, seconds=8),
        Job("batch1_128k/kcache", large, "kcache", 131072, 1, policy=_HOLD.replace(offload="auto"), seconds=8),
        Job("batch8_32k/hf-dynamic", large, "hf-dynamic", 32768, 8, seconds=8),
        Job("batch1_32k/kcache", large, "kcache", 32768, 1, traced=True, seconds=8),
        Job("batch1_32k/hf-offloaded", large, "hf-offloaded", 32768, 1),
        Job("llama2_7b_15k/dense", paper, "dense", 15360, seconds=12, **on_card),
        tiered[2],
        replace(tiered[2], name="llama2_7b_15k/k16", policy=_HOLD.replace(k_bits=16)),
        cold[2],
        cold[0],
        cold[1],
        Job("prefill_padded_16k/kcache", large, "prefill", 16384, 4, seconds=16),
        Job("prefill_padded_16k/torch", large, "prefill", 16384, 4, kernels=False, seconds=24),
    ]


def spec_of(job: Job) -> Spec:
    """How a job is timed: enough steps before it that thresholds have settled and the step is recorded.

    transformers' caches take long and stray little: two turns do.
    """
    return Spec(
        ctxs=(job.ctx,), topns=(job.policy.topn,), engines=(job.engine,), policy=job.policy,
        repeats=2 if job.engine.startswith("hf-") else 4, steps=16, warmup=8, turn_s=1.5,
    )  # fmt: skip


def largest_batch(need: Callable[[int], tuple[int, int]], device_bytes: int, host_bytes: int, most: int = 256) -> int:
    """The largest batch whose cache fits both tiers; ``need`` gives the bytes of a batch. 0 where none does."""
    fits = 0
    for batch in range(1, most + 1):
        device, host = need(batch)
        if device > device_bytes or host > host_bytes:
            break
        fits = batch
    return fits


def batch_of(
    job: Job, engine: Engine, shapes: list[LayerShape], total_bytes: int, weights_bytes: int, spare_bytes: int = 0
) -> int:
    """The job's batch, worked out from its budget where it has none; ``spare_bytes`` of RAM make way for it."""
    if job.batch is not None:
        return job.batch
    assert job.budget is not None
    room = job.ctx + spec_of(job).new_tokens
    allowed = job.budget
    if job.whole_card:
        allowed = min(job.budget, total_bytes) - weights_bytes - _SCRATCH
    ram = int((read_ram().available + spare_bytes) * _SHARE_OF_RAM)
    return largest_batch(lambda batch: engine.need(shapes, room, batch), allowed, ram)


def make_runner(job: Job, lm: LoadedModel, device_bytes: int, spec: Spec) -> Runner:
    """What decodes a job's steps, turn by turn; it has no cache yet."""
    engine, shapes = make_engine(job.engine, job.policy), layer_shapes(lm.model)
    weights = sum(parameter.nbytes for parameter in lm.model.parameters())
    batch = batch_of(job, engine, shapes, device_bytes, weights, spare_of(lm.model).nbytes)
    return Runner(lm, engine, Case(job.ctx, batch, (engine,)), spec, shapes)


def trace_of(job: Job, device: torch.device) -> AbstractContextManager[None]:
    """Inside this block, a traced job's steps fetch the picks of the trace."""
    return replayed(Trace(FILE, job.ctx, device)) if job.traced else nullcontext()


def measure(
    job: Job, lm: LoadedModel, machine: Bandwidths, device_bytes: int, spec: Spec | None = None
) -> dict[str, Any]:
    """Run a job; returns what was measured, or why it was not. ``spec`` is :func:`spec_of` unless given."""
    if job.engine == "prefill":
        return measure_prefill(job, lm)
    spec, shapes = spec or spec_of(job), layer_shapes(lm.model)
    engine = make_engine(job.engine, job.policy)
    weights = sum(parameter.nbytes for parameter in lm.model.parameters())
    batch = batch_of(job, engine, shapes, device_bytes, weights, spare_of(lm.model).nbytes)
    if batch == 0:
        return Row(job.engine, lm.name, job.ctx, 0, status="does not fit", reason="not one sequence fits").to_dict()
    with trace_of(job, lm.device):
        (rows,) = run(lm, spec, [Case(job.ctx, batch, (engine,))], machine)
    return {**rows[0].to_dict(), "picks": "of a trace" if job.traced else "of random rows"}


def measure_prefill(job: Job, lm: LoadedModel, repeats: int = 2) -> dict[str, Any]:
    """Time a prompt, one run to warm up before, and the device memory it took at its peak beside the weights."""
    batch = job.batch or 1
    ids = torch.randint(0, lm.vocabulary, (batch, job.ctx), device=lm.device)
    mask = None if batch == 1 else _padded(batch, job.ctx).to(lm.device)
    times: list[float] = []
    peak_bytes: int | None = None
    for _ in range(repeats + 1):
        gc.collect()  # a cache is a cycle: the last turn's would be freed within this one's peak
        cache = KCache(lm.model, job.policy, max_length=job.ctx + 64)
        peak = PeakMemory(lm.device)
        _synchronise(lm.device)
        began = time.perf_counter()
        with attach(lm.model), nullcontext() if job.kernels else patch.object(dense, "_kernels_for", return_value=None):
            for _ in prefill(lm.model, cache, ids, mask):
                pass
        _synchronise(lm.device)
        times.append((time.perf_counter() - began) * 1e3)
        peak_bytes = peak.added_bytes()
        held, policy = cache.stats, cache.shared.policy
        del cache
    first, *times = times
    return {
        "engine": "prefill", "model": lm.name, "ctx": job.ctx, "batch": batch, "status": "ok",
        "prefill_first_ms": first, "prefill_ms_p50": statistics.median(times),
        "prefill_ms_low": min(times), "prefill_ms_high": max(times),
        "peak_memory_bytes": peak_bytes, "device_kv_bytes": held.device_bytes, "host_kv_bytes": held.host_bytes,
        "v_layer_bytes": held.full_kv_bytes // (2 * len(lm.model.model.layers)), "policy": policy.to_dict(),
    }  # fmt: skip


def _padded(batch: int, ctx: int) -> torch.Tensor:
    """Which tokens are real ``[B, T]``: of the first sequence all, of each further one so many fewer, evenly."""
    pads = torch.arange(batch) * ctx // batch
    return (torch.arange(ctx) >= pads[:, None]).long()


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)

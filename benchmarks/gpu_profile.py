"""Where a decode step or a prompt of a GPU benchmark's job spends its time: a line per kernel, heaviest first.

    python3 -m benchmarks.gpu_profile batch8_32k/kcache batch8_32k/dense prefill_32k/kcache [--lines 30]

The profiler slows a step a little; the wall time beside the table is of the same steps without it.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu_jobs import Job, all_jobs, make_runner, spec_of, trace_of
from benchmarks.gpu_models import Models
from kcache.attaching import attach
from kcache.cache import KCache
from kcache.decoding.forward import prefill
from kcache.models.loaded import LoadedModel

_PAUSE_US = 3.0


@dataclass
class Kernel:
    """Times of one kernel in microseconds, one per launch."""

    name: str
    times_us: list[float]


def kernels_of(call: Callable[[], object]) -> tuple[list[Kernel], dict[str, float]]:
    """What ``call`` ran on the device, heaviest first; and the microseconds no kernel ran, by the one that came next.

    Copies between the tiers do not keep the device busy, and a moment's pause between kernels is not counted.
    """
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        call()
        torch.cuda.synchronize()
    found: dict[str, list[float]] = defaultdict(list)
    idle: dict[str, float] = defaultdict(float)
    events = [event for event in profiler.events() or () if event.device_type.name == "CUDA"]
    until = None
    for event in sorted(events, key=lambda event: event.time_range.start):
        found[event.name].append(event.time_range.elapsed_us())
        if event.name.startswith("Mem") and "Device" in event.name and "DtoD" not in event.name:
            continue
        if until is not None and event.time_range.start - until > _PAUSE_US:
            idle[event.name] += event.time_range.start - until
        until = max(until or 0.0, event.time_range.end)
    return sorted((Kernel(name, times) for name, times in found.items()), key=lambda each: -sum(each.times_us)), idle


def show(title: str, kernels: list[Kernel], idle: dict[str, float], runs: int, wall_ms: float, lines: int) -> None:
    """Print the table; counts and times are those of one run."""
    busy = sum(sum(kernel.times_us) for kernel in kernels) / runs / 1e3
    count = sum(len(kernel.times_us) for kernel in kernels) / runs
    print(f"\n{title}: {wall_ms:.2f} ms; kernels {busy:.2f} ms in {count:.0f} launches (overlap counted twice)")
    for kernel in kernels[:lines]:
        total, median = sum(kernel.times_us) / runs / 1e3, statistics.median(kernel.times_us)
        print(f"{total:9.3f} ms {len(kernel.times_us) / runs:7.1f} x {median:9.1f} us  {kernel.name[:90]}", flush=True)
    print(f"{sum(idle.values()) / runs / 1e3:9.3f} ms idle, before")
    for name in sorted(idle, key=lambda name: -idle[name])[: lines // 3]:
        print(f"{idle[name] / runs / 1e3:9.3f} ms  {name[:100]}", flush=True)


def profile_steps(job: Job, lm: LoadedModel, device_bytes: int, lines: int) -> None:
    """A turn of decode steps."""
    spec = replace(spec_of(job), warmup=1, steps=16)
    runner = make_runner(job, lm, device_bytes, replace(spec, warmup=24))
    with trace_of(job, lm.device):
        began = time.perf_counter()
        runner.prepare()
        prepared_s = time.perf_counter() - began
        runner.turn()
        runner._spec = spec
        runner.turn()
        wall = statistics.median(runner.measured.turns[-1])
        kernels, idle = kernels_of(runner.turn)
    runs = len(runner.measured.turns[-1]) + spec.warmup
    title = f"{job.name} batch {runner.case.batch}, {runner.measured.graph}, filled in {prepared_s:.1f} s"
    show(title, kernels, idle, runs, wall, lines)
    runner.free()


def profile_prompt(job: Job, lm: LoadedModel, lines: int) -> None:
    """A prompt, the second one; beside it the host's time in the calls that took longest."""
    ids = torch.randint(0, lm.vocabulary, (1, job.ctx), device=lm.device)

    def run() -> None:
        gc.collect()
        cache = KCache(lm.model, job.policy, max_length=job.ctx + 64)
        with attach(lm.model):
            for _ in prefill(lm.model, cache, ids, None):
                pass
        torch.cuda.synchronize()

    run()
    began = time.perf_counter()
    run()
    wall = (time.perf_counter() - began) * 1e3
    show(job.name, *kernels_of(run), 1, wall, lines)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=12, max_name_column_width=50))


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("jobs", nargs="+", help="names of jobs of the benchmark")
    parser.add_argument("--lines", type=int, default=30)
    options = parser.parse_args()
    device = torch.device("cuda", torch.cuda.current_device())
    models, by_name = Models(device), {job.name: job for job in all_jobs()}
    memory = torch.cuda.get_device_properties(device).total_memory
    for name in options.jobs:
        job = by_name[name]
        lm = models.get(job.shape)
        if job.engine == "prefill":
            profile_prompt(job, lm, options.lines)
        else:
            profile_steps(job, lm, memory, options.lines)
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()

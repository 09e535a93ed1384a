"""Compile the kernels of the GPU benchmark in parallel processes before its clock starts, by the host code it runs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, replace
from tempfile import TemporaryFile
from typing import Any

import torch

from benchmarks.gpu_jobs import Job, all_jobs, batch_of, spec_of
from benchmarks.gpu_models import SHAPES, make_model
from benchmarks.pick_trace import FILE, Trace, replayed
from benchmarks.precompile import compile_only
from kcache.backends.base import DecodeStep, LowRank, NarrowKeys
from kcache.backends.triton import Chip, Tuning, append
from kcache.backends.triton.backend import TritonBackend
from kcache.bench.context import LayerShape
from kcache.bench.engines import make_engine
from kcache.planning.sizes import rank_of

SHARDS = 12
_MOST_S = 150.0


def launch_all(job: Job, batch: int, tuning: Tuning) -> None:
    """Launch what a decode step of a job launches, on tensors of its sizes that nobody fills, on the CPU."""
    sizes = SHAPES[job.shape]
    heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
    dim, room = sizes["hidden_size"] // heads, job.ctx + spec_of(job).new_tokens
    half: Any = {"dtype": torch.bfloat16}
    keys, values = torch.empty(batch, kv_heads, room, dim, **half), torch.empty(batch, kv_heads, room, dim, **half)
    token = torch.empty(batch, kv_heads, dim, **half)
    length = torch.ones(1, dtype=torch.int32)
    backend = TritonBackend(torch.device("cuda"), tuning)
    step = DecodeStep(
        torch.empty(batch, heads, dim, **half), keys, values, room, dim**-0.5, job.policy, device_length=length
    )
    backend.dense(step)
    append(token, token, keys, values, length, offset=-1)
    if job.engine != "kcache" or job.policy.offload != "all":
        return
    rank = rank_of(job.policy.tail_rank, dim)
    tail = LowRank(
        torch.empty(batch, kv_heads, dim), torch.empty(batch, kv_heads, rank, dim),
        torch.empty(batch, kv_heads, rank, -(-room // 16) * 16, **half),
    )  # fmt: skip
    policy = job.policy.settled(kernels=True, itemsize=2)
    planes = policy.key_planes
    narrow = None
    if planes:
        keys = torch.empty(keys.shape, dtype=torch.int8)
        lower = torch.empty_like(keys) if planes == 2 else None
        narrow = NarrowKeys(torch.empty(batch, kv_heads, room), torch.empty(batch, kv_heads, dim), lower)
    append(token, token, keys, values, length, offset=-1, lowrank=tail, narrow=narrow)
    tally = torch.zeros(batch, dtype=torch.int64)
    above = torch.empty(batch)
    step = replace(step, policy=policy, keys=keys, lowrank=tail, threshold=above, tally=tally, narrow=narrow)
    hot = backend.keep_hot(step)
    with replayed(Trace(FILE, job.ctx, torch.device("cpu"))) if job.traced else nullcontext():
        backend.decode(replace(step, hot=hot))


def batches(jobs: Iterable[Job], device_bytes: int) -> dict[str, int]:
    """The batch of each job that decodes by our kernels; asks the device for what these depend on."""
    found = {}
    for job in jobs:
        if job.engine in ("kcache", "dense"):
            sizes = SHAPES[job.shape]
            shapes = [LayerShape(sizes["num_key_value_heads"], 128, 128, torch.bfloat16, torch.device("cuda"))] * 32
            weights = make_model(job.shape, torch.device("meta")).model
            held = sum(parameter.numel() * 2 for parameter in weights.parameters())
            found[job.name] = batch_of(job, make_engine(job.engine, job.policy), shapes, device_bytes, held)
    return found


def compile_shard(shard: int, chosen: Mapping[str, int], chip: Chip, shards: int = SHARDS) -> None:
    """Compile one shard's share of all launches, of jobs at the batches ``chosen``, into Triton's cache."""
    done: set[tuple[object, ...]] = set()
    with compile_only(chip.capability, shard=shard, shards=shards):
        for job in all_jobs():
            batch = chosen.get(job.name, 0)
            key = (job.shape, job.engine, job.ctx, batch, job.policy, job.traced)
            if batch and key not in done:
                done.add(key)
                launch_all(job, batch, Tuning(chip=chip))


def _end_of(shard: subprocess.Popen[bytes], began: float) -> int:
    """Exit code of a shard, which is ended if it is not done in time."""
    try:
        return shard.wait(max(0.0, began + _MOST_S - time.perf_counter()))
    except subprocess.TimeoutExpired:
        shard.kill()
        return shard.wait()


def precompile(device_bytes: int, chip: Chip) -> float:
    """Run all shards; one that fails, or takes too long, only means that its kernels compile later. Returns seconds."""
    began = time.perf_counter()
    chosen = batches(all_jobs(), device_bytes)
    command = [sys.executable, "-m", "benchmarks.gpu_compile", json.dumps(chosen), json.dumps(asdict(chip))]
    unseen = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    with ExitStack() as stack:
        said = [stack.enter_context(TemporaryFile("w+")) for _ in range(SHARDS)]
        running = [
            subprocess.Popen([*command, str(shard)], stderr=errors, env=unseen) for shard, errors in enumerate(said)
        ]
        failed = [errors for process, errors in zip(running, said, strict=True) if _end_of(process, began) != 0]
        if failed:
            failed[0].seek(0)
            last = "".join(failed[0].readlines()[-8:])
            print(f"{len(failed)} of {SHARDS} compile shards failed; the first of them with:\n{last}", flush=True)
    return time.perf_counter() - began


if __name__ == "__main__":
    compile_shard(int(sys.argv[3]), json.loads(sys.argv[1]), Chip(**json.loads(sys.argv[2])))

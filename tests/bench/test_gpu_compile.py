"""The GPU benchmark's kernels compile ahead of it, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

_SHARD = """
import json, sys
from benchmarks.gpu_compile import compile_shard
from kcache.backends.triton import Chip
compile_shard(999, json.loads(sys.argv[1]), Chip(), shards=1000)
"""
_LAUNCHES = """
from benchmarks.gpu_compile import launch_all
from benchmarks.gpu_jobs import all_jobs
from benchmarks.precompile import compile_only
from kcache.backends.triton import Chip
jobs = {job.name: job for job in all_jobs()}
with compile_only(shard=int("SHARD"), shards=1000) as compiled:
    launch_all(jobs["NAME"], 2, Chip())
print(*(name for name, _ in compiled))
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shard", "kernels"),
    [
        ("batch8_32k/kcache", 2, "append_kernel"),
        ("llama2_7b_15k/kcache", 999, ""),
        ("batch8_32k/dense", 0, "decode_kernel"),
    ],
)
def test_triton_launches_of_a_job_run_through(name: str, shard: int, kernels: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    script = _LAUNCHES.replace("NAME", name).replace("SHARD", str(shard))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == kernels


@pytest.mark.slow
def test_triton_a_shard_compiles_where_there_is_no_device() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    chosen = json.dumps({"batch8_32k/dense": 2, "batch8_32k/kcache": 2})
    command = [sys.executable, "-c", _SHARD, chosen]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr

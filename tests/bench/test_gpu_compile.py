"""The GPU benchmark's kernels compile ahead of it, without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

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

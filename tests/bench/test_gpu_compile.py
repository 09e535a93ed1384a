"""The GPU benchmark's kernels compile ahead of it, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from argparse import ArgumentTypeError

import pytest

from benchmarks.gpu_sweep import variant

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
from kcache.backends.triton import Chip, Tuning
jobs = {job.name: job for job in all_jobs()}
with compile_only(shard=int("SHARD"), shards=1000) as compiled:
    launch_all(jobs["NAME"], 2, Tuning(chip=Chip()))
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["benchmarks/gpu_stamps.py", "batch8_32k/kcache", "--compile-only"], "decode_kernel append_kernel"),
        (["-m", "benchmarks.gpu_sweep", "batch8_32k/kcache", "tail_splits=4", "--chip", "{}", "--batch", "2"], ""),
    ],
)
def test_triton_what_is_timed_on_a_card_compiles_without_one(command: list[str], said: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(said)


def test_triton_a_sweep_knows_its_parameters() -> None:
    assert variant("tail_splits=4,ahead=20") == {"tail_splits": 4, "ahead": 20}
    for text in ("tail=4", "tail_splits", "tail_splits=x"):
        with pytest.raises(ArgumentTypeError, match=text.split("=")[0]):
            variant(text)

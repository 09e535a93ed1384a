"""Time a GPU benchmark's decode step under other launch parameters, in the engine, with the picks of its trace.

    python3 -m benchmarks.gpu_sweep batch8_32k/kcache tail_splits=4 tail_splits=6,weigh_tile=256

Each argument after the job's name is a variant: fields of ``Tuning``. They take turns on one cache, the usual ones
first and last, and each is recorded anew; printed are the lowest and the highest median of a turn, and what the
parameters came to. All variants are compiled in parallel before.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from dataclasses import asdict, fields, replace

import torch

from benchmarks.gpu_compile import launch_all
from benchmarks.gpu_jobs import all_jobs, make_runner, spec_of, trace_of
from benchmarks.gpu_models import Models
from benchmarks.precompile import compile_only
from kcache.backends.triton import Chip, Tuning, Workspace, chip_of
from kcache.backends.triton.backend import TritonBackend
from kcache.cache import KCache
from kcache.decoding.loop import graph_of

_TURNS = 3
_SHOWN = (
    "score_splits",
    "score_block",
    "tail_splits",
    "tail_tile",
    "ahead",
    "select_tile",
    "gather_rows",
    "weigh_tile",
)


def variant(text: str) -> dict[str, int]:
    """``name=value,name=value`` as numbers."""
    known = {field.name for field in fields(Tuning)} - {"chip"}
    try:
        found = {name: int(value) for name, value in (each.split("=") for each in text.split(",") if each)}
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=NUMBER,...") from None
    if not known.issuperset(found):
        raise argparse.ArgumentTypeError(f"no such launch parameter in {text!r}; there are {', '.join(sorted(known))}")
    return found


def compile_all(job: str, batch: int, variants: list[str], chip: Chip) -> None:
    """Compile the step of each variant, one process each."""
    command = [sys.executable, "-m", "benchmarks.gpu_sweep", job, "--chip", json.dumps(asdict(chip))]
    unseen = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    running = [
        subprocess.Popen([*command, "--batch", str(batch), each], env=unseen, stderr=subprocess.DEVNULL)
        for each in variants
    ]
    failed = [each for each, process in zip(variants, running, strict=True) if process.wait() != 0]
    if failed:
        print(f"not compiled ahead: {failed}", flush=True)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = {job.name: job for job in all_jobs() if job.engine == "kcache"}
    parser.add_argument("job", choices=jobs)
    parser.add_argument("variants", nargs="+", metavar="NAME=NUMBER,...", type=lambda text: (text, variant(text)))
    parser.add_argument("--chip", help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    job = jobs[options.job]
    if options.chip is not None:
        chip = Chip(**json.loads(options.chip))
        with compile_only(chip.capability):
            for _, change in options.variants:
                launch_all(job, options.batch, replace(Tuning(chip=chip), **change))
        return
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: a step can only be timed on one")
    device = torch.device("cuda", torch.cuda.current_device())
    usual, lm = Tuning(chip=chip_of(device)), Models(device).get(job.shape)
    spec = replace(spec_of(job), warmup=8, steps=16)
    runner = make_runner(job, lm, torch.cuda.get_device_properties(device).total_memory, spec)
    compile_all(job.name, runner.case.batch, ["", *(text for text, _ in options.variants)], chip_of(device))
    with trace_of(job, device):
        runner.prepare()
        runner.turn()
        cache = runner._cache
        assert isinstance(cache, KCache)
        graph, backend = graph_of(cache), cache.shared.backend(device)
        assert graph is not None and isinstance(backend, TritonBackend)
        for text, change in [("as usual", {}), *options.variants, ("as usual", {})]:
            backend.tuning = replace(usual, **change)
            backend._workspaces.clear()
            graph.forget()
            for _ in range(_TURNS):
                runner.turn()
            middles = [statistics.median(turn) for turn in runner.measured.turns[1 - _TURNS :]]
            (scratch,) = (each for each in backend.scratch if isinstance(each, Workspace))
            came_to = " ".join(f"{name} {getattr(scratch, name)}" for name in _SHOWN)
            print(
                f"{text:40} {min(middles):.3f} to {max(middles):.3f} ms  {runner.measured.graph}  {came_to}", flush=True
            )


if __name__ == "__main__":
    main()

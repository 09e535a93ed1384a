"""The GPU benchmark: decode and prefill at real shapes, KCache beside exact attention and beside transformers.

    python3 -m benchmarks.gpu [--folder docs/benchmarks] [--budget-s 285] [--only TEXT]

Weights and caches are random and made on the device; nothing is fetched. Jobs run in order of worth and the record is
written after each, so whatever ends the run leaves what was measured. A job there is no time for is marked left out,
one that does not fit is a row with the reason. An error after which the device answers no more ends the run. The file
is named after the card.
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_compile import precompile
from benchmarks.gpu_jobs import Job, all_jobs, measure
from benchmarks.gpu_models import Models
from benchmarks.gpu_report import job_line, ratio_lines, record
from kcache.backends.triton import chip_of
from kcache.bench.env import environment
from kcache.bench.report import Problem
from kcache.speed.machine import measure as measure_machine


class Bench:
    """A run: what was measured so far, and the file it is written to.

    Parameters
    ----------
    run : callable
        Runs a job and returns its figures.
    env : dict
    output : Path or None
    budget_s : float
    clock, say : callable
    alive : callable
        Whether the device still answers; asked after a job that failed.
    """

    def __init__(
        self,
        run: Callable[[Job], dict[str, Any]],
        env: dict[str, Any],
        output: Path | None,
        budget_s: float,
        clock: Callable[[], float] = time.perf_counter,
        say: Callable[[str], None] = print,
        alive: Callable[[], bool] = lambda: True,
    ) -> None:
        self.figures: dict[str, dict[str, Any]] = {}
        self.left_out: dict[str, str] = {}
        self._run, self._env, self._output, self._budget_s = run, env, output, budget_s
        self._clock, self._say, self._alive = clock, say, alive
        self._began = clock()

    def go(self, jobs: Iterable[Job]) -> dict[str, Any]:
        """Run the jobs there is time for; returns the record."""
        lost = ""
        for job in jobs:
            if lost:
                self.left_out[job.name] = lost
                continue
            left = self._budget_s - (self._clock() - self._began)
            if left < job.seconds:
                self.left_out[job.name] = f"{left:.0f} s were left, it takes {job.seconds:.0f}"
                self._say(f"{job.name:26} left out: {self.left_out[job.name]}")
                continue
            began = self._clock()
            try:
                figures = self._run(job)
            except Exception as error:
                problem = Problem.of(error)
                figures = {"status": problem.status, "reason": problem.reason, "ctx": job.ctx, "batch": job.batch}
            self.figures[job.name] = {**figures, "took_s": round(self._clock() - began, 1)}
            self._say(job_line(job.name, self.figures[job.name]))
            if figures["status"] != "ok" and not self._alive():
                lost = f"the device does not answer since {job.name}"
                self._say(lost)
            self._write()
        return self._write()

    def _write(self) -> dict[str, Any]:
        found = record(self._env, self.figures, self.left_out, self._clock() - self._began)
        if self._output is not None:
            self._output.parent.mkdir(parents=True, exist_ok=True)
            self._output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        return found


def device_answers() -> bool:
    """Whether CUDA still works in this process: an illegal address fails every later call, too."""
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def file_of(device: str) -> str:
    """The name of the record of a card: ``h200.json`` for an H200, whatever its driver says around that."""
    words = re.findall(r"[a-z0-9]+", device.lower())
    models = [word for word in words if re.fullmatch(r"[a-z]{1,3}\d{2,4}[a-z]{0,2}", word)]
    return f"{models[0] if models else '-'.join(words)}.json"


def commit() -> str | None:
    """The commit this runs from, with ``-dirty`` where files differ from it; None outside a repository."""
    command = ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parent)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("docs/benchmarks"))
    parser.add_argument("--budget-s", type=float, default=285.0, help="begin no job that would end after so long")
    parser.add_argument("--only", default="", help="jobs whose name holds this text")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: these figures can only be taken on one")
    device = torch.device("cuda", torch.cuda.current_device())
    machine = measure_machine(device)
    models = Models(device)

    def run(job: Job) -> dict[str, Any]:
        lm = models.get(job.shape)
        try:
            return measure(job, lm, machine, machine.device_bytes)
        finally:
            gc.collect()
            if device_answers():
                torch.cuda.empty_cache()

    compile_s = precompile(machine.device_bytes, chip_of(device))
    env = {**environment(machine), "commit": commit(), "compile_s": round(compile_s, 1)}
    print(
        f"{machine.name}: memory {machine.memory_gb_s:.0f} GB/s, rows over the link {machine.gather_gb_s:.1f} GB/s; "
        f"kernels compiled in {compile_s:.0f} s"
    )
    output = options.folder / file_of(machine.name)
    bench = Bench(run, env, output, options.budget_s, alive=device_answers)
    bench.go(job for job in all_jobs() if options.only in job.name)
    print("\n".join(["", *ratio_lines(bench.figures, bench.left_out), "", f"written to {output}"]))


if __name__ == "__main__":
    main()

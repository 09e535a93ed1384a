"""Judge many architectures, each bounded in time and memory, so that a bad one costs one verdict and not the walk."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import kcache
from kcache.verify.verdict import Verdict

TIMEOUT_S = 120.0
_COMMAND = (sys.executable, "-m", "kcache.verify.worker")


@dataclass(frozen=True)
class Job:
    """One thing to judge: an entry of the mapping, or with ``named`` a model by name, folder or file."""

    name: str
    named: bool = False
    trust: bool = False
    timeout_s: float = TIMEOUT_S


def walk(jobs: Sequence[Job], workers: int = 2, command: Sequence[str] = _COMMAND) -> Iterator[Verdict]:
    """Yield the verdicts as they come, in any order.

    Parameters
    ----------
    jobs : sequence of Job
    workers : int
        Processes side by side, each on one core.
    command : sequence of str
        What a worker is started with.
    """
    todo: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
    done: queue.SimpleQueue[Verdict | None] = queue.SimpleQueue()
    for job in jobs:
        todo.put(job)
    count = max(1, min(workers, len(jobs)))
    stop = threading.Event()
    for _ in range(count):
        todo.put(None)
        threading.Thread(target=_serve, args=(todo, done, stop, command), daemon=True).start()
    try:
        while count:
            verdict = done.get()
            if verdict is None:
                count -= 1
            else:
                yield verdict
    finally:
        stop.set()


def _serve(
    todo: queue.SimpleQueue[Job | None],
    done: queue.SimpleQueue[Verdict | None],
    stop: threading.Event,
    command: Sequence[str],
) -> None:
    worker = None
    try:
        while (job := todo.get()) is not None and not stop.is_set():
            if worker is None or not worker.alive:
                worker = _Worker(command)
            done.put(worker.judge(job))
    finally:
        if worker is not None:
            worker.close()
        done.put(None)


class _Worker:
    """A worker process, killed when a verdict takes too long."""

    def __init__(self, command: Sequence[str]) -> None:
        here = str(Path(kcache.__file__).parent.parent)
        path = os.pathsep.join(filter(None, (here, os.environ.get("PYTHONPATH"))))
        quiet = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TRANSFORMERS_VERBOSITY": "error"}
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **quiet, "PYTHONPATH": path},
        )

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def judge(self, job: Job) -> Verdict:
        """Hand over one job and wait for its verdict."""
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(job.timeout_s, self._process.kill)
        timer.start()
        try:
            self._process.stdin.write(json.dumps({"name": job.name, "named": job.named, "trust": job.trust}) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        finally:
            timer.cancel()
        if line.endswith("\n"):
            return Verdict(**json.loads(line))
        self._process.kill()
        code = self._process.wait()
        late = timer.finished.is_set() and code == -9
        why = f"no verdict within {job.timeout_s:g} s" if late else f"the process ended with {code}"
        return Verdict(job.name, "", "crashed", why)

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

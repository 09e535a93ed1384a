"""``kcache generate --engine ray``: the same bytes as without, also when a worker is killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from kcache.errors import DoesNotFitError, InputError, KCacheError
from kcache_cli.batch.inputs import Entry
from kcache_cli.batch.run import Work
from kcache_cli.batch.share import Share, largest_share
from kcache_cli.batch.worker import Attempts, _described, pack, results_of, unpack
from kcache_cli.engine import KCacheEngine
from kcache_cli.text import json_line
from tests.cli.conftest import Run
from tests.saved import save_tiny

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
POLICY = "topn = 8\ndense_below = 0\ndense_layers = 1\n"


def arguments(folder: Path, out: Path, *args: str) -> list[str]:
    files = ["-i", str(folder / "in.jsonl"), "-o", str(out), "--policy", str(folder / "policy.toml")]
    fixed = ["--device", "cpu", "--batch-size", "2", "-n", "100", "--temperature", "0.8"]
    return ["generate", str(folder / "model"), *files, *fixed, *args]


def decoding(workers: list[psutil.Process]) -> bool:
    """Whether one of them computes: it is in the middle of a batch."""
    before = [worker.cpu_times().user for worker in workers]
    time.sleep(0.1)
    return any(worker.cpu_times().user - used > 0.06 for worker, used in zip(workers, before, strict=True))


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child for child in children if "MapWorker" in " ".join(child.cmdline())]


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.timeout(600)
def test_a_worker_killed_on_the_way_loses_and_repeats_nothing(run: Run, one_thread: None, tmp_path: Path) -> None:
    save_tiny(tmp_path / "model")
    (tmp_path / "policy.toml").write_text(POLICY)
    prompts = [json.dumps({"id": f"p{at}", "prompt": "some words to read " * (1 + at % 5)}) for at in range(24)]
    (tmp_path / "in.jsonl").write_text("\n".join([*prompts, "{bad"]))
    one, many = tmp_path / "one.jsonl", tmp_path / "many.jsonl"
    assert run(*arguments(tmp_path, one), engine=KCacheEngine()).exit_code == 0
    on_ray = arguments(tmp_path, many, "--engine", "ray", "--workers", "2")
    command = [sys.executable, "-m", "kcache_cli", *on_ray]
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    journal, deadline = tmp_path / "many.jsonl.kcache", time.monotonic() + 200
    while lines_in(journal) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    workers = workers_of(process)
    assert len(workers) == 2, process.communicate()[1] if process.poll() is not None else "still starting"
    while not decoding(workers) and time.monotonic() < deadline:
        pass
    for worker in workers:  # both, so that one of them is in the middle of a batch
        os.kill(worker.pid, signal.SIGKILL)
    assert lines_in(journal) < 12, "killed before the end"
    stdout, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    assert many.read_bytes() == one.read_bytes()
    assert [json.loads(line)["id"] for line in many.read_text().splitlines()] == [f"p{at}" for at in range(24)]
    assert "a worker died" in stderr
    assert "line 25: not valid JSON" in stderr
    assert "24 prompts" in stderr
    assert stdout == ""
    assert "complete" in run(*on_ray).stderr, "the journal knows the job"
    assert "complete" in run(*arguments(tmp_path, many)).stderr, "whoever ran it"


# -- who gets what -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("nodes", "workers", "want"),
    [
        ([{"CPU": 2.0}], None, (1, 0.0, 1.0, 2, 1)),
        ([{"CPU": 2.0}], 2, (2, 0.0, 0.5, 1, 2)),
        ([{"CPU": 1.0}], 1, (1, 0.0, 0.5, 1, 1)),
        ([{"CPU": 64.0}], 2, (2, 0.0, 31.0, 32, 2)),
        ([{"CPU": 8.0}, {"CPU": 8.0}], None, (2, 0.0, 7.0, 8, 1)),
        ([{"CPU": 16.0, "GPU": 4.0}], None, (4, 1.0, 1.0, 4, 4)),
        ([{"CPU": 16.0, "GPU": 4.0}], 2, (2, 2.0, 1.0, 8, 2)),
        ([{"CPU": 16.0, "GPU": 1.0}], 2, (2, 0.5, 1.0, 8, 2)),
        ([{"CPU": 4.0, "GPU": 8.0}], None, (8, 1.0, 0.3333, 1, 8)),
        ([{"CPU": 32.0, "GPU": 4.0}] * 2 + [{"CPU": 4.0}], 3, (3, 2.0, 1.0, 16, 2)),
    ],
)
def test_shares(nodes: list[dict[str, float]], workers: int | None, want: tuple[float, ...]) -> None:
    share = Share.of(nodes, workers, on_cpu=False)
    assert (share.workers, share.gpus, share.cpus, share.threads, share.neighbours) == want


def test_on_the_cpu_gpus_are_left_alone() -> None:
    assert Share.of([{"CPU": 8.0, "GPU": 2.0}], 1, on_cpu=True).gpus == 0.0


def test_no_room() -> None:
    with pytest.raises(InputError, match="no room"):
        largest_share([1.0], 1000)


def test_a_share_of_a_machine_is_planned_for() -> None:
    split = Share.of([{"CPU": 16.0, "GPU": 1.0}], 2, on_cpu=False).split
    assert (split.sharers, split.gpus, split.gpu_share) == (2, 1, 0.5)
    split = Share.of([{"CPU": 16.0, "GPU": 4.0}], 2, on_cpu=False).split
    assert (split.sharers, split.gpus, split.gpu_share) == (2, 2, 1.0)


# -- what travels --------------------------------------------------------------------------------------------------


def test_prompts_travel_as_tokens() -> None:
    work = [Work(Entry(4, "a\ud800"[:1], "text"), [1, 2]), Work(Entry(9, 7, "text"), [3])]
    there = unpack(pack(work))
    assert [(item.entry.line, item.entry.id, item.ids) for item in there] == [(4, "a", [1, 2]), (9, 7, [3])]


def test_problems_travel_as_what_they_are() -> None:
    with pytest.raises(DoesNotFitError, match="too big"):
        results_of(json_line({"problem": _described(DoesNotFitError("too big"))}))
    with pytest.raises(DoesNotFitError, match="out of memory"):
        results_of(json_line({"problem": _described(MemoryError())}))
    with pytest.raises(KCacheError, match="on a worker: unexpected ZeroDivisionError"):
        results_of(json_line({"problem": _described(ZeroDivisionError("x"))}))


def test_attempts_are_counted_for_each_batch() -> None:
    attempts = Attempts()
    assert [attempts.begin(number) for number in (1, 2, 1, 1)] == [1, 1, 2, 3]


@pytest.mark.parametrize(
    ("args", "say"),
    [
        (["--workers", "2"], "are for --engine ray"),
        (["--address", "auto"], "are for --engine ray"),
        (["--engine", "ray", "--record", "x.kcr"], "leave it out"),
        (["--engine", "ray", "--device", "cuda:1"], "GPUs of its own"),
        (["--engine", "ray", "--address", "127.0.0.1:1"], "no Ray cluster there"),
        (["--engine", "spark"], "is not one of"),
    ],
)
def test_what_does_not_go_together(run: Run, tmp_path: Path, args: list[str], say: str) -> None:
    (tmp_path / "in.txt").write_text("a prompt\n")
    result = run("generate", "-i", str(tmp_path / "in.txt"), "-o", str(tmp_path / "out.jsonl"), *args)
    assert result.exit_code == 2
    assert say in result.stderr
    assert not (tmp_path / "out.jsonl").exists()

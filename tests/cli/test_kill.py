"""A batch job killed at any moment goes on as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def start(source: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.cli.killable", "generate", "--batch-size", "2", "--temperature", "1"]
    return subprocess.Popen(
        [*command, "-i", str(source), "-o", str(out)], cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=hear_interrupts
    )


def hear_interrupts() -> None:
    """A job in the background of a shell is started deaf to them, and so would be what these tests start."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def wait_for_growth(path: Path, beyond: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < deadline:
        if path.exists() and path.stat().st_size > beyond:
            return
        time.sleep(0.005)


def test_killed_four_times_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    source, out, undisturbed = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "whole.jsonl"
    ids = [f"p{number}" for number in range(40)]
    lines = [json.dumps({"id": name, "prompt": "word " * (1 + 7 * at % 9)}) for at, name in enumerate(ids)]
    source.write_text("\n".join(lines))
    assert start(source, undisturbed).wait(120) == 0
    journal = tmp_path / "out.jsonl.kcache"
    for delay in (0.0, 0.03, 0.01, 0.05):
        size = journal.stat().st_size if journal.exists() else 0
        process = start(source, out)
        wait_for_growth(journal, size + 300, process)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        if out.exists():
            assert undisturbed.read_bytes().startswith(out.read_bytes())
    last = start(source, out)
    assert last.wait(120) == 0
    assert last.stderr is not None
    assert b"continuing" in last.stderr.read()
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ids
    assert out.read_bytes() == undisturbed.read_bytes()


@pytest.mark.parametrize(
    ("numbers", "code"),
    [
        ([signal.SIGINT], 130),
        ([signal.SIGTERM], 143),
        ([signal.SIGTERM, signal.SIGTERM], 143),  # as ``timeout`` does: once to us, once to our group
        ([signal.SIGHUP], 129),
    ],
)
def test_a_signal_ends_the_job_between_batches(tmp_path: Path, numbers: list[int], code: int) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("word\n" * 2000)  # a minute of work
    process = start(source, out)
    wait_for_growth(tmp_path / "out.jsonl.kcache", 1000, process)
    for number in numbers:
        process.send_signal(number)
    assert process.wait(60) == code
    assert process.stderr is not None
    said = process.stderr.read().decode()
    assert "Traceback" not in said
    assert said.count("goes on") == 1


def test_a_signal_while_the_interpreter_ends_does_not_change_the_exit_code(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("word\n" * 2000)
    again = "import atexit, runpy, signal; atexit.register(signal.raise_signal, signal.SIGTERM)"
    run = "runpy.run_module('tests.cli.killable', run_name='__main__', alter_sys=True)"
    command = [sys.executable, "-c", f"{again}; {run}", "generate", "-i", str(source), "-o", str(out)]
    process = subprocess.Popen([*command, "--batch-size", "2"], cwd=ROOT, preexec_fn=hear_interrupts)
    wait_for_growth(tmp_path / "out.jsonl.kcache", 1000, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143


def test_nohup_is_left_alone(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("word\n" * 20)
    command = [sys.executable, "-m", "tests.cli.killable", "generate", "-i", str(source), "-o", str(out)]
    process = subprocess.Popen(
        [*command, "--batch-size", "2"], cwd=ROOT, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN)
    )
    wait_for_growth(tmp_path / "out.jsonl.kcache", 300, process)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0
    assert len(out.read_text().splitlines()) == 20

"""A batch job killed at any moment goes on as if it had not been."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def start(source: Path, out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "tests.cli.killable", "generate", "--batch-size", "2", "--temperature", "1"]
    return subprocess.Popen(
        [*command, "-i", str(source), "-o", str(out)], cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=hear_interrupts
    )


def hear_interrupts() -> None:
    """A job in the background of a shell is started deaf to them, and so would be what these tests start."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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


def test_ctrl_c_leaves_with_130(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    source.write_text("word\n" * 2000)  # a minute of work
    process = start(source, out)
    wait_for_growth(tmp_path / "out.jsonl.kcache", 1000, process)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert process.stderr is not None
    said = process.stderr.read().decode()
    assert "Traceback" not in said
    assert "goes on" in said

"""``kcache generate`` in two processes that share a model's heads: the same bytes, told by rank 0 alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import kcache
from kcache.machine.parallel import ALONE, check_heads
from kcache_cli.engine import KCacheEngine
from kcache_cli.ranks import check_command, launched
from tests import tiny_models
from tests.cli.conftest import Run
from tests.saved import save_tiny

ROOT = Path(__file__).parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1"}
POLICY = 'topn = 8\ndense_below = 0\ndense_layers = 1\nspread = "need"\n'


def arguments(folder: Path, out: Path, *args: str) -> list[str]:
    fixed = ["--dtype", "float32", "--device", "cpu", "--batch-size", "3", "-n", "20"]
    return ["generate", str(folder), "-o", str(out), *fixed, *args]


def command_of_two(*args: str) -> list[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [sys.executable, *torchrun, "-m", "kcache_cli", *args]


def in_two(prompts: str, *args: str) -> subprocess.CompletedProcess[str]:
    """Run ``kcache`` in two processes, on prompts from standard input."""
    return subprocess.run(
        command_of_two(*args),
        cwd=ROOT,
        env=ENV,
        input=prompts,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.mark.parametrize("kv_heads", [2, 4])
def test_two_processes_write_what_one_does(run: Run, one_thread: None, tmp_path: Path, kv_heads: int) -> None:
    """Sampled, with rows going where they are needed: one rank that decides otherwise would show in every token."""
    folder = save_tiny(tmp_path / "model", num_key_value_heads=kv_heads)
    policy = tmp_path / "policy.toml"
    policy.write_text(POLICY)
    words = "the quick brown fox jumps over the lazy dog "
    lines = [json.dumps({"id": f"p{number}", "prompt": words * (1 + number % 3)}) for number in range(5)]
    prompts = "\n".join([*lines, "{bad"])
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    sampled = ["--policy", str(policy), "--temperature", "0.8", "--seed", "3"]
    alone = run(*arguments(folder, one, *sampled), input=prompts, engine=KCacheEngine())
    assert alone.exit_code == 0, alone.stderr
    shared = in_two(prompts, *arguments(folder, two, *sampled))
    assert shared.returncode == 0, shared.stderr
    assert [json.loads(line)["id"] for line in two.read_text().splitlines()] == [f"p{number}" for number in range(5)]
    assert two.read_bytes() == one.read_bytes()
    assert shared.stdout == ""
    assert shared.stderr.count("line 6: not valid JSON") == 1, "rank 0 alone reads and tells"
    assert shared.stderr.count("5 prompts") == 1


def test_heads_that_cannot_be_shared_are_named_before_loading(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", num_attention_heads=9, num_key_value_heads=3, hidden_size=72)
    (folder / "model.safetensors").write_bytes(b"not weights")
    out = tmp_path / "out.jsonl"
    result = in_two("a prompt\n", *arguments(folder, out))
    assert result.returncode != 0
    assert f"kcache: error: {folder} has 3 KV heads, which 2 processes cannot share evenly; use 1 or 3" in result.stderr
    assert result.stderr.count("kcache: error") == 1
    assert not out.exists()


def test_a_process_that_dies_is_missed_in_our_words(tmp_path: Path) -> None:
    folder, out = save_tiny(tmp_path / "model"), tmp_path / "out.jsonl"
    prompts, journal = tmp_path / "in.jsonl", tmp_path / "out.jsonl.kcache"
    prompts.write_text("some words\n" * 3000)
    command = command_of_two(*arguments(folder, out, "-i", str(prompts)))
    process = subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    while (not journal.exists() or journal.read_bytes().count(b"\n") < 3) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    (other,) = (each for each in psutil.Process(process.pid).children() if each.environ().get("RANK") == "1")
    other.kill()
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert "kcache: error: another of the processes has ended" in stderr
    assert "goes on from the last finished batch" in stderr
    assert "unexpected" not in stderr
    assert not other.is_running()


@pytest.mark.parametrize(
    ("kind", "changes", "size", "say"),
    [
        ("llama", {}, 4, "has 2 KV heads, which 4 processes .* use 1 or 2"),
        ("mqa", {}, 2, "has 1 KV heads, which 2 processes"),
        ("gpt2", {}, 2, "no tensor-parallel plan for gpt2"),
    ],
)
def test_what_cannot_be_shared(kind: str, changes: dict[str, Any], size: int, say: str) -> None:
    with pytest.raises(kcache.UnsupportedModelError, match=say):
        check_heads(tiny_models.config(kind, **changes), "this", size)
    check_heads(tiny_models.config("llama"), "this", 2)


def test_a_process_by_itself_agrees_with_itself() -> None:
    assert ALONE.least([3, 1]) == [3, 1]


def test_only_generate_runs_in_several_processes() -> None:
    launch = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    assert launched({}) == launched({**launch, "MASTER_ADDR": ""}) == 1
    assert launched(launch) == 2
    check_command("generate", launch)
    check_command("chat", {})
    with pytest.raises(kcache.InputError, match="no other command"):
        check_command("chat", launch)
    with pytest.raises(SystemExit):
        check_command("chat", {**launch, "RANK": "1"})

"""The commands on a device, each a process of its own: what they print, and that it is the device that decoded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.saved import save_tiny

pytestmark = pytest.mark.gpu
for name in ("typer", "pydantic_settings"):
    pytest.importorskip(name)

DEVICE = "cuda"
PROMPTS = ["What is a needle? " * 40, "Short.", "A prompt of the usual length, more or less. " * 9, "Two " * 30]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
    return save_tiny(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=4096, **shape)


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    """Everything but a layer leaves the device at once."""
    file = tmp_path / "policy.toml"
    file.write_text('dense_below = 0\ndense_layers = 1\ntopn = 32\noffload = "all"\n')
    return file


def kcache(folder: Path, *args: str | Path, said: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "XDG_CONFIG_HOME": str(folder), "XDG_STATE_HOME": str(folder), "COLUMNS": "120"}
    command = [sys.executable, "-m", "kcache_cli", *map(str, args)]
    done = subprocess.run(
        command, input=said, capture_output=True, text=True, env=environment, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return done


def answers(folder: Path, model: Path, policy: Path, name: str, *args: str | Path) -> list[dict[str, Any]]:
    source, out = folder / "in.jsonl", folder / f"{name}.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in PROMPTS))
    kcache(
        folder, "generate", model, "--device", DEVICE, "--dtype", "float32", "--policy", policy, "--temperature", "0",
        "--max-tokens", "24", "-i", source, "-o", out, *args,
    )  # fmt: skip
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_generate_answers_as_the_reference_does(tmp_path: Path, model: Path, policy: Path) -> None:
    recording = tmp_path / "run.kcr"
    got = answers(tmp_path, model, policy, "fast", "--record", recording)
    want = answers(tmp_path, model, policy, "slow", "--backend", "reference", "--graph", "off")
    assert [row["prompt_tokens"] for row in got] == [row["prompt_tokens"] for row in want]
    same = [one["text"] == other["text"] for one, other in zip(got, want, strict=True)]
    assert sum(same) >= len(same) - 1, "random weights have near ties, and sums another order"
    shown = kcache(tmp_path, "inspect", recording, "--once").stdout
    assert "tiny" in shown and "host-only" not in shown


@pytest.mark.parametrize("bits", [["--k-bits", "8+8"], ["--k-bits", "8", "--v-bits", "8"]], ids=" ".join)
def test_generate_with_rows_in_8_bits(tmp_path: Path, model: Path, policy: Path, bits: list[str]) -> None:
    rows = answers(tmp_path, model, policy, "narrow", *bits)
    assert [row["completion_tokens"] > 0 for row in rows] == [True] * len(PROMPTS)


def test_chat_answers(tmp_path: Path, model: Path, policy: Path) -> None:
    done = kcache(
        tmp_path, "chat", model, "--device", DEVICE, "--policy", policy, "--max-tokens", "16", "--temperature", "0",
        said=PROMPTS[2],
    )  # fmt: skip
    assert done.stdout.strip()
    assert "tok/s" in done.stderr and "host-only" not in done.stderr


def test_bench_times_the_device(tmp_path: Path, model: Path, policy: Path) -> None:
    args = ["--ctx", "1k", "--topn", "32", "--steps", "4", "-r", "2", "-o", "jsonl"]
    done = kcache(tmp_path, "bench", model, "--device", DEVICE, "--policy", policy, *args)
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    tiered = next(row for row in rows if row["engine"] == "kcache")
    assert tiered["status"] == "ok", tiered["reason"]
    assert tiered["mode"] == "topn" and tiered["host_kv_bytes"] > 0


def test_doctor_measures_the_device(tmp_path: Path) -> None:
    found = json.loads(kcache(tmp_path, "doctor", "--json").stdout)
    assert "h2d_gb_s" in json.dumps(found)

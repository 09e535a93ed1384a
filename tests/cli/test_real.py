"""The commands on the real engine: a tiny random model, and the demo model where only a real one will do."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from kcache import LoadedModel, Policy
from kcache.errors import DoesNotFitError, InputError, ModelNotFoundError
from kcache.models.progress import Progress
from kcache_cli.engine import KCacheEngine
from kcache_cli.options import ModelOptions
from tests.cli.conftest import Run
from tests.cli.test_generate import lines_of
from tests.saved import save_tiny

ROOT = Path(__file__).parents[2]


class LoadedEngine(KCacheEngine):
    """The real engine with a model that is loaded already."""

    def __init__(self, lm: LoadedModel) -> None:
        self.lm = lm

    def reader(self, model: ModelOptions, progress: Progress) -> LoadedModel:
        return self.lm

    def load(self, model: ModelOptions, progress: Progress) -> LoadedModel:
        return self.lm


def test_chat(run: Run, tiny_folder: Path) -> None:
    args = ["chat", str(tiny_folder), "--topn", "4", "-n", "6", "--temperature", "0", "--json"]
    result = run(*args, input="hello", engine=KCacheEngine())
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert answer["completion_tokens"] <= 6
    assert answer["full_kv_bytes"] > 0
    assert run(*args, input="hello", engine=KCacheEngine()).exit_code == 0


def test_a_seed_where_nothing_is_drawn_is_told(run: Run, tiny_folder: Path) -> None:
    args = ("chat", str(tiny_folder), "-n", "1", "--seed", "5")
    assert "--seed 5 changes nothing" in run(*args, input="hi", engine=KCacheEngine()).stderr
    assert "nothing" not in run(*args, "--temperature", "1", input="hi", engine=KCacheEngine()).stderr


def test_a_model_of_which_nothing_is_tiered_is_told(run: Run, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "windows", "mistral", sliding_window=8)
    stderr = run("chat", str(folder), "-n", "1", input="hi", engine=KCacheEngine()).stderr
    assert "this model's layers cannot be tiered: window" in stderr


def test_generate_batched_equals_one_by_one(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text(
        "".join(json.dumps({"id": f"p{size}", "prompt": "abc " * size}) + "\n" for size in (3, 9, 1, 5))
        + json.dumps({"id": "chat", "messages": [{"role": "user", "content": "hi"}]})
    )
    outputs = []
    for batch_size in ("1", "3"):
        out = tmp_path / f"out{batch_size}.jsonl"
        args = ["generate", str(tiny_folder), "-i", str(source), "-o", str(out), "-n", "5", "--dtype", "float32"]
        result = run(*args, "--batch-size", batch_size, engine=KCacheEngine())
        assert result.exit_code == 0, result.stderr
        outputs.append(lines_of(out))
    assert outputs[0] == outputs[1]
    assert [row["id"] for row in outputs[0]] == ["p3", "p9", "p1", "p5", "chat"]


def test_no_chat_template(run: Run, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "plain", chat_template=None)
    result = run("chat", str(folder), input="hi", engine=KCacheEngine())
    assert result.exit_code == 2
    assert "no chat template" in result.stderr
    assert "kcache generate" in result.stderr
    result = run("generate", str(folder), "-n", "3", input="hi", engine=KCacheEngine())
    assert result.exit_code == 0
    assert json.loads(result.stdout)["completion_tokens"] == 3


def test_unknown_model(run: Run, tmp_path: Path) -> None:
    result = run("chat", str(tmp_path / "nowhere"), input="hi", engine=KCacheEngine())
    assert result.exit_code == 1
    assert "nowhere" in result.stderr
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("long", [True, False])
def test_compiling_is_said_where_it_takes_long(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, long: bool) -> None:
    told, labels = threading.Event(), list[str]()

    def progress(done_bytes: int, total_bytes: int, label: str) -> None:
        if label.startswith("compiling"):
            labels.append(label)
            told.set()

    monkeypatch.setattr("kcache_cli.engine._SOON_S", 0.01 if long else 3600)
    monkeypatch.setattr("kcache.backends.cpu.compile_ahead", lambda *given: told.wait(20) if long else None)
    KCacheEngine().load(ModelOptions(str(tiny_folder)), progress)
    assert labels == ["compiling decode steps, once for this type of numbers"] * long


def test_plan(tiny_folder: Path) -> None:
    engine, model = KCacheEngine(), ModelOptions(model=str(tiny_folder), device="cpu")
    plan = engine.plan(model, Policy())
    assert plan.host_only
    assert plan.ctx == plan.context
    assert [engine.plan(model, Policy(), ctx=asked, need=20).ctx for asked in (64, 8)] == [20, 20]
    assert {most for _, most in engine.plan(model, Policy(), batch_size=3).batch_sizes} == {3}
    assert plan.context is not None
    beyond = 2 * plan.context
    with pytest.raises(InputError, match="--ctx"):
        engine.plan(model, Policy(), ctx=beyond)
    assert engine.plan(model, Policy(), ctx=beyond, allow_overflow=True).ctx == beyond
    with pytest.raises(DoesNotFitError, match="would fit"):
        engine.plan(model, Policy(kv_budget=10))
    with pytest.raises(ModelNotFoundError):
        engine.plan(ModelOptions(model="/nowhere", device="cpu"), Policy())


@pytest.mark.parametrize("device", ["banana", f"cuda:{torch.cuda.device_count()}"])
def test_device_that_is_not_here(tiny_folder: Path, device: str) -> None:
    with pytest.raises(InputError, match="--device"):
        KCacheEngine().plan(ModelOptions(model=str(tiny_folder), device=device), Policy())


def test_models(run: Run) -> None:
    found = {row["name"]: row for row in json.loads(run("models", "--json").stdout)}
    assert found["smollm2"]["kind"] == "demo"
    assert "smollm2" in run("models").stdout


def test_pull_of_a_folder_and_of_nothing(run: Run, tiny_folder: Path) -> None:
    result = run("pull", str(tiny_folder))
    assert result.exit_code == 0
    assert result.stdout.strip() == str(tiny_folder)
    assert run("pull", "/nowhere").exit_code == 1


@pytest.mark.demo
@pytest.mark.slow
def test_needle_in_a_long_document(run: Run, demo_lm: LoadedModel, tmp_path: Path) -> None:
    text = "\n".join(topics[name] for name in sorted(topics))[:24_500]
    file = tmp_path / "document.txt"
    file.write_text(f"{text[:9000]}\nThe secret code word for the vault is PELICAN-42.\n{text[9000:]}")
    question = "What is the secret code word for the vault? Answer with the code word only."
    args = ["chat", "-f", str(file), "--topn", "128", "--temperature", "0", "-n", "24", "--json"]
    result = run(*args, input=question, engine=LoadedEngine(demo_lm))
    assert result.exit_code == 0, result.stderr
    answer = json.loads(result.stdout)
    assert "PELICAN-42" in answer["text"]
    assert answer["prompt_tokens"] > 5500
    assert answer["host_kv_bytes"] > 0
    assert answer["link_bytes_per_token"] > 0
    assert answer["device_kv_bytes"] < 0.7 * answer["full_kv_bytes"]


@pytest.mark.demo
@pytest.mark.slow
@pytest.mark.usefixtures("demo_lm")
def test_sixty_four_prompts_killed_twice(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    names = sorted(topics)[:64]
    source.write_text(
        "".join(json.dumps({"id": name, "prompt": topics[name][: 20 + 3 * at]}) + "\n" for at, name in enumerate(names))
    )
    command = [sys.executable, "-m", "kcache_cli", "generate", "-i", str(source), "-o", str(out)]
    command += ["-n", "8", "--batch-size", "8"]
    journal = tmp_path / "out.jsonl.kcache"
    for _ in range(2):
        size = journal.stat().st_size if journal.exists() else 0
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if journal.exists() and journal.stat().st_size > size + 1000:
                break
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280)
    assert done.returncode == 0, done.stderr
    assert "continuing" in done.stderr
    assert [row["id"] for row in lines_of(out)] == names

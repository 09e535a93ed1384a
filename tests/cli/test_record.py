"""``--record`` on every command that runs a model: each step is in the file, and ``kcache inspect`` reads it."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest

from kcache.policy import Policy
from kcache.watch.recording import open_recording
from kcache_cli.engine import KCacheEngine, Plan
from kcache_cli.options import ModelOptions
from tests.bench.machines import tiny
from tests.cli.conftest import Run
from tests.cli.fakes import FakeEngine
from tests.cli.test_real import LoadedEngine

ROOT = Path(__file__).parents[2]
POLICY = ["--topn", "4", "--dense-layers", "1"]
COMMANDS = {
    "chat": ["chat", "tiny", "-n", "4", "--temperature", "0", *POLICY],
    "generate": ["generate", "tiny", "-n", "4", *POLICY],
    "bench": ["bench", "tiny", "--ctx", "64", "-r", "1", "--steps", "3", "--engine", "kcache", *POLICY],
    "eval fidelity": ["eval", "fidelity", "tiny", "--ctx", "40", "--steps", "4", "--places", "1", *POLICY],
    "eval needle": ["eval", "needle", "tiny", "--ctx", "300", "--kind", "passkey", "--depth", ".5", *POLICY],
}


class Tiny(LoadedEngine):
    """A tiny model under any name, for which everything fits."""

    def plan(self, model: ModelOptions, policy: Policy, **options: Any) -> Plan:
        return Plan(context=8192, ctx=8192, batch_sizes=((8192, 1),), host_only=True)


@pytest.fixture(scope="module")
def engine() -> KCacheEngine:
    return Tiny(tiny(max_position_embeddings=8192))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_records(run: Run, engine: KCacheEngine, tmp_path: Path, command: str) -> None:
    path = tmp_path / "run.kcr"
    result = run(*COMMANDS[command], "--record", str(path), input="one two three", engine=engine)
    assert result.exit_code == 0, result.stderr
    assert "missing" not in result.stderr
    recording = open_recording(path)
    assert recording.closed is None and recording.info.command == command
    frames = [recording.frame(index) for index in recording.span()]
    ran = max(frame.step for frame in frames)
    assert ran > 1
    for run_number in {frame.run for frame in frames}:
        steps = {frame.step for frame in frames if frame.run == run_number}
        one_by_one = set(range(1, max(steps) + 1))
        whole = {max(steps)} if command == "eval fidelity" else one_by_one  # exact attention takes a block at once
        assert steps - {0} in (one_by_one, whole)
    state = json.loads(run("inspect", str(path), "--once", "--json").stdout)
    assert state["command"] == command and len(state["layers"]) == 3


SLOW_RUN = """
import sys
import kcache
from kcache import publish
lm = kcache.load(sys.argv[1])
publish(lm, record=sys.argv[2], unix=False)
while True:
    for event in kcache.generate(lm, "a prompt", kcache.Policy(topn=4), max_new_tokens=50):
        print(event.token_id, flush=True)
"""


def test_a_process_that_is_killed_leaves_what_it_did(tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.kcr"
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW_RUN, str(tiny_folder), str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as lines:
        seen = sum(1 for _ in islice(lines, 200))
        process.kill()
    process.wait()
    recording = open_recording(path)
    assert recording.closed is not None
    assert "no end" in recording.closed or "is cut short" in recording.closed
    assert recording.latest() is not None
    assert seen == 200 and len(recording.span()) >= seen // 2


@pytest.mark.parametrize("command", COMMANDS)
def test_a_recording_that_cannot_be_is_refused_before_loading(run: Run, tmp_path: Path, command: str) -> None:
    engine = FakeEngine()
    (tmp_path / "there.kcr").write_text("mine")
    for name, said in (("no/x.kcr", "does not exist"), ("there.kcr", "exists; give another name")):
        result = run(*COMMANDS[command], "--record", str(tmp_path / name), input="one", engine=engine)
        assert result.exit_code == 2 and said in result.stderr
    assert "load" not in engine.calls
    assert (tmp_path / "there.kcr").read_text() == "mine"

"""``kcache inspect`` without its screen, and the flags of the commands it watches."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest

from kcache.watch.frame import Info
from kcache.watch.recorder import Recorder
from kcache_cli.engine import KCacheEngine
from tests.cli.conftest import Run
from tests.cli.fakes import FakeEngine
from tests.watch.steps import Steps

ROOT = Path(__file__).parents[2]
PUBLISHER = """
import sys, time
import kcache
from kcache import publish
lm = kcache.load(sys.argv[1])
policy = kcache.Policy(topn=4, spread="even", dense_layers=1, dense_below=0)
with publish(lm, command="script", port=0) as publication:
    cache = kcache.KCache(lm.model, policy)
    events = list(kcache.generate(lm, "a long enough prompt", cache=cache, max_new_tokens=8))
    print(publication.port, publication.token, flush=True)
    time.sleep(120)
"""


@pytest.fixture
def recording(tmp_path: Path) -> Path:
    steps, path = Steps(layers=3, kv_heads=2, group=2, topn=8, tokens=500), tmp_path / "run.kcr"
    recorder = Recorder(path)
    recorder.begin(asdict(Info(12, "chat", "tiny", 1.0, "CPU", True, 100)))
    for _ in range(5):
        recorder.write(steps.step(), steps.text)
    recorder.close("the run ended")
    return path


def test_nothing_running(run: Run) -> None:
    for args in (["inspect"], ["inspect", "--once"], ["inspect", "--once", "--json"]):
        result = run(*args)
        assert result.exit_code == 1
        assert result.stdout == ""
        assert "nothing that can be inspected is running" in result.stderr


def test_a_process_is_found_and_read(run: Run, tiny_folder: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", PUBLISHER, str(tiny_folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        port, token = process.stdout.readline().split()
        result = run("inspect", "--once", "--json")
        assert result.exit_code == 0, result.stderr
        state = json.loads(result.stdout)
        assert (state["pid"], state["model"], state["steps"]) == (process.pid, str(tiny_folder), 7)
        assert state["command"] == "script" and state["live"]
        layers = state["layers"]
        assert [layer["kind"] for layer in layers] == ["resident", "tiered", "tiered"]
        for name in ("device_bytes", "host_bytes", "bytes_h2d", "bytes_d2h", "rows_fetched"):
            assert state[name] == sum(layer[name] for layer in layers) > 0
        assert state["rows_fetched"] == 7 * 4 * 2 * 2
        people = run("inspect", "--once", "--pid", str(process.pid))
        assert people.exit_code == 0
        assert "device tier (RAM)" in people.stdout and f"process {process.pid}" in people.stdout
        assert "reuse" in people.stdout and "attn: share of attention" in people.stdout
        other = run("inspect", "--once", "--pid", "1")
        assert other.exit_code == 1 and "does not publish what it does, or not for you; these" in other.stderr
        assert f"inspected: {process.pid}" in other.stderr
        nobody = run("inspect", "--once", "--pid", str(2**30))
        assert nobody.exit_code == 1 and "there is no such process; these can be inspected" in nobody.stderr
        os.environ["KCACHE_WATCH_TOKEN"] = token
        connected = run("inspect", "--once", "--json", "--connect", f"127.0.0.1:{port}")
        assert json.loads(connected.stdout)["pid"] == process.pid
        os.environ["KCACHE_WATCH_TOKEN"] = "guess"
        refused = run("inspect", "--once", "--connect", port)
        assert refused.exit_code == 1 and "token is wrong" in refused.stderr
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert run("inspect", "--once").exit_code == 1
        alone = run("inspect", "--once", "--pid", str(2**30))
        assert "there is no such process; nothing else that can be inspected is running" in alone.stderr
    finally:
        os.environ.pop("KCACHE_WATCH_TOKEN", None)
        process.kill()
        process.wait()


def test_a_recording(run: Run, recording: Path) -> None:
    result = run("inspect", str(recording), "--once", "--json")
    assert result.exit_code == 0
    state = json.loads(result.stdout)
    assert (state["pid"], state["steps"], len(state["layers"]), state["live"]) == (12, 5, 3, False)
    assert state["problem"] is None
    recording.write_bytes(recording.read_bytes()[:-9])
    people = run("inspect", str(recording), "--once")
    assert people.exit_code == 0
    assert "is cut short" in people.stdout


def test_a_recording_at_a_step(run: Run, recording: Path) -> None:
    for step in (1, 3, 5):
        result = run("inspect", str(recording), "--once", "--json", "--at", str(step))
        assert (result.exit_code, json.loads(result.stdout)["steps"]) == (0, step)
    assert "step 3" in run("inspect", str(recording), "--once", "--at", "3").stdout
    beyond = run("inspect", str(recording), "--once", "--at", "99999")
    assert (beyond.exit_code, beyond.stdout) == (2, "")
    assert "--at 99999: no such step; there are steps 1 to 5" in beyond.stderr


def test_a_row_for_each_frame_and_layer(run: Run, recording: Path, tmp_path: Path) -> None:
    target = tmp_path / "run.csv"
    result = run("inspect", str(recording), "--export-csv", str(target))
    assert result.exit_code == 0
    assert "5 frames" in result.stderr
    with target.open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["steps"], row["index"]) for row in rows] == [
        (str(step), str(layer)) for step in range(1, 6) for layer in range(3)
    ]
    assert all(float(row["mean_mass"]) > 0 for row in rows)


def test_what_is_there_is_not_written_over_unasked(run: Run, recording: Path, tmp_path: Path) -> None:
    for flag in ("--export-csv", "--export-svg", "--export-png", "--report"):
        target = tmp_path / "there"
        target.write_text("mine")
        refused = run("inspect", str(recording), flag, str(target))
        assert refused.exit_code == 2 and f"{flag} {target}: exists" in refused.stderr
        assert target.read_text() == "mine"
        assert run("inspect", str(recording), flag, str(target), "--overwrite").exit_code == 0
        assert target.read_bytes() != b"mine"


ATTACK = "third\x1b[31m[red]\n<script>x</script>"


@pytest.fixture
def job(run: Run, tiny_folder: Path, tmp_path: Path) -> Path:
    """A job of three prompts in two batches, recorded."""
    path, source = tmp_path / "job.kcr", tmp_path / "in.jsonl"
    prompts = [("first", "a"), ("second", "bc"), (ATTACK, "a prompt that is a good deal longer than the others")]
    source.write_text("".join(json.dumps({"id": name, "prompt": text}) + "\n" for name, text in prompts))
    args = ["generate", str(tiny_folder), "-n", "6", "--batch-size", "2", "--temperature", "0", "--no-publish"]
    args += ["--topn", "4", "-i", str(source), "-o", str(tmp_path / "out.jsonl")]
    result = run(*args, "--record", str(path), engine=KCacheEngine())
    assert result.exit_code == 0, result.stderr
    assert "18 new tokens" in result.stderr and "job average" in result.stderr
    return path


def test_a_job_has_the_names_and_counts_of_its_prompts(run: Run, job: Path) -> None:
    found = {}
    for number in (1, 2):
        result = run("inspect", str(job), "--once", "--json", "--run", str(number))
        assert result.exit_code == 0, result.stderr
        state = json.loads(result.stdout)
        assert state["run"] == number
        for sequence in state["sequences"]:
            found[sequence["name"]] = sequence["completion_tokens"], sequence["done"]
    assert found == dict.fromkeys(("first", "second", ATTACK), (6, True))
    assert state["job"] == [3, 3]
    people = run("inspect", str(job), "--once").stdout
    assert "run 2" in people and "3 of 3 prompts" in people
    both = people + run("inspect", str(job), "--once", "--run", "1").stdout
    for name in ("first", "second", "third[31m[red] <script>x</scrip…"):
        assert f"{name} 6 done" in " ".join(both.split())
    assert "\x1b[31m" not in both


def test_a_step_of_a_run_can_be_named(run: Run, job: Path) -> None:
    for number in (1, 2):
        state = json.loads(run("inspect", str(job), "--once", "--json", "--run", str(number), "--at", "3").stdout)
        assert (state["run"], state["steps"]) == (number, 3)
    nowhere = run("inspect", str(job), "--once", "--run", "7")
    assert nowhere.exit_code == 2 and "--run 7: no such run; there are runs 1 to 2" in nowhere.stderr
    beyond = run("inspect", str(job), "--once", "--run", "1", "--at", "99")
    assert beyond.exit_code == 2 and "--at 99: no such step" in beyond.stderr


def test_the_page_of_a_job_is_of_the_job_first(run: Run, job: Path, tmp_path: Path) -> None:
    for number, wanted in ((None, "run 2"), (1, "run 1")):
        page = tmp_path / f"{number}.html"
        flags = [] if number is None else ["--run", str(number)]
        assert run("inspect", str(job), "--report", str(page), *flags).exit_code == 0
        html = page.read_text()
        assert f"what follows is of the cache of {wanted}" in html
        first = html[html.index('<div class="figures">') :][:400]
        assert "3 of 3" in first and "prompts are done" in first and ">18<" in first
        assert "second" in html and "third[31m[red]" in html and "<script>x" not in html
    nowhere = run("inspect", str(job), "--report", str(tmp_path / "x.html"), "--run", "9")
    assert nowhere.exit_code == 2 and not (tmp_path / "x.html").exists()


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--json"], "--json goes with --once"),
        (["--once", "--connect", "nowhere"], "write it as 127.0.0.1:PORT"),
        (["--once", "--connect", "127.0.0.1:1"], "KCACHE_WATCH_TOKEN"),
        (["--once", "--pid", "1", "--connect", "1"], "give one of"),
        (["no.kcr", "--once"], "cannot be read"),
        (["--export-csv", "no/where.csv"], "does not exist"),
        (["no.kcr", "--once", "--web"], "choose one"),
        (["no.kcr", "--once", "--export-csv", "x.csv"], "choose one"),
        (["no.kcr", "--web", "--report", "x.html"], "choose one"),
        (["no.kcr", "--at", "3"], "--at goes with --once"),
        (["no.kcr", "--run", "3"], "--run goes with --once"),
        (["no.kcr", "--at", "3", "--report", "x.html"], "--at goes with --once"),
    ],
)
def test_wrong_usage(run: Run, args: list[str], said: str) -> None:
    result = run("inspect", *args)
    assert result.exit_code == 2
    assert said in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_file_that_is_no_recording(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x.kcr").write_text("hello")
    result = run("inspect", str(tmp_path / "x.kcr"), "--once")
    assert result.exit_code == 2
    assert "not a recording" in result.stderr


def test_chat_records_every_step(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.kcr"
    args = ["chat", str(tiny_folder), "-n", "5", "--temperature", "0", "--record", str(path)]
    result = run(*args, input="hello", engine=KCacheEngine())
    assert result.exit_code == 0, result.stderr
    state = json.loads(run("inspect", str(path), "--once", "--json").stdout)
    assert (state["command"], state["model"], state["pid"]) == ("chat", str(tiny_folder), os.getpid())
    assert state["steps"] > 0
    again = run(*args, input="hello", engine=KCacheEngine())
    assert again.exit_code == 2
    assert "exists" in again.stderr


def test_generate_tells_its_progress(run: Run, tiny_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "run.kcr"
    args = ["generate", str(tiny_folder), "-n", "3", "--batch-size", "1", "--record", str(path), "--no-publish"]
    result = run(*args, input="one\ntwo\nthree", engine=KCacheEngine())
    assert result.exit_code == 0, result.stderr
    from kcache.watch.recording import open_recording

    recording = open_recording(path)
    jobs = [recording.frame(index).job for index in recording.span()]
    assert (2, 3) in jobs
    assert {recording.frame(index).run for index in recording.span()} == {1, 2, 3}


def test_what_commands_publish(run: Run, tmp_path: Path) -> None:
    for args, wanted in (
        ([], {"command": "chat", "record": None, "unix": True, "port": None}),
        (["--publish-port", "0"], {"command": "chat", "record": None, "unix": True, "port": 0}),
        (["--no-publish", "--record", str(tmp_path / "x.kcr")], {"unix": False, "record": tmp_path / "x.kcr"}),
    ):
        engine = FakeEngine()
        assert run("chat", *args, input="hi", engine=engine).exit_code == 0
        (published,) = engine.published
        assert wanted.items() <= published.items()
    engine = FakeEngine()
    assert run("chat", "--no-publish", input="hi", engine=engine).exit_code == 0
    assert engine.published == []


@pytest.mark.parametrize("command", ["chat", "generate", "bench", "eval needle", "eval fidelity"])
def test_publishing_or_not(run: Run, command: str) -> None:
    engine = FakeEngine()
    result = run(*command.split(), "--no-publish", "--publish-port", "0", input="hi", engine=engine)
    assert result.exit_code == 2
    assert "--no-publish and --publish-port 0 contradict each other" in result.stderr
    assert "load" not in engine.calls


def test_a_record_that_cannot_be_is_refused_before_loading(run: Run, tmp_path: Path) -> None:
    for command in ("chat", "generate"):
        engine = FakeEngine()
        result = run(command, "--record", str(tmp_path / "no" / "x.kcr"), input="hi", engine=engine)
        assert result.exit_code == 2
        assert "load" not in engine.calls


def test_a_run_goes_on_where_nothing_can_be_published(
    run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / ("x" * 100)))
    args = ["chat", str(tiny_folder), "-n", "2"]
    result = run(*args, input="hi", engine=KCacheEngine())
    assert result.exit_code == 0
    assert "will not find this run" in result.stderr
    assert run(*args, "--publish-port", "0", input="hi", engine=KCacheEngine()).exit_code == 1


def test_inspect_leaves_torch_unimported(recording: Path) -> None:
    code = (
        "import sys\n"
        f"sys.argv = ['kcache', 'inspect', {str(recording)!r}, '--once']\n"
        "from kcache_cli.app import main\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "assert not {'torch', 'transformers', 'textual'} & set(sys.modules)\n"
    )
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - began < 60

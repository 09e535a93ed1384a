"""``kcache bench``: flags to spec, rows to formats and files, resuming, comparing, being stopped."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from kcache.models.progress import Progress
from kcache_cli.bench.cards import cards
from kcache_cli.bench.same import COMMAND, NAMES, compare_with
from kcache_cli.bench.table import markdown
from kcache_cli.commands.bench import _layout
from kcache_cli.engine import KCacheEngine
from kcache_cli.options import ModelOptions, number_list
from kcache_cli.rows.formats import FORMATS, render, table
from kcache_cli.rows.store import read_rows
from tests.cli.conftest import Run

if TYPE_CHECKING:
    from kcache.bench.cases import Case
    from kcache.bench.rows import Row
    from kcache.bench.spec import Spec

KEYS = {
    "engine", "model", "ctx", "batch", "topn", "decode_ms_p50", "decode_ms_p99", "decode_tok_s", "prefill_tok_s",
    "ttft_ms", "device_kv_bytes", "host_kv_bytes", "link_bytes_per_token", "hit_rate", "floor_multiple", "ratio", "env",
}  # fmt: skip


@pytest.fixture(autouse=True)
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """There is none here that could be asked how K of it is kept."""
    monkeypatch.setattr("kcache.bench.report.settled", lambda policy, model: policy)


@dataclass
class FakeBench:
    """An engine whose figures are made up: a step takes ``ctx / 1000`` ms per engine's place in the case."""

    stop_after: int | None = None
    speed: float = 1.0
    model: Any = None
    context_length: int | None = 8192
    problems: dict[int, Any] = field(default_factory=dict)
    specs: list[Any] = field(default_factory=list)
    ran: list[tuple[int, int]] = field(default_factory=list)

    def load(self, model: ModelOptions, progress: Progress) -> Any:
        import torch

        device = torch.device("cpu")
        self.model = model
        inner = SimpleNamespace(dtype=torch.bfloat16, device=device)
        return SimpleNamespace(name=model.name, model=inner, device=device, context_length=self.context_length)

    def publish(self, lm: Any, **options: Any) -> None:
        """There is nothing to watch."""

    def bench(self, lm: Any, spec: Spec, cases: Sequence[Case], watch: Any) -> Iterator[list[Row]]:
        from dataclasses import replace

        from kcache.bench.report import blank_row

        self.specs.append(spec)
        env = {"torch": "0", "run": "host-only", "device": "Test | CPU", "threads": 1}
        for case in cases:
            if self.stop_after is not None and len(self.ran) >= self.stop_after:
                raise KeyboardInterrupt
            self.ran.append((case.ctx, case.batch))
            rows = []
            for place, engine in enumerate(case.engines, start=1):
                watch(f"{case.label} · {engine.label}", 1)
                row = blank_row(lm, spec, case, engine, env)
                ms = case.ctx / 1000 * place / self.speed
                figures = {"decode_ms_p50": ms, "decode_ms_low": ms, "decode_ms_high": ms, "decode_ms_p99": ms}
                rows.append(replace(row, **figures, decode_tok_s=1e3 * case.batch / ms))
            if any(engine.name == "hf-offloaded" for engine in case.engines):
                rows[-1] = replace(blank_row(lm, spec, case, case.engines[-1], env), status="failed", reason="a|b\nc")
            status = self.problems.get(case.ctx)
            if status is not None:
                rows = [
                    replace(blank_row(lm, spec, case, engine, env), status=status, reason="why")
                    for engine in case.engines
                ]
            yield rows


def rows_in(path: Path) -> list[dict[str, Any]]:
    return read_rows(path, "--output", COMMAND, NAMES)


# -- flags ---------------------------------------------------------------------------------------------------------


def test_defaults(run: Run) -> None:
    engine = FakeBench()
    result = run("bench", engine=engine)
    assert result.exit_code == 0, result.stderr
    (spec,) = engine.specs
    assert (spec.ctxs, spec.batches, spec.topns, spec.repeats) == ((2048, 8192), (1,), (128,), 5)
    assert spec.engines == ("kcache", "dense", "hf-static", "hf-dynamic")
    assert spec.policy.offload == "all"
    assert engine.model.name == "smollm2"
    assert result.stdout.startswith("| engine")
    assert "timing context 2,048 · batch 1" in result.stderr


def test_every_flag_reaches_the_run(run: Run) -> None:
    engine = FakeBench()
    flags = "bench some/model --ctx 8k,32K,100 --topn 64,128 --batch 1,8 --engine kcache,hf-static -r 2 --steps 3"
    more = "--real-prefill --fidelity --check-plan --policy paper --dense-layers 1 --offload auto"
    result = run(*flags.split(), *more.split(), engine=engine)
    assert result.exit_code == 0, result.stderr
    (spec,) = engine.specs
    assert spec.ctxs == (8192, 32768, 100)
    assert (spec.topns, spec.batches, spec.repeats, spec.steps) == ((64, 128), (1, 8), 2, 3)
    assert spec.engines == ("kcache", "hf-static")
    assert spec.real_prefill and spec.fidelity and spec.check_plan
    assert (spec.policy.select, spec.policy.dense_layers, spec.policy.offload) == ("head", 1, "auto")
    assert engine.ran[:2] == [(100, 1), (100, 8)]


def test_a_policy_file_may_ask_for_less_than_all(run: Run, tmp_path: Path) -> None:
    profile = tmp_path / "p.toml"
    profile.write_text('offload = "none"\ntopn = 32\n')
    engine = FakeBench()
    run("bench", "--policy", str(profile), engine=engine)
    assert (engine.specs[0].policy.offload, engine.specs[0].topns) == ("none", (32,))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--ctx 8k,many", "'many' is not a number to use; write 8192, 8k"),
        ("--ctx 0", "not a number to use"),
        ("--topn 64,,8", "--topn 64,,8: '' is not"),
        ("--batch 1k", "'1k' is not"),
        ("--engine kcache,vllm", "no engine 'vllm'; the engines are kcache, dense, hf-dynamic"),
        ("--engine=", "no engine ''; the engines are kcache, dense, hf-dynamic"),
        ("--resume", "--resume reads what --output holds"),
        ("--resume --output x.md", "--resume reads what --output holds"),
        ("--plot x.gif", "must end in .png, .svg, .pdf"),
        ("--output nowhere/x.md", "the folder nowhere does not exist"),
        ("--output .", "is a folder"),
        ("--output x.foo", "--output x.foo: the name must end in .md, .csv, .json, .jsonl or .txt"),
        ("-o json --output x.csv", "--output x.csv and -o json name two formats"),
        ("--compare missing.jsonl", "--compare missing.jsonl: cannot be read"),
        ("--offload some", "'some' is not one of"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_loaded(run: Run, flags: str, said: str) -> None:
    engine = FakeBench()
    result = run("bench", *flags.split(), engine=engine)
    assert result.exit_code == 2
    assert said in result.stderr
    assert engine.model is None and result.stdout == ""


def test_number_lists() -> None:
    assert number_list("8k, 1m,7", "--ctx", (), tokens=True) == (8192, 2**20, 7)
    assert number_list(None, "--ctx", (3,)) == (3,)


# -- formats -------------------------------------------------------------------------------------------------------


def test_json_is_one_list_with_every_key(run: Run) -> None:
    result = run("bench", "-o", "json", "--ctx", "32k", engine=FakeBench())
    rows = json.loads(result.stdout)
    assert len(rows) == 4
    assert set(rows[0]) >= KEYS
    assert rows[0]["ctx"] == 32768 and rows[0]["speed_only"] is True
    assert rows[0]["env"]["torch"] == "0"


def test_jsonl_and_csv(run: Run) -> None:
    lines = run("bench", "-o", "jsonl", engine=FakeBench()).stdout.splitlines()
    assert [json.loads(line)["ctx"] for line in lines] == [2048] * 4 + [8192] * 4
    table = list(csv.DictReader(io.StringIO(run("bench", "-o", "csv", engine=FakeBench()).stdout)))
    assert len(table) == 8 and set(table[0]) >= KEYS
    assert table[0]["ttft_ms"] == "" and json.loads(table[0]["env"])["run"] == "host-only"


def test_markdown_shows_what_was_measured_and_why_not(run: Run) -> None:
    text = run("bench", "--ctx", "16k", "--engine", "kcache,hf-static,hf-offloaded", engine=FakeBench()).stdout
    head, rule, *body = [line for line in text.splitlines() if line.startswith("|")]
    assert "TTFT" not in head and "ms/step p50" in head
    assert len({line.count("|") for line in (head, rule, *body)}) == 1
    assert "16,384" in body[0] and "speed only" in body[0] and "16.4 [16.4–16.4]" in body[0]
    assert "failed: a/b c" in body[2]
    assert "both tiers are RAM" in text


@pytest.mark.parametrize("width", [40, 60, 80, 100])
def test_cards_fit_the_terminal_and_lose_nothing(run: Run, width: int) -> None:
    flags = ["--ctx", "2k,16k", "--topn", "64,128", "--engine", "kcache,dense,hf-static,hf-dynamic,hf-offloaded"]
    rows = json.loads(run("bench", *flags, "-o", "json", engine=FakeBench()).stdout)
    text = cards(rows, width)
    assert max(map(len, text.splitlines())) <= width
    cases = text.split("context ")[1:3]
    for case, ms in zip(cases, (2.048, 16.384), strict=True):
        for place, name in enumerate(("kcache N=64", "kcache N=128", "dense", "hf-static", "hf-dynamic"), start=1):
            assert name in case and f" {ms * place:.1f}" in case
        assert "TTFT" not in case
        assert "hf-offloaded: failed: a/b c" in case
    assert "both tiers are RAM" in " ".join(text.split())


def test_what_is_true_of_all_engines_is_said_once(run: Run) -> None:
    rows = json.loads(run("bench", "--ctx", "16k", "-o", "json", engine=FakeBench()).stdout)
    assert cards(rows, 80).count("speed only") == 1
    assert cards([], 80) == ""


def test_cards_are_for_terminals_that_ask_for_no_format(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout", SimpleNamespace(isatty=lambda: True))
    assert _layout("md", None) is markdown
    assert _layout(None, Path("rows.md")) is markdown
    assert _layout(None, None) is not markdown


@pytest.mark.parametrize("form", FORMATS)
def test_no_rows(form: str) -> None:
    assert render([], form, markdown) in ("", "[]\n")


def test_the_name_of_the_file_tells_the_format(run: Run, tmp_path: Path) -> None:
    for name, start in (("r.json", "["), ("r.jsonl", "{"), ("r.csv", "engine,"), ("r.md", "|"), ("r.txt", "|")):
        path = tmp_path / name
        result = run("bench", "--output", str(path), engine=FakeBench())
        assert result.stdout == "" and "8 rows in" in result.stderr
        assert path.read_text().startswith(start)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r.csv", "r.json", "r.jsonl", "r.md", "r.txt"]


@pytest.mark.parametrize(
    ("problems", "code"),
    [
        ({1024: "does not fit"}, 0),
        ({1024: "does not fit", 2048: "does not fit"}, 3),
        ({1024: "failed", 2048: "does not fit"}, 3),
        ({1024: "too long", 2048: "too long"}, 2),
        ({1024: "failed", 2048: "failed"}, 1),
        ({1024: "unavailable", 2048: "unavailable"}, 1),
    ],
)
def test_the_exit_code_says_that_nothing_was_measured(run: Run, problems: dict[int, str], code: int) -> None:
    result = run("bench", "--ctx", "1k,2k", engine=FakeBench(problems=problems))
    assert result.exit_code == code
    assert result.stdout.startswith("| engine")
    assert ("nothing could be measured: kcache at a context of" in result.stderr) == (code > 0)
    assert code != 3 or ": does not fit: why" in result.stderr


# -- stopping, going on, comparing ---------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_stopped_rows_of_finished_cases_are_there(run: Run, tmp_path: Path, form: str) -> None:
    path = tmp_path / f"rows.{form}"
    for extra in ([], ["--output", str(path)]):
        result = run("bench", "-o", form, *extra, engine=FakeBench(stop_after=1))
        assert result.exit_code == 130
        assert "stopped" in result.stderr
        text = path.read_text() if extra else result.stdout
        assert text.count("hf-dynamic") == 1
        if form == "json":
            assert len(json.loads(text)) == 4


def test_stopped_at_once_leaves_an_old_file_alone(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    run("bench", "--ctx", "1k", "--output", str(path), engine=FakeBench())
    before = path.read_text()
    assert run("bench", "--output", str(path), engine=FakeBench(stop_after=0)).exit_code == 130
    assert path.read_text() == before
    fresh = tmp_path / "fresh.jsonl"
    result = run("bench", "--output", str(fresh), engine=FakeBench(stop_after=0))
    assert not fresh.exists() and "stopped before a case was finished" in result.stderr


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_resume_measures_the_rest(run: Run, tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    flags = ["bench", "--ctx", "1k,2k,4k", "--output", str(path), "--resume"]
    run(*flags, engine=FakeBench(stop_after=1))
    assert len(rows_in(path)) == 4
    engine = FakeBench()
    result = run(*flags, engine=engine)
    assert result.exit_code == 0, result.stderr
    assert engine.ran == [(2048, 1), (4096, 1)]
    assert [row["ctx"] for row in rows_in(path)] == [1024] * 4 + [2048] * 4 + [4096] * 4
    done = FakeBench()
    assert run(*flags, engine=done).exit_code == 0
    assert done.ran == [] and len(rows_in(path)) == 12


def test_resume_runs_again_what_is_torn_incomplete_failed_or_otherwise_measured(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    flags = ["bench", "--ctx", "1k,2k", "--output", str(path), "--resume"]
    run(*flags, engine=FakeBench())
    path.write_text(path.read_text()[:-20])
    torn = FakeBench()
    run(*flags, engine=torn)
    assert torn.ran == [(2048, 1)] and len(rows_in(path)) == 8
    other = FakeBench()
    run(*flags, "-r", "3", engine=other)
    assert other.ran == [(1024, 1), (2048, 1)] and len(rows_in(path)) == 8
    more = FakeBench()
    run(*flags, "-r", "3", "--topn", "64", engine=more)
    assert len(more.ran) == 2
    assert {row["topn"] for row in rows_in(path)} == {64, 128, None}
    failing = ["bench", "--engine", "kcache,hf-offloaded", "--ctx", "1k", "--output", str(tmp_path / "f.jsonl")]
    run(*failing, engine=FakeBench())
    again = FakeBench()
    run(*failing, "--resume", engine=again)
    assert again.ran == [(1024, 1)] and len(rows_in(tmp_path / "f.jsonl")) == 2


def test_resume_refuses_a_file_of_something_else(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n')
    result = run("bench", "--output", str(path), "--resume", engine=FakeBench())
    assert result.exit_code == 2 and "does not hold rows of kcache bench" in result.stderr
    assert path.read_text() == '{"id": 1}\n'


def test_compare_says_how_much_faster_it_is_now(run: Run, tmp_path: Path) -> None:
    old = tmp_path / "old.jsonl"
    run("bench", "--ctx", "2k", "--output", str(old), engine=FakeBench())
    result = run("bench", "-o", "json", "--compare", str(old), engine=FakeBench(speed=2.0))
    ratios = [row["compare_ratio"] for row in json.loads(result.stdout)]
    assert ratios == [2.0] * 4 + [None] * 4
    assert "vs then" in run("bench", "--compare", str(old), engine=FakeBench()).stdout


def test_compare_takes_rows_without_figures() -> None:
    row = {"engine": "dense", "ctx": 1, "batch": 1, "decode_ms_p50": None}
    assert compare_with([row], [row])[0]["compare_ratio"] is None


def test_plot(run: Run, tmp_path: Path) -> None:
    for name, start in (("a.png", b"\x89PNG"), ("b.svg", b"<?xml")):
        path = tmp_path / name
        result = run("bench", "--plot", str(path), "--topn", "64,128", engine=FakeBench())
        assert result.exit_code == 0, result.stderr
        assert path.read_bytes().startswith(start)
    svg = (tmp_path / "b.svg").read_text()
    assert "kcache N=64" in svg and "hf-static" in svg and "tokens per second" in svg
    one = tmp_path / "one.svg"
    run("bench", "--ctx", "2k", "--batch", "1,8", "--plot", str(one), engine=FakeBench())
    assert "dense, batch 8" in one.read_text()


def test_a_narrow_column_is_markdown_still() -> None:
    columns = [("policy", lambda row: "default"), ("N", lambda row: str(row["topn"]))]
    rule = table([{"topn": 8}], columns, []).splitlines()[1]
    assert rule == "| ------- | -: |", "a colon alone makes no table"


# -- the real engine -----------------------------------------------------------------------------------------------


def test_the_whole_command_on_a_tiny_model(run: Run, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.bench.machines import machine

    monkeypatch.setattr("kcache.speed.machine.measure", lambda device, quick: machine())
    flags = "--ctx 64 --topn 8 --batch 1,2 -r 2 --steps 2 -o json --engine kcache,dense,hf-dynamic,hf-static"
    result = run("bench", str(tiny_folder), *flags.split(), engine=KCacheEngine())
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    assert len(rows) == 8
    assert all(row["status"] == "ok" and row["decode_ms_p50"] > 0 for row in rows)
    assert all(row["env"]["device"] == "Test CPU" and "driver" not in row["env"] for row in rows)
    assert all(row["ratio_to"] == "hf-dynamic" for row in rows)


def test_an_unknown_model_is_an_error_not_a_row(run: Run, tmp_path: Path) -> None:
    result = run("bench", str(tmp_path / "nothing"), engine=KCacheEngine())
    assert result.exit_code == 1 and result.stdout == ""

"""``kcache eval fidelity``: flags to spec, rows to formats, files and charts, stopping and going on."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from kcache_cli.engine import KCacheEngine
from tests.cli.conftest import Run

if TYPE_CHECKING:
    from kcache.evaluate.fidelity import Case
    from kcache.evaluate.figures import Figures
    from kcache.evaluate.places import Place
    from kcache.evaluate.sweep import Known, Spec

KEYS = {
    "topn", "ppl_full", "ppl_kcache", "kl_mean", "kl_p99", "kl_se", "top1", "mass", "rows_per_kv_head",
    "bytes_h2d_per_token", "policy", "ctx", "steps", "places", "model", "text", "per_layer_error", "device_overhead",
    "env",
}  # fmt: skip
SMALL = ["--ctx", "40", "--steps", "6", "--places", "2", "--topn", "2,8"]


class Engine(KCacheEngine):
    """The real one, stopped with Ctrl-C before measurement number ``stop_before``."""

    def __init__(self, stop_before: int | None = None) -> None:
        super().__init__()
        self.stop_before = stop_before
        self.specs: list[Spec] = []
        self.dtypes: list[str | None] = []
        self.measured: list[tuple[str, int, int]] = []

    def load(self, model: Any, progress: Any) -> Any:
        self.dtypes.append(model.dtype)
        return super().load(model, progress)

    def fidelity(
        self, lm: Any, spec: Spec, places: Sequence[Place], known: Known, watch: Callable[[str], None]
    ) -> Iterator[tuple[Case, Figures]]:
        self.specs.append(spec)
        for case, figures in super().fidelity(lm, spec, places, known, watch):
            if len(self.measured) == self.stop_before:
                raise KeyboardInterrupt
            self.measured.append((case.name, case.policy.topn, figures.start))
            yield case, figures


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path) -> list[str]:
    """The command on a tiny model, a text and a policy that offloads from the start."""
    text, policy = tmp_path / "text.txt", tmp_path / "low.toml"
    text.write_text(" ".join(f"{number} is more than {number - 1}." for number in range(60)))
    policy.write_text('spread = "even"\ndense_below = 0\ndense_layers = 1\ntail_rank = 3\n')
    return ["eval", "fidelity", str(tiny_folder), "--text", str(text), "--policy", str(policy)]


def rows_in(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_json_is_a_list_with_every_key(run: Run, base: list[str]) -> None:
    engine = Engine()
    result = run(*base, *SMALL, "-o", "json", engine=engine)
    assert result.exit_code == 0, result.stderr
    few, many = json.loads(result.stdout)
    assert set(few) >= KEYS
    assert (few["topn"], many["topn"]) == (2, 8) == (few["rows_per_kv_head"], many["rows_per_kv_head"])
    assert few["kl_mean"] > many["kl_mean"] > 0 and few["kl_se"] > 0
    assert few["bytes_h2d_per_token"] == 2 * 2 * 2 * 8 * 4
    assert few["policy"]["topn"] == 2 and few["policy"]["offload"] == "all"
    assert (few["ctx"], few["steps"], few["places"], few["dtype"]) == (40, 6, 2, "float32")
    assert len(few["per_layer_error"]) == 3 and few["per_layer_error"][0] == 0
    assert few["env"]["run"] == "host-only" and few["text"] == "text.txt"
    assert "measuring place 1/2 · prefill" in result.stderr and "· low N=8" in result.stderr


def test_policies_and_flags_make_the_sweep(run: Run, base: list[str]) -> None:
    engine = Engine(stop_before=0)
    flags = [
        "--policy",
        "paper",
        "--policy",
        "default",
        "--dense-layers",
        "1",
        "--ctx",
        "64",
        "--steps",
        "6",
        "--places",
        "1",
    ]
    result = run(*base, *flags, "--dtype", "bfloat16", engine=engine)
    assert result.exit_code == 130
    (spec,) = engine.specs
    assert [case.name for case in spec.cases] == ["low", "paper", "default"]
    assert [case.policy.topn for case in spec.cases] == [128, 128, 128]
    assert [case.policy.select for case in spec.cases] == ["group", "head", "group"]
    assert all(case.policy.dense_layers == 1 and case.policy.offload == "all" for case in spec.cases)
    assert (spec.ctx, spec.steps, spec.places) == (64, 6, 1)
    assert engine.dtypes == ["bfloat16"]


def test_contexts_that_are_attended_exactly_are_warned_about(run: Run, base: list[str]) -> None:
    small = [*SMALL, "--topn", "2", "--places", "1", "--policy", "default", "--dense-layers", "1", "-o", "json"]
    for flags, exact in (([], True), (["--dense-below", "47"], True), (["--dense-below", "0"], False)):
        result = run(*base, *small, *flags, engine=Engine())
        low, default = json.loads(result.stdout)
        assert (default["rows_per_kv_head"] == 0) == exact
        assert (low["rows_per_kv_head"] == 0) == (exact and bool(flags))
        warned = [line for line in result.stderr.splitlines() if "warning" in line]
        assert len(warned) == exact
        if exact:
            assert "are attended exactly" in warned[0] and "use --dense-below 0" in warned[0]
            assert f"under --policy {'low, ' if flags else ''}default:" in warned[0]


def test_float32_whatever_the_settings_say(run: Run, base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCACHE_DTYPE", "bfloat16")
    monkeypatch.setenv("KCACHE_TOPN", "16")
    engine = Engine(stop_before=0)
    run(*base[:-2], *["--ctx", "40", "--steps", "6", "--places", "1"], engine=engine)
    assert engine.dtypes == ["float32"]
    assert [(case.name, case.policy.topn) for case in engine.specs[0].cases] == [("default", 16)]


def test_without_a_text_it_is_the_reference(run: Run, base: list[str]) -> None:
    result = run(*base[:3], *base[5:], *SMALL, "-o", "jsonl", engine=Engine())
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[0])["text"] == "the Python reference"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--places 9", "text.txt has 1,179 tokens, and 9 places of 297 tokens need 2,673; give a longer text"),
        ("--ctx 2040 --steps 9", "is 2048 tokens, and 9 steps come on top; ask for less"),
        ("--text nothing.txt", "--text nothing.txt: cannot be read"),
        ("--policy nothing.toml", "neither default, paper, smollm2, nor a file that exists"),
        ("--ctx many", "not a number of tokens"),
        ("--steps 0", "--steps"),
        ("--topn 64,x", "'x' is not a number to use"),
        ("--plot x.gif", "must end in .png, .svg, .pdf"),
        ("--output nowhere/x.md", "the folder nowhere does not exist"),
        ("--output x.foo", "the name must end in .md, .csv, .json, .jsonl"),
        ("--resume", "--resume reads what --output holds"),
    ],
)
def test_wrong_usage_is_one_line(run: Run, base: list[str], flags: str, said: str) -> None:
    ctx = [] if "--ctx" in flags else ["--ctx", "40"]
    result = run(*base, *ctx, *flags.split(), engine=Engine())
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == "" and "Traceback" not in result.stderr


def test_formats(run: Run, base: list[str], tmp_path: Path) -> None:
    table = list(csv.DictReader(io.StringIO(run(*base, *SMALL, "-o", "csv", engine=Engine()).stdout)))
    assert [row["topn"] for row in table] == ["2", "8"] and set(table[0]) >= KEYS
    assert len(json.loads(table[0]["by_place"])) == 2
    text = run(*base, *SMALL, engine=Engine()).stdout
    head, rule, *body = [line for line in text.splitlines() if line.startswith("|")]
    assert "KL p99" in head and "± s.e." in head and "worst layers" in head and len(body) == 2
    assert len({line.count("|") for line in (head, rule, *body)}) == 1
    assert "6 teacher-forced steps after 40 tokens at each place of text.txt" in text
    one = run(*base, *SMALL, "--places", "1", engine=Engine()).stdout
    assert "± s.e." not in one
    dense = run(*base, *SMALL, "--dense-layers", "3", engine=Engine()).stdout
    assert dense.count("exact") >= 2 and "link/token" not in dense
    path = tmp_path / "rows.jsonl"
    result = run(*base, *SMALL, "--output", str(path), engine=Engine())
    assert result.stdout == "" and "2 rows in" in result.stderr and len(rows_in(path)) == 2


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_stopped_run_goes_on(run: Run, base: list[str], tmp_path: Path, name: str) -> None:
    whole, part = tmp_path / f"whole.{name}", tmp_path / name
    run(*base, *SMALL, "--output", str(whole), engine=Engine())
    flags = [*base, *SMALL, "--output", str(part), "--resume"]
    stopped = run(*flags, engine=Engine(stop_before=3))
    assert stopped.exit_code == 130 and "stopped" in stopped.stderr
    there = json.loads(part.read_text()) if name.endswith("json") else rows_in(part)
    assert [(row["topn"], row["places"], len(row["starts"])) for row in there] == [(2, 2, 2), (8, 1, 2)]
    rest = Engine()
    result = run(*flags, engine=rest)
    assert result.exit_code == 0 and "3 of 4 measurements were there already" in result.stderr
    assert [topn for _, topn, _ in rest.measured] == [8]
    assert _figures(part) == _figures(whole)
    done = Engine()
    run(*flags, engine=done)
    assert done.measured == [] and _figures(part) == _figures(whole)


def _figures(path: Path) -> list[dict[str, Any]]:
    """Rows without where and when; the last digits of a sum may depend on what ran before it."""
    rows = json.loads(path.read_text()) if path.suffix == ".json" else rows_in(path)
    return [{name: row[name] for name in row if name not in ("env", "per_layer_error", "by_place")} for row in rows]


def test_resume_adds_cases_and_places_and_keeps_the_rest(run: Run, base: list[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    flags = [*base, "--ctx", "40", "--steps", "6", "--output", str(path), "--resume"]
    run(*flags, "--topn", "2", "--places", "2", engine=Engine())
    more = Engine()
    run(*flags, "--topn", "2,8", "--places", "3", engine=more)
    middle = sorted({start for _, _, start in more.measured})[1]
    assert [start for _, topn, start in more.measured if topn == 2] == [middle]
    assert [(row["topn"], row["places"]) for row in rows_in(path)] == [(2, 2), (2, 3), (8, 3)]
    other = Engine()
    run(*flags, "--topn", "2", "--places", "2", "--dense-layers", "2", engine=other)
    assert len(other.measured) == 2 and len(rows_in(path)) == 4


def test_resume_refuses_a_file_of_something_else(run: Run, base: list[str], tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"id": 1}\n')
    result = run(*base, *SMALL, "--output", str(path), "--resume", engine=Engine())
    assert result.exit_code == 2 and "does not hold rows of kcache eval fidelity" in result.stderr
    assert path.read_text() == '{"id": 1}\n'


def test_stopped_before_the_first_measurement_an_old_file_is_left_alone(
    run: Run, base: list[str], tmp_path: Path
) -> None:
    path = tmp_path / "rows.jsonl"
    run(*base, *SMALL, "--output", str(path), engine=Engine())
    before = path.read_text()
    assert run(*base, *SMALL, "--output", str(path), engine=Engine(stop_before=0)).exit_code == 130
    assert path.read_text() == before


def test_what_is_whole_is_printed_when_stopped(run: Run, base: list[str]) -> None:
    result = run(*base, *SMALL, "-o", "jsonl", engine=Engine(stop_before=3))
    assert result.exit_code == 130
    assert [json.loads(line)["places"] for line in result.stdout.splitlines()] == [2, 1]


def test_plot(run: Run, base: list[str], tmp_path: Path) -> None:
    for name, start in (("kl.png", b"\x89PNG"), ("kl.svg", b"<?xml")):
        path = tmp_path / name
        result = run(*base, "--policy", "paper", *SMALL, "--plot", str(path), engine=Engine())
        assert result.exit_code == 0, result.stderr
        assert path.read_bytes().startswith(start)
    svg = (tmp_path / "kl.svg").read_text()
    assert "paper" in svg and "low" in svg and "KL from full attention" in svg
    assert sorted(path.suffix for path in tmp_path.iterdir() if path.is_file()) == [".png", ".svg", ".toml", ".txt"]

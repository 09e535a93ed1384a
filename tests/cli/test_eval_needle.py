"""``kcache eval needle``: flags to cases, rows to tables and heat maps, resuming."""

from __future__ import annotations

import csv
import io
import json
from pathlib import Path
from typing import Any

import pytest

from kcache_cli.engine import KCacheEngine
from kcache_cli.evaluate.needle_table import draw, markdown
from tests.bench.machines import tiny
from tests.cli.conftest import Run
from tests.cli.test_real import LoadedEngine


class Unloaded(KCacheEngine):
    """Plans and does not load."""

    def load(self, model: Any, progress: Any) -> Any:
        raise AssertionError("loaded")


SMALL = ["eval", "needle", "--ctx", "300", "--depth", "0,1", "--topn", "4,8", "--dense-layers", "1"]


@pytest.fixture(scope="module")
def engine() -> LoadedEngine:
    return LoadedEngine(tiny())


@pytest.fixture
def story(tmp_path: Path) -> str:
    path = tmp_path / "story.txt"
    path.write_text("".join(f"Sentence {number} tells of a quiet morning.\n" for number in range(80)))
    return str(path)


def test_a_table_of_depth_and_length(run: Run, engine: LoadedEngine, story: str) -> None:
    result = run(*SMALL, "--text", story, "--kind", "passkey", engine=engine)
    assert result.exit_code == 0, result.stderr
    head, _, *lines = result.stdout.splitlines()
    assert [cell.strip() for cell in head.strip("| ").split("|")] == [
        "task",
        "depth",
        "dense 300",
        "N=4 300",
        "N=8 300",
    ]
    assert [line.split("|")[2].strip() for line in lines[:2]] == ["0", "1"]
    assert "haystack: story.txt" in result.stdout
    assert "N=8: right in 0 of the 0 cases that full attention gets right" in result.stdout
    assert "asking 1 of 2 · passkey · 300 tokens · depth 0\n" in result.stderr
    assert "kcache: 2 of 2 · passkey · 300 tokens · depth 1: dense 0.00, N=4 0.00, N=8 0.00\n" in result.stderr
    assert "warning" not in result.stderr


@pytest.mark.parametrize("form", ["json", "jsonl", "csv"])
def test_rows_in_other_formats(run: Run, engine: LoadedEngine, story: str, form: str) -> None:
    result = run(
        *SMALL, "--text", story, "--kind", "multikey,variable-tracking", "--depth", ".5", "-o", form, engine=engine
    )
    assert result.exit_code == 0, result.stderr
    rows: list[Any]
    if form == "csv":
        rows = list(csv.DictReader(io.StringIO(result.stdout)))
    else:
        rows = (
            json.loads(result.stdout) if form == "json" else [json.loads(line) for line in result.stdout.splitlines()]
        )
    assert [row["kind"] for row in rows] == ["multikey"] * 3 + ["variable-tracking"] * 3
    assert {str(row["topn"]) for row in rows} == {"4", "8", "" if form == "csv" else "None"}
    if form != "csv":
        assert rows[1]["policy"]["offload"] == "all" and rows[1]["policy"]["dense_below"] == 0
        assert rows[0]["env"]["run"] == "host-only" and rows[1]["rows_fetched"] > 0


def test_resuming_runs_only_what_is_missing(
    run: Run, engine: LoadedEngine, story: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, chart = tmp_path / "rows.jsonl", tmp_path / "map.png"
    args = [*SMALL, "--text", story, "--kind", "passkey", "--output", str(output), "--plot", str(chart)]
    first = run(*args, engine=engine)
    assert first.exit_code == 0, first.stderr
    assert first.stdout.startswith("| task") and f"6 rows in {output}" in first.stderr
    assert chart.read_bytes().startswith(b"\x89PNG")
    whole = output.read_text()
    kept, half = whole.splitlines(keepends=True)[:3], whole.splitlines(keepends=True)[3]
    output.write_text("".join(kept) + half[:40])  # killed in the middle of a line
    again = run(*args, "--resume", engine=engine)
    assert again.exit_code == 0, again.stderr
    assert "1 case was there already" in again.stderr
    assert "depth 0\n" not in again.stderr and "depth 1\n" in again.stderr
    assert output.read_text().splitlines(keepends=True)[:3] == kept
    assert [_but_time(row) for row in _rows(output)] == [_but_time(json.loads(line)) for line in whole.splitlines()]
    other = run(*args, "--resume", "--seed", "7", engine=engine)
    assert other.exit_code == 0 and "already" not in other.stderr
    assert len(_rows(output)) == 12, "rows of another run are kept"
    monkeypatch.setattr("kcache.evaluate.retrieval.Prefix", None)
    assert run(*args, "--resume", engine=engine).exit_code == 0


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def _but_time(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("seconds", "env")}


def test_a_run_without_topn_is_warned_about(run: Run, engine: LoadedEngine, story: str) -> None:
    flags = [*SMALL, "--text", story, "--kind", "passkey"]
    for more in (["--dense-below", "2k"], ["--offload", "none"]):
        result = run(*flags, *(["--dense-below", "2048"] if more[1] == "2k" else more), engine=engine)
        assert result.exit_code == 0, result.stderr
        assert "no step used TopN in 4 of 4 rows" in result.stderr


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--kind passkeys", "no retrieval task 'passkeys'"),
        ("--depth 0,deep", "--depth 0,deep: not numbers"),
        ("--depth 2", "a depth is between 0"),
        ("--ctx many", "--ctx many"),
        ("--topn 64,", "--topn"),
        ("--text nowhere.txt", "--text nowhere.txt: cannot be read"),
        ("--resume", "--resume reads what --output holds"),
        ("--plot x.gif", "must end in .png, .svg, .pdf"),
        ("--output nowhere/x.md", "the folder nowhere does not exist"),
        ("--output x.foo", "the name must end in .md, .csv, .json, .jsonl"),
    ],
)
def test_wrong_usage_is_said_before_anything_is_loaded(run: Run, flags: str, said: str) -> None:
    result = run("eval", "needle", *flags.split(), engine=object())
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


@pytest.mark.parametrize(
    ("ctx", "loaded", "said"),
    [
        ("1k,8k", False, "--ctx 8192: the context of smollm2 is 8192 tokens, and a question and its reply come on top"),
        ("1k,2000", True, "passkey · 2,000 tokens · depth 0: prompt and reply are"),
    ],
)
def test_a_context_too_long_is_said_before_anything_runs(
    run: Run, story: str, monkeypatch: pytest.MonkeyPatch, ctx: str, loaded: bool, said: str
) -> None:
    """Beyond the model's, before it is loaded; too little room for the reply, once its tokens can be counted."""
    engine = LoadedEngine(tiny(max_position_embeddings=2048)) if loaded else Unloaded()
    monkeypatch.setattr("kcache.evaluate.retrieval.Prefix", None)
    result = run("eval", "needle", "--text", story, "--kind", "passkey", "--ctx", ctx, engine=engine)
    assert (result.exit_code, result.stdout) == (2, "")
    assert said in result.stderr


# -- tables --------------------------------------------------------------------------------------------------------


def row(ctx: int, topn: int | None, score: float, **more: Any) -> dict[str, Any]:
    values = {
        "kind": "passkey",
        "ctx": ctx,
        "depth": 0.5,
        "sample": 0,
        "topn": topn,
        "score": score,
        "same_reply": True,
    }
    where = {"model": "m", "dtype": "float32", "device": "cpu", "text": "t", "reply": "a|b\x1b[31m"}
    return {"engine": "dense" if topn is None else "kcache", **values, **where, **more}


ROWS = [
    row(1024, None, 1.0), row(1024, 64, 0.0, same_reply=False), row(1024, 128, 1.0),
    row(2048, None, 0.0), row(2048, 64, 1.0, same_reply=False), row(2048, 128, 0.0),
    row(2048, None, 1.0, sample=1), row(2048, 64, 1.0, sample=1), row(2048, 128, 1.0, sample=1),
]  # fmt: skip


def test_the_summary_counts_what_full_attention_gets_right_and_names_misses() -> None:
    text = markdown(ROWS)
    cells = [cell.strip() for cell in text.splitlines()[2].strip("| ").split("|")]
    assert cells == ["passkey", "0.5", "1.00", "0.50", "0.00", "1.00", "1.00", "0.50"]
    assert (
        "N=64: right in 1 of the 2 cases that full attention gets right; better in 1; the same reply in 1 of 3" in text
    )
    assert (
        "N=128: right in 2 of the 2 cases that full attention gets right; better in 0; the same reply in 3 of 3" in text
    )
    assert text.count("worse:") == 1
    assert "worse: N=64 · passkey · 1,024 · depth 0.5 · sample 0: 0.00, dense 1.00: a/b[31m" in text
    assert markdown([]) == ""


def test_many_misses_are_cut_short() -> None:
    many = [row(1024, topn, float(topn is None), sample=number) for number in range(25) for topn in (None, 64)]
    text = markdown(many)
    assert text.count("worse:") == 20 and "and 5 more" in text


@pytest.mark.parametrize("suffix", [".png", ".svg", ".pdf"])
def test_heat_maps(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"map{suffix}"
    spread = [row(1024, topn, 0.3, kind="common-words", depth=None) for topn in (None, 64, 128)]  # none at 2,048
    draw([*ROWS, *spread], path)
    assert path.stat().st_size > 1000
    if suffix == ".svg":
        text = path.read_text()
        assert "passkey, N=64" in text and "common-words, dense" in text and "0.30" in text
        assert "nan" not in text

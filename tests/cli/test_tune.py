"""``kcache tune``: the profile it writes, what it prints, stopping and going on, wrong usage."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest

from kcache import Policy
from kcache_cli.engine import KCacheEngine
from kcache_cli.evaluate.profile import profile, profile_file
from kcache_cli.evaluate.tune_table import COMMAND, NAMES
from kcache_cli.policies import read_policy
from kcache_cli.profiles import profiles
from kcache_cli.rows.store import read_rows
from tests.cli.conftest import Run

ROOT = Path(__file__).parent.parent.parent


class Stopped(KCacheEngine):
    """The real one, stopped with Ctrl-C in the model's forward number ``forwards``."""

    def __init__(self, forwards: int) -> None:
        super().__init__()
        self.left = forwards

    def load(self, model: Any, progress: Any) -> Any:
        lm = super().load(model, progress)
        lm.model.register_forward_pre_hook(self.count)
        return lm

    def count(self, *_: Any) -> None:
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt


@pytest.fixture
def base(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The command on a tiny model, a text and a policy that offloads from the start, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(" ".join(f"{number} is more than {number - 1}." for number in range(60)))
    Path("low.toml").write_text('spread = "even"\ndense_below = 0\ndense_layers = 0\nbackend = "reference"\n')
    flags = "--text text.txt --policy low.toml --ctx 80 --steps 5 --places 2 --device-overhead 0.3"
    return ["tune", str(tiny_folder), *flags.split()]


def test_the_profile_is_the_cheapest_that_reaches(run: Run, base: list[str], tiny_folder: Path) -> None:
    result = run(*base, "--target-kl", "0.05", "-o", "json", engine=KCacheEngine())
    assert result.exit_code == 0, result.stderr
    rows = json.loads(result.stdout)
    (best,) = [row for row in rows if row["chosen"]]
    reaching = [row for row in rows if row["reaches_target"]]
    assert best["bytes_h2d_per_token"] == min(row["bytes_h2d_per_token"] for row in reaching)
    assert best["kl_mean"] <= 0.05 and best["device_overhead"] <= 0.3 and best["places"] == 2
    assert all(row["kl_mean"] * row["places"] > 0.05 * 2 for row in rows if row["reaches_target"] is False)
    assert {row["policy"]["dense_layers"] for row in rows} == {0, 1}
    assert {(row["target_kl"], row["most_device_overhead"]) for row in rows} == {(0.05, 0.3)}

    file = Path(f"{tiny_folder.name}.toml")
    policy = read_policy(str(file))
    wanted = Policy.from_dict({**best["policy"], "offload": "auto", "backend": "auto", "k_bits": "auto"})
    assert policy == wanted and policy.topn == best["topn"]
    assert not {"offload", "backend", "prefill_chunk"} & set(tomllib.loads(file.read_text()))
    said = file.read_text()
    for part in (
        "at most 0.05 nats",
        "text.txt, sha256 " + best["text_sha256"],
        "5 teacher-forced steps after 80 tokens at 2 places",
        f"{best['kl_mean']:.4f} ± {best['kl_se']:.4f}",
        f"top-1     {best['top1']:.3f}",
        f"{best['bytes_h2d_per_token']:,.0f} bytes per token",
        "kcache 0.",
        best["env"]["time"],
    ):
        assert part in said
    assert result.stderr.count("· place 1/2 · KL ") == len(rows)
    assert result.stderr.count("prefill") == 2
    assert f"wrote {file}, for --policy {file}" in result.stderr


def test_a_table_says_what_was_tried(run: Run, base: list[str]) -> None:
    result = run(*base, "--target-kl", "0.05", "--profile", "it.toml", engine=KCacheEngine())
    assert result.exit_code == 0, result.stderr
    assert Path("it.toml").exists()
    head, _, *body = [line for line in result.stdout.splitlines() if line.startswith("|")]
    assert "link/token" in head and "device V" in head
    assert sum(line.endswith("cheapest |") for line in body) == 1
    assert "KL at most 0.05 nats and device V at most 30.0%" in result.stdout


def test_a_target_out_of_reach_is_exit_code_1_with_the_closest(run: Run, base: list[str]) -> None:
    result = run(*base, "--target-kl", "1e-9", "--profile", "it.toml", "-o", "json", engine=KCacheEngine())
    assert result.exit_code == 1
    rows = json.loads(result.stdout)
    assert rows and not any(row["chosen"] or row["reaches_target"] for row in rows)
    closest = min(rows, key=lambda row: row["kl_mean"])
    name = f"{closest['policy_name']} N={closest['topn']} at {closest['kl_mean']:.4f}"
    assert f"no policy tried comes within KL 1e-09 of full attention; the closest is {name}" in result.stderr
    assert not Path("it.toml").exists()


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json"])
def test_a_stopped_run_goes_on(run: Run, base: list[str], name: str) -> None:
    flags = [*base, "--target-kl", "0.05", "--output", name, "--resume"]
    first = run(*flags, engine=KCacheEngine())
    assert first.exit_code == 0, first.stderr
    whole = _read(name)
    cut = [{**row, "chosen": False} for row in whole[:2]]
    cut[1] |= {"places": 1, "by_place": cut[1]["by_place"][:1], "reaches_target": None}
    text = json.dumps(cut) if name.endswith("json") else "".join(json.dumps(row) + "\n" for row in cut)
    Path(name).write_text(text)
    again = run(*flags, "--overwrite", engine=KCacheEngine())
    assert again.exit_code == 0, again.stderr
    there = 1 + len(whole[0]["by_place"])
    assert again.stderr.count("was there already") == there
    kept = ("policy", "topn", "places", "kl_mean", "reaches_target", "chosen", "bytes_h2d_per_token")
    assert [[row[key] for key in kept] for row in _read(name)] == [[row[key] for key in kept] for row in whole]
    assert first.stdout.splitlines()[:-2] == again.stdout.splitlines()[:-2]
    strict = run(*base, "--target-kl", "1e-9", *flags[-3:], "--overwrite", engine=KCacheEngine())
    assert strict.exit_code == 1
    places = {(row["policy_name"], row["topn"]): row["places"] for row in _read(name)}
    assert all(places[row["policy_name"], row["topn"]] == row["places"] for row in whole)
    last = run(*flags, "--overwrite", engine=KCacheEngine())
    assert "prefill" not in last.stderr and last.exit_code == 0


def test_what_was_measured_before_ctrl_c_is_there(run: Run, base: list[str]) -> None:
    flags = [*base, "--target-kl", "0.05", "--output", "rows.jsonl", "--resume"]
    stopped = run(*flags, engine=Stopped(forwards=16))
    assert stopped.exit_code == 130 and "what has been measured is there" in stopped.stderr
    there = _read("rows.jsonl")
    assert there and not any(row["chosen"] for row in there)
    assert not [*Path().glob("tiny*.toml")]
    rest = run(*flags, engine=KCacheEngine())
    assert rest.exit_code == 0, rest.stderr
    assert rest.stderr.count("was there already") == sum(len(row["by_place"]) for row in there)
    run(*base, "--target-kl", "0.05", "--output", "whole.jsonl", "--profile", "whole.toml", engine=KCacheEngine())
    assert [(row["topn"], row["chosen"]) for row in _read("rows.jsonl")] == [
        (row["topn"], row["chosen"]) for row in _read("whole.jsonl")
    ]


def _read(name: str) -> list[dict[str, Any]]:
    text = Path(name).read_text()
    return json.loads(text) if name.endswith("json") else [json.loads(line) for line in text.splitlines()]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--profile there.toml", "--profile there.toml: is there already; give --overwrite"),
        ("--profile nowhere/x.toml", "the folder nowhere does not exist"),
        ("--target-kl 0", "target_kl must be a number of nats above 0"),
        ("--device-overhead 2", "device_overhead must be a share from 0 to 1"),
        ("--policy default", "below 2,048 tokens the policy attends exactly"),
        ("--policy nothing.toml", "nor a file that exists"),
        ("--places 90", "give a longer text"),
        ("--resume", "--resume reads what --output holds"),
        ("--output x.foo", "the name must end in .md, .csv, .json, .jsonl"),
    ],
)
def test_wrong_usage_is_one_line(run: Run, base: list[str], flags: str, said: str) -> None:
    Path("there.toml").write_text("topn = 3\n")
    result = run(*base, *flags.split(), engine=KCacheEngine())
    assert result.exit_code == 2
    assert said in result.stderr and "Traceback" not in result.stderr
    assert Path("there.toml").read_text() == "topn = 3\n"


def test_a_profile_is_called_after_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my model").mkdir()
    assert str(profile_file(None, "smollm2", False)) == "smollm2.toml"
    assert str(profile_file(None, "Qwen/Qwen3-8B", False)) == "Qwen3-8B.toml"
    assert str(profile_file(None, "./my model/", False)) == "my-model.toml"


def test_the_profile_that_comes_along_is_that_of_its_rows() -> None:
    rows = read_rows(ROOT / "docs" / "fidelity" / "tune-essays.jsonl", "rows", COMMAND, NAMES)
    (best,) = [row for row in rows if row["chosen"]]
    assert profile(Policy.from_dict(best["policy"]), best) == profiles()["smollm2"].read_text()
    assert best["kl_mean"] <= best["target_kl"] and best["device_overhead"] <= best["most_device_overhead"]

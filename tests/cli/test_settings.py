"""Where defaults come from, and what is said when they are wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from kcache_cli.settings import Settings
from kcache_cli.variables import OTHERS, warn_of_misspelled
from tests.cli.conftest import Run
from tests.cli.fakes import FakeEngine

ROOT = Path(__file__).parents[2]


def test_flag_before_variable_before_file_before_built_in(
    run: Run, settings_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def topn(*args: str) -> int:
        engine = FakeEngine()
        assert run("chat", *args, input="hi", engine=engine).exit_code == 0
        return engine.policies[0].topn

    assert topn() == 128
    settings_file.write_text("topn = 16\n")
    assert topn() == 16
    monkeypatch.setenv("KCACHE_TOPN", "32")
    assert topn() == 32
    assert topn("--topn", "64") == 64


def test_settings_reach_model_sampling_and_chat(run: Run, settings_file: Path) -> None:
    settings_file.write_text(
        'model = "org/other"\ndevice = "cpu"\ndtype = "float32"\ntemperature = 0.0\nsystem = "be brief"\n'
        'max_tokens = 2\nctx = 100\nkv_budget = "1GiB"\n'
    )
    engine = FakeEngine()
    result = run("chat", input="hi", engine=engine)
    assert result.stdout == "Hello there\n"
    assert engine.models[0].model == "org/other"
    assert (engine.models[0].device, engine.models[0].dtype) == ("cpu", "float32")
    session = engine.sessions[0]
    assert session.system == "be brief"
    assert session.sampling.temperature == 0.0
    assert session.max_length == 100
    assert engine.policies[0].kv_budget == 2**30


@pytest.mark.parametrize(
    ("text", "say"),
    [
        ("topn = 64\ntopm = 3\n", "config.toml:2: unknown setting 'topm'; did you mean 'topn'?"),
        ("xyzzy = 3\n", "config.toml:1: unknown setting 'xyzzy'"),
        ("\n\ntopn = 'many'\n", "config.toml:3: topn = 'many'"),
        ("topn = 0\n", "config.toml:1: topn = 0"),
        ("temperature = nan\n", "config.toml:1: temperature"),
        ("offload = 'some'\n", "config.toml:1: offload = 'some'"),
        ("kv_budget = 'lots'\n", "config.toml:1: kv_budget = 'lots': not a size"),
        ("topn = \n", "line 1"),
        ("[chat]\ntopn = 3\n", "config.toml:1: unknown setting 'chat'"),
    ],
)
def test_bad_settings_file_names_the_line(run: Run, settings_file: Path, text: str, say: str) -> None:
    settings_file.write_text(text)
    engine = FakeEngine()
    result = run("chat", input="hi", engine=engine)
    assert result.exit_code == 2
    assert say in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert engine.calls == []


@pytest.mark.parametrize(
    ("text", "say"), [("theme = 'plaid'\n", "theme 'plaid': there is none"), ("keys = 'pauze=o'\n", "NAME=KEY")]
)
def test_config_refuses_what_the_dashboard_would(run: Run, settings_file: Path, text: str, say: str) -> None:
    settings_file.write_text(text)
    result = run("config")
    assert (result.exit_code, result.stdout) == (2, "")
    assert say in result.stderr


def test_settings_file_that_is_not_text(run: Run, settings_file: Path) -> None:
    settings_file.write_bytes(b"\xff\xfe")
    assert "not UTF-8" in run("config").stderr


def test_bad_variable_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KCACHE_TOPN", "many")
    result = run("chat", input="hi")
    assert result.exit_code == 2
    assert "KCACHE_TOPN='many'" in result.stderr


@pytest.mark.parametrize(
    ("name", "meant"),
    [("KCACHE_TOPM", "KCACHE_TOPN"), ("kcache_max_token", "KCACHE_MAX_TOKENS"), ("KCACHE_HOEM", "KCACHE_HOME")],
)
def test_a_misspelled_variable_is_warned_about_once(
    run: Run, monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    monkeypatch.setenv(name, "64")
    monkeypatch.setenv("KCACHE_SEED", "7")
    monkeypatch.setenv("KCACHE_OF_SOMEBODY_ELSE", "1")
    for args in (["chat"], ["config"]):
        result = run(*args, input="hi")
        assert result.exit_code == 0
        warned = [line for line in result.stderr.splitlines() if "variable" in line]
        assert warned == [f"kcache: warning: unknown variable {name}; did you mean {meant}?"]


def test_of_several_processes_one_warns(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"KCACHE_TOPM": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "here"}.items():
        monkeypatch.setenv(name, value)
    for rank, says in (("0", True), ("1", False)):
        monkeypatch.setenv("RANK", rank)
        assert ("KCACHE_TOPM" in run("generate", "--engine", "ray").stderr) == says


def test_variables_that_are_read_are_not_warned_about(capsys: pytest.CaptureFixture[str]) -> None:
    sources = "".join(path.read_text() for folder in ("kcache", "kcache_cli") for path in (ROOT / folder).rglob("*.py"))
    read = set(re.findall(r"(?<![A-Z_])KCACHE_[A-Z_]*[A-Z]", sources))
    assert {"KCACHE_HOME", "KCACHE_WEB", "KCACHE_WATCH_TOKEN", "KCACHE_TOPN"} <= read
    warn_of_misspelled(dict.fromkeys([*read, *(f"KCACHE_{name}".upper() for name in Settings.model_fields)], "1"))
    assert capsys.readouterr().err == ""
    assert {name.removeprefix("KCACHE_").lower() for name in read} <= {*Settings.model_fields, *map(str.lower, OTHERS)}


def test_named_settings_file(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.toml"
    monkeypatch.setenv("KCACHE_CONFIG", str(file))
    result = run("config")
    assert result.exit_code == 2
    assert "KCACHE_CONFIG" in result.stderr
    assert run("config", "--init").exit_code == 0
    assert run("config", "--path").stdout.strip() == str(file)
    assert run("config").exit_code == 0


def test_config_says_where_values_come_from(run: Run, settings_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings_file.write_text("topn = 16\n")
    monkeypatch.setenv("KCACHE_SEED", "7")
    found = json.loads(run("config", "--json").stdout)
    assert found["file"] == str(settings_file)
    assert found["settings"]["topn"] == {"value": 16, "source": "file"}
    assert found["settings"]["k_bits"] == {"value": "auto", "source": "built-in"}
    assert found["settings"]["top_p"] == {"value": None, "source": "built-in"}
    assert found["settings"]["seed"] == {"value": 7, "source": "KCACHE_SEED"}
    assert found["settings"]["model"] == {"value": "smollm2", "source": "built-in"}
    table = run("config").stdout
    assert str(settings_file) in table
    assert "KCACHE_SEED" in table


def test_init_writes_a_file_that_loads_once(run: Run, settings_file: Path) -> None:
    assert run("config", "--init").exit_code == 0
    assert settings_file.exists()
    uncommented = [line.removeprefix("# ") for line in settings_file.read_text().splitlines() if " = " in line]
    assert len(uncommented) > 10
    assert run("config").exit_code == 0
    again = run("config", "--init")
    assert again.exit_code == 2
    assert "exists already" in again.stderr

"""From flags and files to a policy."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest

import kcache
from kcache import Policy
from kcache_cli.completion import complete_policy
from kcache_cli.profiles import profiles
from tests.cli.conftest import Run
from tests.cli.fakes import FakeEngine


def policy_of(run: Run, *args: str) -> Policy:
    engine = FakeEngine()
    result = run("chat", *args, input="hi", engine=engine)
    assert result.exit_code == 0, result.stderr
    return engine.policies[0]


def test_default_is_the_librarys(run: Run) -> None:
    assert policy_of(run) == Policy()
    assert policy_of(run, "--policy", "default") == Policy()


def test_paper_with_changes(run: Run) -> None:
    assert policy_of(run, "--policy", "paper", "--topn", "64") == Policy.paper(64)


def test_flags(run: Run) -> None:
    args = "--topn 7 --offload all --kv-budget 20GiB --resident-layers 3 --dense-layers 1 --backend reference "
    args += "--graph off --k-bits 8 --v-bits 16"
    assert policy_of(run, *args.split()) == Policy(
        topn=7, offload="all", kv_budget="20GiB", resident_layers=3, dense_layers=1, backend="reference", graph="off",
        k_bits=8,
    )  # fmt: skip


@pytest.mark.parametrize(("given", "bits"), [("16", 16), ("8", 8), ("8+8", "8+8")])
def test_bits_of_k(run: Run, settings_file: Path, given: str, bits: Any) -> None:
    assert policy_of(run, "--k-bits", given).k_bits == bits
    settings_file.write_text(f'k_bits = "{given}"\n')
    assert policy_of(run).k_bits == bits


def test_file_then_flags(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text('topn = 9\ntail = "none"\n')
    assert policy_of(run, "--policy", str(file)) == Policy(topn=9, tail="none")
    assert policy_of(run, "--policy", str(file), "--topn", "10") == Policy(topn=10, tail="none")


def test_profiles_that_come_along_go_by_the_models_name(run: Run) -> None:
    assert "smollm2" in profiles() and set(profiles()) <= {entry.name for entry in kcache.known_models()}
    for name, path in profiles().items():
        assert policy_of(run, "--policy", name) == Policy.from_dict(tomllib.loads(path.read_text()))
        assert policy_of(run, "--policy", name, "--topn", "7").topn == 7
    assert complete_policy("smol") == ["smollm2"]


def test_policy_on_the_command_line_starts_anew(run: Run, settings_file: Path) -> None:
    settings_file.write_text("topn = 16\ndense_layers = 5\n")
    assert policy_of(run) == Policy(topn=16, dense_layers=5)
    assert policy_of(run, "--policy", "default") == Policy()


@pytest.mark.parametrize(
    ("text", "say"),
    [
        ("topn = 0", "topn must be"),
        ("topn = 'x'", "topn must be"),
        ("colour = 1", "unknown policy field 'colour'"),
        ("topn =", "not valid TOML"),
        ("tail = 3", "tail must be one of"),
    ],
)
def test_bad_file(run: Run, tmp_path: Path, text: str, say: str) -> None:
    file = tmp_path / "bad.toml"
    file.write_text(text)
    result = run("chat", "--policy", str(file), input="hi")
    assert result.exit_code == 2
    assert say in result.stderr
    assert "bad.toml" in result.stderr


def test_policy_file_that_is_a_folder_or_not_text(run: Run, tmp_path: Path) -> None:
    assert run("chat", "--policy", str(tmp_path), input="hi").exit_code == 2
    (tmp_path / "b.toml").write_bytes(b"\xff")
    result = run("chat", "--policy", str(tmp_path / "b.toml"), input="hi")
    assert result.exit_code == 2
    assert "UTF-8" in result.stderr

"""The package as such: what importing it costs, what it exports, and the rules that hold for every file."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

import kcache
from kcache.models.support import NEWEST_TRIED

ROOT = Path(__file__).parent.parent
LIBRARY = sorted((ROOT / "kcache").rglob("*.py"))
PROGRAM = sorted((ROOT / "kcache_cli").rglob("*.py"))
SCREEN_PACKAGES = {"typer", "rich", "textual", "prompt_toolkit", "click", "kcache_cli"}
MAX_LINES = 500


def names(paths: list[Path]) -> list[str]:
    return [str(path.relative_to(ROOT)) for path in paths]


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return table


def test_importing_kcache_imports_nothing_heavy() -> None:
    script = (
        "import sys, kcache; print(sorted({'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout == "[]\n"


def test_every_public_name_is_there() -> None:
    for name in kcache.__all__:
        assert getattr(kcache, name) is not None
    assert set(kcache.__all__) <= set(dir(kcache))
    assert not hasattr(kcache, "no_such_name")


def test_every_error_derives_from_one() -> None:
    errors = [
        value for name in kcache.__all__ if isinstance(value := getattr(kcache, name), type) and name.endswith("Error")
    ]
    assert len(errors) >= 9
    assert all(issubclass(error, kcache.KCacheError) for error in errors)


def test_the_newest_transformers_that_is_said_to_be_tried_is_the_one_tests_run_with() -> None:
    major, minor = NEWEST_TRIED
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    assert any(pin.startswith(f"transformers=={major}.{minor}.") for pin in pins)


def test_the_version_is_a_release_and_types_ship() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", kcache.__version__)
    assert (ROOT / "kcache" / "py.typed").exists()


@pytest.mark.parametrize("path", LIBRARY, ids=names(LIBRARY))
def test_the_library_draws_nothing(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported = {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported = {(node.module or "").partition(".")[0]}
        else:
            imported = set()
        assert not imported & SCREEN_PACKAGES, ast.unparse(node)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("print", "input"), ast.unparse(node)


@pytest.mark.parametrize("path", LIBRARY + PROGRAM, ids=names(LIBRARY + PROGRAM))
def test_a_module_says_what_it_is_for_and_is_not_too_long(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text)), "no module docstring"
    assert len(text.splitlines()) <= MAX_LINES


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_constraints_pin_every_requirement() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {_normal(pin.partition("==")[0]) for pin in pins}
    wanted = [*project()["dependencies"], *project()["optional-dependencies"]["dev"]]
    missing = {_normal(re.match(r"[\w.-]+", line)[0]) for line in wanted} - pinned  # type: ignore[index]
    assert not missing


def test_the_ci_script_can_be_run() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert script.read_text(encoding="utf-8").startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in script.read_text(encoding="utf-8")

"""Every test has its own settings file, history and environment."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest
from typer.testing import CliRunner, Result

from kcache_cli.app import app
from tests.cli.fakes import FakeEngine


class Run(Protocol):
    def __call__(self, *args: str, input: str | bytes = "", engine: Any = None) -> Result: ...


@pytest.fixture(autouse=True)
def _own_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, sockets: Path) -> None:
    for name in [name for name in os.environ if name.upper().startswith("KCACHE_")]:
        if name != "KCACHE_HOME":  # where the demo model is kept
            monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("COLUMNS", "100")


@pytest.fixture
def run() -> Run:
    """Run ``kcache`` with arguments, on a fake engine unless another is given."""

    def call(*args: str, input: str | bytes = "", engine: Any = None) -> Result:
        chosen = engine if engine is not None else FakeEngine()
        return CliRunner().invoke(app, list(args), input=input, obj=chosen, prog_name="kcache")

    return call


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Compute with one thread, as the processes do that the result is compared with."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def settings_file(tmp_path: Path) -> Path:
    """The settings file, its folder made, not written yet."""
    path = tmp_path / "config" / "kcache" / "config.toml"
    path.parent.mkdir(parents=True)
    return path

"""Fixtures shared by all tests, and the rule that GPU tests run only where there is a GPU."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in the background of a shell; tests of Ctrl-C would wait
    signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # must be set before transformers imports triton

from transformers import PreTrainedModel

import kcache
from tests import tiny_models
from tests.saved import save_tiny


def pytest_addoption(parser: pytest.Parser) -> None:
    """``--renew-screens`` writes the pictures that screens are compared with, instead of comparing."""
    parser.addoption("--renew-screens", action="store_true", help="write tests/tui/screens anew; look at them")
    parser.addoption("--failures", type=Path, help="write what failed to this file at once: a run may be cut short")


def pytest_configure(config: pytest.Config) -> None:
    """Write failures as they come, in the process that all reports reach."""
    file = config.getoption("failures")
    if file is not None and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Failures(file))


class Failures:
    """Writes each failure to a file as soon as it is reported."""

    def __init__(self, file: Path) -> None:
        self._file = file
        file.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Add a test that has just failed, and why."""
        if report.failed:
            with self._file.open("a") as out:
                out.write(f"{report.nodeid} ({report.when})\n{report.longreprtext}\n\n")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out the tests marked ``gpu`` on a machine without CUDA, and ``gpu(2)`` where there are fewer GPUs."""
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    left_out = [item for item in items if _gpus_for(item) > there]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if _gpus_for(item) <= there]


def _gpus_for(item: pytest.Item) -> int:
    """How many GPUs a test needs."""
    marker = item.get_closest_marker("gpu")
    return 0 if marker is None else int(marker.args[0]) if marker.args else 1


@pytest.fixture
def kcache_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache folder of this test's own; the real one is neither read nor written."""
    home = tmp_path / "kcache-home"
    monkeypatch.setenv("KCACHE_HOME", str(home))
    return home


@pytest.fixture
def sockets(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for this test's sockets, with a path short enough for them."""
    with tempfile.TemporaryDirectory(prefix="kc", dir="/tmp") as folder:
        monkeypatch.setenv("XDG_RUNTIME_DIR", folder)
        yield Path(folder) / "kcache"


@pytest.fixture(scope="session")
def tiny_model() -> Callable[..., PreTrainedModel]:
    """``tiny_model(kind, **changes)``: a tiny random model, made once per set of arguments; do not change it."""
    made: dict[str, PreTrainedModel] = {}

    def make(kind: str, **changes: Any) -> PreTrainedModel:
        key = f"{kind} {sorted(changes.items())}"
        if key not in made:
            made[key] = tiny_models.make(kind, **changes)
        return made[key]

    return make


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level tokenizer and a chat template, saved to a folder."""
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def demo_lm() -> kcache.LoadedModel:
    """The real demo model, in its default dtype; fetched into the user's cache folder the first time."""
    return kcache.load("smollm2")

"""OpenMP's threads are given back by the thread that has called torch's operators."""

from __future__ import annotations

import os
import subprocess
import sys

import psutil
import pytest

from kcache.machine.threads import make_way_for_others

_PROGRAM = """
import os, time, torch
from kcache.machine.threads import let_go_of_threads

def threads():
    return len(os.listdir("/proc/self/task"))

torch.set_num_threads(4)
before = threads()
def compute():
    return float(torch.ones(2_000_000).exp().sum())
first = compute()
team = threads() - before
let_go_of_threads()
until = time.monotonic() + 20
while threads() > before and time.monotonic() < until:
    time.sleep(0.01)
print(team, threads() - before, compute() == first)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_threads_are_given_back_and_come_again() -> None:
    done = subprocess.run([sys.executable, "-c", _PROGRAM], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["3", "0", "True"]


@pytest.fixture
def before_torch(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """As in a process that has not imported torch, on four cores, nothing said about threads."""
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(psutil, "cpu_count", lambda: 4)
    monkeypatch.setattr(psutil, "cpu_percent", lambda interval: 50.0)
    for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT"):
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    return monkeypatch


def test_threads_sleep_where_others_compute(before_torch: pytest.MonkeyPatch) -> None:
    assert make_way_for_others() == 2.0
    assert os.environ["OMP_WAIT_POLICY"] == "passive"


@pytest.mark.parametrize(
    ("name", "value"),
    [("OMP_NUM_THREADS", "2"), ("OMP_NUM_THREADS", "1"), ("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "9")],
)
def test_threads_with_cores_of_their_own_or_told_how_to_wait_do_as_ever(
    before_torch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    before_torch.setenv(name, value)
    assert make_way_for_others() is None
    assert os.environ.get("OMP_WAIT_POLICY") != "passive"


def test_an_idle_machine_is_left_alone(before_torch: pytest.MonkeyPatch) -> None:
    before_torch.setattr(psutil, "cpu_percent", lambda interval: 5.0)
    assert make_way_for_others() is None
    assert "OMP_WAIT_POLICY" not in os.environ


def test_it_is_too_late_once_torch_is_there(before_torch: pytest.MonkeyPatch) -> None:
    before_torch.setitem(sys.modules, "torch", sys)
    assert make_way_for_others() is None

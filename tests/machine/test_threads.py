"""OpenMP's threads are given back by the thread that has called torch's operators."""

from __future__ import annotations

import subprocess
import sys

import pytest

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

"""kcache doctor: a host-only report where there is no GPU, all of it where there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kcache.machine.host
import kcache.speed.findings
import kcache.speed.machine
from kcache.machine.host import NumaNode, PciSlot
from kcache.speed.machine import GatherSpeed, LinkSpeed, Machine
from tests.cli.conftest import Run
from tests.speed.test_machine import CPU, GPU

ROOT = Path(__file__).parents[2]
GATHERS = (GatherSpeed(512, 5.0), GatherSpeed(32768, 12.5))
LINKS = (LinkSpeed(4096, 1.5, 1.25), LinkSpeed(2**26, 50.0, 51.0))


def measured(monkeypatch: pytest.MonkeyPatch, machine: Machine) -> None:
    monkeypatch.setattr(kcache.speed.machine, "measure", lambda device, quick: machine)
    monkeypatch.setattr(kcache.machine.host, "pci_slot", lambda device: PciSlot(0, "16.0 GT/s x16", "32.0 GT/s x16"))
    monkeypatch.setattr(kcache.machine.host, "numa_nodes", lambda: [NumaNode(0, "0-1", 2**34)])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("kcache.speed.findings.driver_problem", lambda: None)


def test_host_only_claims_nothing_of_a_device(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, replace(CPU, gathers=GATHERS))
    result = run("doctor")
    assert result.exit_code == 0, result.stderr
    for words in ("host-only", "RAM, copy", "32,768", "missing: no CUDA device", "→", "with a GPU"):
        assert words in result.stdout
    for words in ("device memory, copy", "host to device", "ulimit"):
        assert words not in result.stdout
    found = json.loads(run("doctor", "--json").stdout)
    assert found["host_only"] is True
    assert found["machine"]["device_copy_gb_s"] is found["machine"]["h2d_gb_s"] is found["pci"] is None
    assert found["machine"]["ram_copy_gb_s"] == 100.0
    assert found["findings"][0]["level"] == "missing"
    assert found["machine"]["gathers"] == [{"rows": 512, "gb_s": 5.0}, {"rows": 32768, "gb_s": 12.5}]


def test_a_gpu(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, replace(GPU, gathers=GATHERS, links=LINKS))
    result = run("doctor")
    assert result.exit_code == 0, result.stderr
    for words in (
        "4,000",
        "host to device, pinned",
        "4 KiB",
        "64 MiB",
        "16.0 GT/s x16",
        "NUMA",
        "versions",
        "ulimit -l",
    ):
        assert words in result.stdout
    found = json.loads(run("doctor", "--json").stdout)
    assert found["machine"]["links"][0] == {"size": 4096, "h2d_gb_s": 1.5, "d2h_gb_s": 1.25}


def test_commands_stand_on_lines_of_their_own(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    measured(monkeypatch, GPU)
    command = "numactl --cpunodebind=0 --membind=0 kcache inspect"
    found = [kcache.speed.findings.Finding("note", "two NUMA nodes", "run on the GPU's node with", (command,))]
    monkeypatch.setattr(kcache.speed.findings, "findings", lambda *args: found)
    assert f"\n    {command}\n" in run("doctor").stdout


def test_nothing_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    measured(monkeypatch, GPU)
    monkeypatch.setattr(kcache.speed.findings, "findings", lambda *args: [])
    assert "nothing is missing" in run("doctor").stdout


def test_a_device_that_is_not_there(run: Run) -> None:
    result = run("doctor", "--device", "cuda:99")
    assert result.exit_code == 2
    assert result.stderr.count("\n") == 1


@pytest.mark.slow
def test_as_a_user_runs_it() -> None:
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "kcache_cli", "doctor"],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=False, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "RAM, copy" in done.stdout
    assert "\x1b" not in done.stdout

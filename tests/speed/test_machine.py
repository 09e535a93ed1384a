"""Measuring this machine, reading the host's description, and what is found to be missing."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kcache.errors import InputError
from kcache.machine import host
from kcache.machine.host import Host, NumaNode, PciSlot
from kcache.speed.bandwidth import GATHER_ROWS
from kcache.speed.findings import Finding, findings
from kcache.speed.machine import Machine, measure

GOOD_HOST = Host(
    cpu="a CPU",
    cores=16,
    threads=16,
    flags={"avx512_bf16": True, "amx_bf16": False},
    nodes=(NumaNode(0, "0-15", 2**37),),
    memory_bytes=2**37,
    free_bytes=2**36,
    locked_limit=None,
)
VERSIONS = {
    "python": "3.12",
    "torch": "2.11",
    "transformers": "5.20.0",
    "triton": "3.6",
    "cuda": "12.9",
    "driver": "580.1",
}
GPU = Machine(
    device="cuda:0",
    name="a GPU",
    device_copy_gb_s=4000.0,
    device_read_gb_s=4100.0,
    ram_copy_gb_s=100.0,
    ram_read_gb_s=90.0,
    h2d_gb_s=50.0,
    d2h_gb_s=50.0,
    gather_gb_s=40.0,
    compute_tflops=600.0,
    device_bytes=2**37,
    host_bytes=2**37,
    host_free_bytes=2**36,
    threads=16,
    versions=VERSIONS,
    pinned=True,
)
CPU = replace(GPU, device="cpu", h2d_gb_s=None, d2h_gb_s=None, pinned=None, versions={**VERSIONS, "cuda": None})


@pytest.fixture(autouse=True)
def _a_recent_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("kcache.speed.findings.driver_problem", lambda: None)


# -- measuring -----------------------------------------------------------------------------------------------------


def test_measure_the_cpu() -> None:
    threads, random = torch.get_num_threads(), torch.get_rng_state()
    machine = measure("cpu")
    assert torch.equal(torch.get_rng_state(), random)
    assert machine.host_only
    assert (machine.device, machine.h2d_gb_s, machine.d2h_gb_s, machine.pinned) == ("cpu", None, None, None)
    assert machine.device_copy_gb_s == machine.ram_copy_gb_s > 0
    assert machine.memory_gb_s == max(machine.ram_copy_gb_s, machine.ram_read_gb_s)
    assert machine.gather_gb_s > 0
    assert machine.matvec_gb_s is not None
    assert 0 < machine.product_gb_s < 1000
    assert 0 <= machine.layer_ms < 100
    assert machine.compute_tflops > 0
    assert machine.threads == threads == torch.get_num_threads()
    assert machine.versions["torch"] == torch.__version__
    assert machine.links == machine.gathers == ()


@pytest.mark.slow
def test_measure_by_size() -> None:
    machine = measure(torch.device("cpu"), quick=False)
    assert [gather.rows for gather in machine.gathers] == list(GATHER_ROWS)
    assert all(gather.gb_s > 0 for gather in machine.gathers)
    assert machine.links == ()


@pytest.mark.parametrize("device", ["cuda:99", "nonsense", "meta"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(InputError, match=device):
        measure(device)


# -- reading -------------------------------------------------------------------------------------------------------


def test_read_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cpuinfo = "processor\t: 0\nmodel name\t: Some CPU @ 2 GHz\nflags\t\t: fpu avx2 avx512f amx_bf16\n"
    (tmp_path / "cpuinfo").write_text(cpuinfo)
    (tmp_path / "driver").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.65.06  Sun Jul 27\n")
    for index in (1, 0):
        node = tmp_path / "node" / f"node{index}"
        node.mkdir(parents=True)
        (node / "cpulist").write_text(f"{8 * index}-{8 * index + 7}\n")
        (node / "meminfo").write_text(f"Node {index} MemTotal:       1024 kB\n")
    monkeypatch.setattr(host, "_CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(host, "_DRIVER", tmp_path / "driver")
    monkeypatch.setattr(host, "_NODES", tmp_path / "node")
    seen = host.read_host()
    assert seen.cpu == "Some CPU @ 2 GHz"
    assert {name for name, there in seen.flags.items() if there} == {"avx2", "avx512f", "amx_bf16"}
    assert seen.nodes == (NumaNode(0, "0-7", 2**20), NumaNode(1, "8-15", 2**20))
    assert host.versions()["driver"] == "580.65.06"


def test_reading_where_the_system_says_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_CPUINFO", "_DRIVER", "_NODES"):
        monkeypatch.setattr(host, name, tmp_path / "nothing")
    seen = host.read_host()
    assert (seen.flags, seen.nodes) == ({}, ())
    assert host.driver_version() is None


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Sun Jul 27 07:19:58 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (dvs-builder@U22)",
    ],
)
def test_either_kind_of_kernel_module_says_its_version(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "driver").write_text(f"{line}\nGCC version:  gcc version 12.3.0\n")
    monkeypatch.setattr(host, "_DRIVER", tmp_path / "driver")
    assert host.driver_version() == "580.159.04"


# -- what is missing -----------------------------------------------------------------------------------------------


def test_nothing_is_missing() -> None:
    assert findings(GPU, GOOD_HOST, load=0.0) == []


@pytest.mark.parametrize(
    ("machine", "seen", "slot", "level", "word", "way_out"),
    [
        (CPU, GOOD_HOST, None, "missing", "built without CUDA", "CUDA wheels"),
        (replace(CPU, versions={**VERSIONS, "driver": None}), GOOD_HOST, None, "missing", "no NVIDIA driver", "driver"),
        (replace(CPU, versions=VERSIONS), GOOD_HOST, None, "missing", "visible", "CUDA_VISIBLE_DEVICES"),
        (CPU, replace(GOOD_HOST, flags={"avx512_bf16": False}), None, "missing", "bfloat16", "--dtype float32"),
        (replace(CPU, threads=4), GOOD_HOST, None, "note", "4 of 16", "OMP_NUM_THREADS"),
        (replace(GPU, versions={**VERSIONS, "triton": None}), GOOD_HOST, None, "missing", "triton", "pip install"),
        (
            replace(GPU, versions={**VERSIONS, "transformers": "5.99.0"}),
            GOOD_HOST,
            None,
            "note",
            "5.99",
            "transformers<",
        ),
        (replace(GPU, pinned=False), GOOD_HOST, None, "missing", "refused to pin", "ulimit -l unlimited"),
        (GPU, replace(GOOD_HOST, locked_limit=2**23), None, "note", "8 MiB", "ulimit -l unlimited"),
        (replace(GPU, h2d_gb_s=6.0), GOOD_HOST, None, "note", "6.0 GB/s", "--kv-budget"),
        (GPU, GOOD_HOST, PciSlot(0, "8.0 GT/s x16", "32.0 GT/s x16"), "note", "8.0 GT/s", "slot"),
        (GPU, replace(GOOD_HOST, nodes=GOOD_HOST.nodes * 2), PciSlot(1, None, None), "note", "node 1", "numactl"),
    ],
)
def test_each_lack_has_a_way_out(
    machine: Machine, seen: Host, slot: PciSlot | None, level: str, word: str, way_out: str
) -> None:
    found = findings(machine, seen, slot, load=0.0)

    def say(finding: Finding) -> str:
        return " ".join([finding.way_out, *finding.commands])

    assert any(each.level == level and word in each.what and way_out in say(each) for each in found)
    assert all("\n" not in each.what + say(each) for each in found)


def test_where_nothing_is_pinned_locked_memory_is_nobodys_concern() -> None:
    assert findings(CPU, replace(GOOD_HOST, locked_limit=2**16), load=0.0) == findings(CPU, GOOD_HOST, load=0.0)


def test_old_cards_and_busy_machines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 0))
    old, busy = findings(GPU, GOOD_HOST, load=15.0)
    assert old.level == "missing"
    assert "7.0" in old.what
    assert "--dtype float16" in old.way_out
    assert "busy" in busy.what


def test_cards_of_another_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.1")
    (found,) = findings(GPU, GOOD_HOST, load=0.0)
    assert found.level == "missing"
    assert "ROCm" in found.what


def test_triton_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.speed.findings.driver_problem", lambda: "RuntimeError: Failed to find C compiler.")
    (found,) = findings(GPU, GOOD_HOST, load=0.0)
    assert found.level == "missing"
    assert "Failed to find C compiler" in found.what
    assert "gcc" in found.commands[0]

"""RAM is what the machine has, or what a control group leaves of it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from kcache.errors import DoesNotFitError
from kcache.machine import ram as module
from kcache.machine.ram import Ram, read_ram
from kcache.tiers.arena import mapped

GIB = 2**30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Control groups of a machine with 512 GiB, of which 400 are available."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(total=512 * GIB, available=400 * GIB))
    monkeypatch.setattr(module, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(module, "_MEMBERSHIP", tmp_path / "membership")
    (tmp_path / "groups").mkdir()
    return tmp_path


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("_dot_", ".")).write_text(f"{text}\n")


def test_no_group_no_limit(groups: Path) -> None:
    assert read_ram() == Ram(512 * GIB, 400 * GIB)
    (groups / "membership").write_text("0::/user.slice\n")
    write(groups / "groups/user.slice", memory_dot_max="max", memory_dot_current=GIB)
    assert read_ram() == Ram(512 * GIB, 400 * GIB)


def test_a_container_sees_its_group_at_the_root(groups: Path) -> None:
    (groups / "membership").write_text("0::/kubepods/pod7/abc\n")
    write(groups / "groups", memory_dot_max=32 * GIB, memory_dot_current=20 * GIB)
    assert read_ram() == Ram(32 * GIB, 12 * GIB)
    write(groups / "groups", memory_dot_stat=f"anon 5\ninactive_file {8 * GIB}\nactive_file 7")
    assert read_ram() == Ram(32 * GIB, 20 * GIB)


def test_the_narrowest_of_nested_groups_counts(groups: Path) -> None:
    (groups / "membership").write_text("0::/a/b\n")
    write(groups / "groups/a", memory_dot_max=16 * GIB, memory_dot_current=15 * GIB)
    write(groups / "groups/a/b", memory_dot_max=64 * GIB, memory_dot_current=2 * GIB)
    assert read_ram() == Ram(16 * GIB, GIB)


def test_version_one(groups: Path) -> None:
    (groups / "membership").write_text("5:cpu,cpuacct:/x\n4:memory:/x\n")
    write(
        groups / "groups/memory/x", memory_dot_limit_in_bytes=8 * GIB, memory_dot_usage_in_bytes=9 * GIB,
        memory_dot_stat=f"total_inactive_file {GIB // 2}",
    )  # fmt: skip
    write(groups / "groups/memory", memory_dot_limit_in_bytes=2**63 - 4096, memory_dot_usage_in_bytes=9 * GIB)
    assert read_ram() == Ram(8 * GIB, 0)


def test_v_that_a_group_has_no_room_for_is_refused(groups: Path) -> None:
    (groups / "membership").write_text("0::/\n")
    write(groups / "groups", memory_dot_max=GIB, memory_dot_current=GIB - 4096)
    with pytest.raises(DoesNotFitError, match=r"0\.0 GiB are free"):
        mapped(2**20)

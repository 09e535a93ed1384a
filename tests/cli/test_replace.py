"""Finished files: whole or not there, whatever the disk does."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from kcache_cli.replace import replace


def test_a_file_that_cannot_be_finished_leaves_nothing_and_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = tmp_path / "rows.json"
    target.write_bytes(b"before")
    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OSError, match="No space left") as caught:
        replace(target, b"after")
    assert caught.value.filename == str(target)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.json"] and target.read_bytes() == b"before"


def test_a_device_that_is_full_is_named() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        replace(Path("/dev/full"), b"rows")
    assert caught.value.filename == "/dev/full"

"""RAM this process may use: the machine's, or less of it where a control group (a container, a job) sets a limit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import psutil

_GROUPS = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


@dataclass(frozen=True)
class Ram:
    """Bytes of RAM in all, and available now."""

    total: int
    available: int


def read_ram() -> Ram:
    """Ask the system, and every control group that this process is in; going past a group's limit ends the process."""
    memory = psutil.virtual_memory()
    total, available = int(memory.total), int(memory.available)
    for limit, used in _limits():
        total, available = min(total, limit), min(available, max(0, limit - used))
    return Ram(total, available)


def _limits() -> list[tuple[int, int]]:
    """Limit and use of each control group around this process, of version 2 or 1, that can be read."""
    found = []
    for line in _lines(_MEMBERSHIP):
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = _GROUPS, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root, names = _GROUPS / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inside = root / path.lstrip("/")
        # In a container the path may be the host's, and the group then is the root that is seen.
        for group in (inside, *inside.parents):
            if not group.is_relative_to(root):
                break
            limit, used = _number(group / names[0]), _number(group / names[1])
            if limit is not None and used is not None:
                found.append((limit, used - _cached(group, names[2])))
    return found


def _cached(group: Path, name: str) -> int:
    """Bytes of files that the system gives up before anything else."""
    for line in _lines(group / "memory.stat"):
        key, _, value = line.partition(" ")
        if key == name and value.isdecimal():
            return int(value)
    return 0


def _number(file: Path) -> int | None:
    """The number in a file; None where there is none, as where it says ``max``."""
    text = "".join(_lines(file))
    return int(text) if text.isdecimal() else None


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return []

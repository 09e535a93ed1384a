"""Measuring this machine, and remembering how fast its link is: the dashboard shows traffic as a share of that."""

from __future__ import annotations

import contextlib
import json
import platform
from typing import TYPE_CHECKING, Any

from kcache_cli.paths import links_file
from kcache_cli.replace import replace

if TYPE_CHECKING:
    from kcache.speed.machine import Machine


def measure(device: str, quick: bool = True) -> Machine:
    """Measure (:func:`kcache.speed.machine.measure`), and remember the link to the device, if there is one."""
    from kcache.speed import machine as machine

    found = machine.measure(device, quick)
    if found.h2d_gb_s is not None:
        _remember(found.name, found.h2d_gb_s)
    return found


def link_gb_s(device: Any) -> float | None:
    """Bandwidth to a device as last measured on this machine; None if it was not, or if there is no link.

    Parameters
    ----------
    device : torch.device
    """
    if device.type != "cuda":
        return None
    import torch

    speed = _known().get(_key(torch.cuda.get_device_name(device)))
    return speed if isinstance(speed, float) and speed > 0 else None


def _key(device: str) -> str:
    """Home folders may be shared between machines."""
    return f"{platform.node()}: {device}"


def _known() -> dict[str, Any]:
    try:
        found = json.loads(links_file().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(device: str, speed: float) -> None:
    file = links_file()
    with contextlib.suppress(OSError):  # a figure that cannot be kept is measured again
        file.parent.mkdir(parents=True, exist_ok=True)
        replace(file, json.dumps({**_known(), _key(device): speed}, indent=1).encode())

"""Where the command line puts a model: what ``--device`` and ``--device-map`` mean, for accelerate and for planning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from kcache.errors import InputError
from kcache_cli.options import ModelOptions

if TYPE_CHECKING:
    from kcache.planning.fitting import Split


def device_map(model: ModelOptions) -> Any:
    """What ``--device`` or ``--device-map`` says, for accelerate."""
    if model.device_map is None:
        return model.device or "auto"
    from kcache.machine.devices import read_device_map

    if model.device not in (None, "auto"):
        raise InputError(f"--device {model.device} and --device-map exclude each other; use one")
    return read_device_map(model.device_map)


def map_device(model: ModelOptions) -> Any:
    """The torch device a device map puts its first GPU layers on, for planning; the CPU if it has none."""
    import torch

    places = [torch.device(place) for place in device_map(model).values() if place != "disk"]
    return next((place for place in places if place.type == "cuda"), torch.device("cpu"))


def spread_of(model: ModelOptions, device: Any) -> Split:
    """How many GPUs the model will be spread over when this process has it to itself."""
    import torch

    from kcache.machine.devices import SPREADS
    from kcache.planning.fitting import Split

    if device.type != "cuda":
        return Split()
    if model.device_map is not None:
        return Split(gpus=len({str(place) for place in device_map(model).values() if place not in ("cpu", "disk")}))
    return Split(gpus=torch.cuda.device_count() if (model.device or "auto") in SPREADS else 1)


def planning_device(name: str) -> Any:
    """The torch device a ``--device`` means, for planning."""
    import torch

    from kcache.machine.devices import SPREADS

    if name in SPREADS:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name}: not a device; use auto, cpu, cuda, cuda:0, ...") from None
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if not count:
            raise InputError(f"--device {name}: torch sees no CUDA device here; use --device cpu or auto")
        if (device.index or 0) >= count:
            raise InputError(f"--device {name}: there are {count} CUDA devices, cuda:0 to cuda:{count - 1}")
    return device

"""Host memory that the device can read: ordinary RAM registered with the CUDA driver.

torch's own pinned allocator rounds up to powers of two, which for a large V tier wastes up to half the RAM; here the
exact size is allocated and registered, and unregistered when the tensor's memory is released or the process ends.
"""

from __future__ import annotations

import math
import weakref

import torch

from kcache.errors import DoesNotFitError

_PORTABLE = 1  # pinned for every device, not only for the one that is current


def pinned_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """Allocate an uninitialised host tensor and register its memory with the CUDA driver.

    ``device`` is the one that will read it (default: the current one); every other may.

    Raises
    ------
    DoesNotFitError
        If the memory cannot be allocated or registered.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    try:
        tensor = torch.empty(shape, dtype=dtype)
    except RuntimeError as error:
        raise DoesNotFitError(f"could not allocate {nbytes / 2**30:.1f} GiB of host memory for V: {error}") from error
    if nbytes == 0:
        return tensor
    storage = tensor.untyped_storage()
    cudart = torch.cuda.cudart()
    code = int(cudart.cudaHostRegister(storage.data_ptr(), storage.nbytes(), _PORTABLE))
    if code != 0:
        raise DoesNotFitError(
            f"the driver refused to pin {nbytes / 2**30:.1f} GiB of host memory (CUDA error {code}); "
            "use a smaller context or batch, or raise the locked-memory limit (ulimit -l)"
        )
    weakref.finalize(tensor.untyped_storage(), _unregister, storage.data_ptr(), device)
    return tensor


def _unregister(pointer: int, device: torch.device | None) -> None:
    """Unregister, after the device has finished with it: a kernel's reads are invisible to torch's allocator."""
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(pointer)

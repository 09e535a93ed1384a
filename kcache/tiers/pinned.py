"""Host memory that the device can read: ordinary RAM registered with the CUDA driver.

torch's own pinned allocator rounds up to powers of two, which for a large V tier wastes up to half the RAM. Here each
tensor is a mapping of its own, unregistered when it is released or the process ends: the driver locks whole pages, and
would refuse memory of the heap whose page a neighbour has locked. The mapping asks for huge pages, which are locked
faster and keep the device's address translation from missing on every scattered row.
"""

from __future__ import annotations

import math
import mmap
import weakref

import psutil
import torch

from kcache.errors import DoesNotFitError

_HUGE_PAGE = 2 * 2**20
_MAPPED_AND_PORTABLE = 0  # what cudaHostRegisterDefault means under unified addressing: every device may read


def pinned_empty(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None) -> torch.Tensor:
    """Allocate a host tensor and register its memory with the CUDA driver.

    ``device`` is the one that will read it (default: the current one); every other may.

    Raises
    ------
    DoesNotFitError
        If the memory cannot be allocated or registered.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    memory = mapped(nbytes)
    tensor = torch.frombuffer(memory, dtype=dtype, count=nbytes // dtype.itemsize).view(shape)
    cudart = torch.cuda.cudart()
    code = int(cudart.cudaHostRegister(tensor.data_ptr(), len(memory), _MAPPED_AND_PORTABLE))
    if code != 0:
        raise DoesNotFitError(
            f"the driver refused to pin {nbytes / 2**30:.1f} GiB of host memory (CUDA error {code}); "
            "use a smaller context or batch, or raise the locked-memory limit (ulimit -l)"
        )
    # The finaliser holds the mapping, so that it is there until it is unregistered.
    weakref.finalize(tensor.untyped_storage(), _unregister, tensor.data_ptr(), memory, device)
    return tensor


def mapped(nbytes: int) -> mmap.mmap:
    """Return an anonymous mapping of at least ``nbytes``, in huge pages if the system has them.

    Raises
    ------
    DoesNotFitError
        If RAM for it is not free: the system would promise it all the same, and kill the process later.
    """
    size = -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE
    if size >= _HUGE_PAGE:
        size = -(-nbytes // _HUGE_PAGE) * _HUGE_PAGE
    free = psutil.virtual_memory().available
    if size > free:
        raise DoesNotFitError(
            f"V needs {size / 2**30:.1f} GiB of host memory and {free / 2**30:.1f} GiB are free; "
            "use a smaller context or batch"
        )
    try:
        memory = mmap.mmap(-1, size)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)
    except OSError as error:
        raise DoesNotFitError(f"could not allocate {size / 2**30:.1f} GiB of host memory for V: {error}") from error
    return memory


def _unregister(pointer: int, memory: mmap.mmap, device: torch.device | None) -> None:
    """Unregister, after the device has finished with it: a kernel's reads are invisible to torch's allocator."""
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(pointer)

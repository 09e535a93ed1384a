"""Host memory that the device can read: ordinary RAM registered with the CUDA driver.

torch's own pinned allocator rounds up to powers of two, which for a large V tier wastes up to half the RAM. Here each
tensor has pages of its own, unregistered when it is released or the process ends: the driver locks whole pages, and
would refuse memory of the heap whose page a neighbour has locked. The mapping asks for huge pages, which are locked
faster.
"""

from __future__ import annotations

import math
import mmap
import weakref

import torch

from kcache.errors import DoesNotFitError
from kcache.tiers.arena import Arena, Pages, mapped, rounded

_MAPPED_AND_PORTABLE = 0  # what cudaHostRegisterDefault means under unified addressing: every device may read


def pinned_empty(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None, arena: Arena | None = None
) -> torch.Tensor:
    """Allocate a host tensor and register its memory with the CUDA driver.

    ``device`` is the one that will read it (default: the current one); every other may. The memory is a part of
    ``arena``, if that has one prepared.

    Raises
    ------
    DoesNotFitError
        If the memory cannot be allocated or registered.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    taken = None if arena is None else arena.take(nbytes)
    memory, offset = taken or (_brought_in(nbytes, device), 0)
    tensor = torch.frombuffer(memory, dtype=dtype, count=nbytes // dtype.itemsize, offset=offset).view(shape)
    cudart = torch.cuda.cudart()
    code = int(cudart.cudaHostRegister(tensor.data_ptr(), rounded(nbytes), _MAPPED_AND_PORTABLE))
    if code != 0:
        raise DoesNotFitError(
            f"the driver refused to pin {nbytes / 2**30:.1f} GiB of host memory (CUDA error {code}); "
            "use a smaller context or batch, or raise the locked-memory limit (ulimit -l)"
        )
    # The finaliser holds the mapping, so that it is there until it is unregistered.
    weakref.finalize(tensor.untyped_storage(), _unregister, tensor.data_ptr(), memory, device)
    return tensor


def _brought_in(nbytes: int, device: torch.device | None) -> mmap.mmap:
    """A mapping of its own, whose pages are there."""
    pages = Pages(mapped(nbytes), device)
    pages.wait()
    return pages.memory


def _unregister(pointer: int, memory: mmap.mmap, device: torch.device | None) -> None:
    """Unregister, after the device has finished with it: a kernel's reads are invisible to torch's allocator."""
    torch.cuda.synchronize(device)
    torch.cuda.cudart().cudaHostUnregister(pointer)

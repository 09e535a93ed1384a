"""Host memory that the device can read: ordinary RAM registered with the CUDA driver.

torch's own pinned allocator rounds up to powers of two, which for a large V tier wastes up to half the RAM. Here each
tensor has pages of its own, since the driver locks whole pages and would refuse memory of the heap whose page a
neighbour has locked; they are unregistered when it is released and nobody keeps them, or the process ends. The mapping
asks for huge pages, which are locked faster.
"""

from __future__ import annotations

import math
import mmap
import weakref
from contextlib import suppress

import torch

from kcache.errors import DoesNotFitError
from kcache.tiers.arena import Arena, Pages, mapped, rounded
from kcache.tiers.spare import Part, Spare

_MAPPED_AND_PORTABLE = 0  # what cudaHostRegisterDefault means under unified addressing: every device may read


def pinned_empty(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None, arena: Arena | None = None
) -> torch.Tensor:
    """Allocate a host tensor and register its memory with the CUDA driver.

    ``device`` is the one that will read it (default: the arena's, or the current one); every other may. The memory is a
    part of ``arena``, if that has one prepared, or what another cache has left.

    Raises
    ------
    DoesNotFitError
        If the memory cannot be allocated or registered.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes == 0:
        return torch.empty(shape, dtype=dtype)
    spare = None
    if arena is not None:
        device, spare = device or arena.device, arena.spare
    part = None if spare is None else spare.take(rounded(nbytes), device)
    if part is None:
        part = _registered(nbytes, device, arena)
    tensor = torch.frombuffer(
        part.memory, dtype=dtype, count=nbytes // dtype.itemsize, offset=part.offset
    ).view(shape)  # fmt: skip
    # The finaliser holds the mapping, so that it is there until it is unregistered.
    weakref.finalize(tensor.untyped_storage(), _leave, part, None if spare is None else weakref.ref(spare))
    return tensor


def _registered(nbytes: int, device: torch.device | None, arena: Arena | None) -> Part:
    """Memory that nobody had before."""
    taken = None if arena is None else arena.take(nbytes)
    memory, offset = taken or (_brought_in(nbytes, device, None if arena is None else arena.spare), 0)
    pointer = torch.frombuffer(memory, dtype=torch.uint8, count=1, offset=offset).data_ptr()
    code = int(torch.cuda.cudart().cudaHostRegister(pointer, rounded(nbytes), _MAPPED_AND_PORTABLE))
    if code != 0:
        _take_note_of_error(device)
        raise DoesNotFitError(
            f"the driver refused to pin {nbytes / 2**30:.1f} GiB of host memory (CUDA error {code}); "
            "use a smaller context or batch, or raise the locked-memory limit (ulimit -l)"
        )
    return Part(memory, offset, rounded(nbytes), pointer, device)


def _take_note_of_error(device: torch.device | None) -> None:
    """The driver keeps what it has refused as an error that the next launch, whosever that is, would raise."""
    with suppress(RuntimeError, AssertionError):  # the latter where torch has been built without CUDA
        torch.zeros(1, device=device or "cuda")


def _brought_in(nbytes: int, device: torch.device | None, spare: Spare | None) -> mmap.mmap:
    """A mapping of its own, whose pages are there."""
    try:
        memory = mapped(nbytes)
    except DoesNotFitError:
        if spare is None or not spare.nbytes:
            raise
        spare.release()
        memory = mapped(nbytes)
    pages = Pages(memory, device)
    pages.wait()
    return pages.memory


def _leave(part: Part, spare: weakref.ref[Spare] | None) -> None:
    """Keep what a tensor leaves for the next, where there is somebody who does."""
    kept = None if spare is None else spare()
    if kept is None:
        part.unregister()
    else:
        kept.keep(part)

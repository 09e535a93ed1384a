"""Decode steps on the CPU, compiled on first use by Numba: K is read once, at the speed of memory.

No torch operator reads 16-bit K in place: a matrix product repacks it every step, and without AVX-512 it falls back to
code ten times slower than the memory. These kernels widen rows to fp32 in registers and need no compiler on the
machine, only Numba's wheels. Where Numba is missing, :class:`~kcache.backends.cpu.CpuBackend` does the same in torch.

``bits`` is what Numba lacks, ``rows`` the products, ``verbs`` what is done to a piece of a head, ``regions`` the decode
steps made of them, ``entries`` their machine code, ``team`` the threads, ``steps`` what the backend calls. A prompt's
attention is ``tiles`` of products, ``prompt`` the region made of them, and ``prefill``, which exact attention calls.
"""

from __future__ import annotations

import importlib
from functools import lru_cache


@lru_cache
def has_numba() -> bool:
    """Whether Numba is there and works: one that is too old for NumPy, say, is as good as none."""
    try:
        importlib.import_module("kcache.backends.jit.steps")
    except ImportError:
        return False
    return True

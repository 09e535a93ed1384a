"""The Triton backend: the four verbs of a decode step as CUDA kernels, one file each.

``score`` reads K once per KV group, ``select`` finds the exact TopN without sorting and ``above`` the rows over a
threshold, ``gather`` fetches rows straight from pinned host memory and combines them with what ``tail`` has summed,
``append`` stores a token without a copy call; ``decode`` is dense attention for resident layers; ``pointwise`` has what
a model computes between its matrix products, for recorded steps. Everything runs on CPU tensors in Triton's interpreter
(``TRITON_INTERPRET=1``).
"""

from __future__ import annotations

from kcache.backends.triton.append import append
from kcache.backends.triton.common import Chip, chip_of
from kcache.backends.triton.decode import DenseWorkspace, dense_decode
from kcache.backends.triton.hot import HotRows
from kcache.backends.triton.step import triton_decode
from kcache.backends.triton.tuning import Tuning
from kcache.backends.triton.workspace import Workspace, unsupported

__all__ = [
    "Chip", "DenseWorkspace", "HotRows", "Tuning", "Workspace", "append", "chip_of", "dense_decode", "triton_decode",
    "unsupported",
]  # fmt: skip

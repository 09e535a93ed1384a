"""Cards that kernels are compiled for where there are none, by their compute capability."""

from __future__ import annotations

from kcache.backends.triton import Chip

CHIPS = {
    80: Chip(108, 163 * 1024, 40 * 2**20, 80),  # A100
    89: Chip(128, 99 * 1024, 72 * 2**20, 89),  # RTX 4090, L40S
    90: Chip(),  # H100, H200
    100: Chip(148, 227 * 1024, 126 * 2**20, 100),  # B200
    120: Chip(170, 99 * 1024, 96 * 2**20, 120),  # RTX 5090
}

"""Speeds of well-known GPUs, for plans about machines that are not at hand.

Memory bandwidth and dense bf16 tensor throughput are the vendors' datasheet figures (NVIDIA product briefs and
datasheets of each card); the link is PCIe x16 as the standard has it, per direction. What software achieves of them are
the efficiencies below, the same for all cards: a plan is a prediction, and ``kcache bench`` measures. Memory is what
drivers report of a card, with error correction where it cannot be done without, less what a process takes of it before
it has allocated anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from kcache.errors import InputError

MEMORY_EFFICIENCY = 0.87
LINK_EFFICIENCY = 0.80
GATHER_EFFICIENCY = 0.70
COMPUTE_EFFICIENCY = 0.60
LAYER_MS = 0.03
"""Of a layer in a recorded step, beside its reads: small kernels, and what waits for one read after another. An H200
took 0.02 to 0.03 with exact attention, and with KCache 0.03 at large batches, twice that at small ones
(docs/plan.md)."""
CONTEXT_GIB = 0.5
"""What a process takes of a card before it has allocated anything, about."""

_PCIE4, _PCIE5 = 31.5, 63.0


@dataclass(frozen=True)
class Card:
    """A GPU by its datasheet.

    Attributes
    ----------
    name, product : str
        What to type, and what it is.
    memory_gib : float
        As its driver reports it, about.
    datasheet_memory_gb_s, datasheet_link_gb_s, datasheet_tflops : float
        Memory bandwidth, host link per direction, dense bf16 with fp32 accumulation.
    """

    name: str
    product: str
    memory_gib: float
    datasheet_memory_gb_s: float
    datasheet_link_gb_s: float
    datasheet_tflops: float

    @property
    def device_bytes(self) -> int:
        """Device memory in bytes, as far as it can be had."""
        return int((self.memory_gib - CONTEXT_GIB) * 2**30)

    @property
    def memory_gb_s(self) -> float:
        """Memory bandwidth as achieved."""
        return self.datasheet_memory_gb_s * MEMORY_EFFICIENCY

    @property
    def host_only(self) -> bool:
        """A card has memory of its own."""
        return False

    @property
    def product_gb_s(self) -> float:
        """What products with single rows read: as fast as memory."""
        return self.memory_gb_s

    @property
    def layer_ms(self) -> float:
        """Time of a layer beside its reads."""
        return LAYER_MS

    @property
    def h2d_gb_s(self) -> float:
        """Large copies over the link as achieved."""
        return self.datasheet_link_gb_s * LINK_EFFICIENCY

    @property
    def gather_gb_s(self) -> float:
        """Single rows over the link as achieved."""
        return self.datasheet_link_gb_s * GATHER_EFFICIENCY

    @property
    def compute_tflops(self) -> float:
        """Matrix products as achieved."""
        return self.datasheet_tflops * COMPUTE_EFFICIENCY


CARDS = (
    Card("b200", "NVIDIA B200 SXM 180 GB", 178.3, 8000, _PCIE5, 2250),
    Card("h200", "NVIDIA H200 SXM 141 GB", 139.8, 4800, _PCIE5, 989),
    Card("h100", "NVIDIA H100 SXM 80 GB", 79.1, 3350, _PCIE5, 989),
    Card("h100-nvl", "NVIDIA H100 NVL 94 GB", 93.0, 3900, _PCIE5, 835),
    Card("h100-pcie", "NVIDIA H100 PCIe 80 GB", 79.1, 2000, _PCIE5, 756),
    Card("a100", "NVIDIA A100 SXM 80 GB", 79.1, 2039, _PCIE4, 312),
    Card("a100-40gb", "NVIDIA A100 SXM 40 GB", 39.4, 1555, _PCIE4, 312),
    Card("l40s", "NVIDIA L40S 48 GB", 44.4, 864, _PCIE4, 362),
    Card("a10", "NVIDIA A10 24 GB", 22.0, 600, _PCIE4, 125),
    Card("l4", "NVIDIA L4 24 GB", 22.0, 300, _PCIE4, 121),
    Card("rtx5090", "NVIDIA GeForce RTX 5090 32 GB", 31.3, 1792, _PCIE5, 209),
    Card("rtx4090", "NVIDIA GeForce RTX 4090 24 GB", 23.6, 1008, _PCIE4, 165),
    Card("rtx3090", "NVIDIA GeForce RTX 3090 24 GB", 23.6, 936, _PCIE4, 71),
)


def find_card(name: str) -> Card:
    """Return the card called ``name``, in whatever case and punctuation.

    Raises
    ------
    InputError
        Naming the cards there are.
    """
    wanted = _plain(name)
    for card in CARDS:
        if wanted in (_plain(card.name), _plain(card.name).removeprefix("rtx"), f"{_plain(card.name)}sxm"):
            return card
    known = ", ".join(card.name for card in CARDS)
    raise InputError(f"no figures for a GPU called {name!r}; known are {known}")


def _plain(name: str) -> str:
    text = "".join(letter for letter in name.lower() if letter.isalnum())
    return text.removeprefix("nvidia").removeprefix("geforce").removesuffix("80gb").removesuffix("141gb")

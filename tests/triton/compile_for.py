"""Compile every kernel for a card on a machine without a GPU, through the very host code that launches them.

Run as ``python -m tests.triton.compile_for 90``, with the names of configurations if not all are wanted, in a process
without ``TRITON_INTERPRET``. Prints one JSON line per kernel: shared memory, registers, spills, and which wide loads
and matrix instructions the machine code holds.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

os.environ.pop("TRITON_INTERPRET", None)

import torch
import triton

from benchmarks.precompile import compile_only
from kcache.backends.triton import Chip, Tuning
from tests.triton.chips import CHIPS

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
LLAMA3 = {"batch": 8, "kv_heads": 8, "group": 4, "dim": 128, "topn": 128, "capacity": 32768}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama-3.1-8b": LLAMA3,
    "llama-3.1-8b, even": {**LLAMA3, "spread": "even"},
    "llama-3.1-8b hot padded": {**LLAMA3, "hot": 512, "padded": True},
    "llama-3.1-8b, 8 bits": {**LLAMA3, "hot": 256, "bits": 8},
    "llama-3.1-8b, two planes": {**LLAMA3, "hot": 512, "padded": True, "bits": "8+8"},
    "llama-3.1-8b hot, even": {**LLAMA3, "hot": 512, "spread": "even"},
    "llama-2-7b": {**LLAMA3, "kv_heads": 32, "group": 1, "capacity": 15360},
    "gemma-like": {**LLAMA3, "group": 2, "dim": 256, "softcap": 50.0, "padded": True},
    "gpt-oss-like": {**LLAMA3, "group": 8, "dim": 64, "sinks": True},
    "gpt-oss-like, two planes": {**LLAMA3, "group": 8, "dim": 64, "sinks": True, "hot": 512, "bits": "8+8"},
    "group of 16": {**LLAMA3, "kv_heads": 2, "group": 16},
    "batch 1, 128k": {**LLAMA3, "batch": 1, "capacity": 131072},
    "fp16, head size 80, renormalised": {
        **LLAMA3, "dim": 80, "group": 3, "dtype": torch.float16, "tail": "renormalise",
    },
    "paper": {**LLAMA3, "select": "head", "tail": "none", "spread": "even"},
    "fp32": {**LLAMA3, "dim": 64, "dtype": torch.float32, "topn": 64},
    "fp32, head size 128": {**LLAMA3, "dtype": torch.float32},
    "head size 256, hot, 8 bits": {**LLAMA3, "group": 2, "dim": 256, "hot": 512, "bits": 8},
    "all directions": {**LLAMA3, "dim": 256, "hot": 512, "rank": 256},
}  # fmt: skip


def resources(kernel: Any) -> dict[str, Any]:
    """What the assembler and the machine code say about a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        usage = subprocess.run(
            [BIN / "cuobjdump", "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run([BIN / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
    found = {key.lower(): int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    whole = "LDG|LDGSTS|HGMMA|IGMMA|HMMA|WARPGROUP|LDL|STL|UTMALDG"
    ops = Counter(re.findall(rf"\b((?:{whole})[.\w]*|STG\.E\.128|STG\.E\.64|STG\.E)\b", sass))
    said = {name: getattr(kernel.metadata, name) for name in ("shared", "num_warps", "enable_fp_fusion")}
    return {**said, **found, "ops": dict(ops)}


def main(chip: Chip, names: list[str]) -> None:
    """Compile the named configurations, or all."""
    from tests.triton import launch_all

    for name in names or list(CONFIGS):
        with compile_only(chip.capability) as compiled:
            launch_all.launch_all(**CONFIGS[name], tuning=Tuning(chip=chip))
        for kernel_name, kernel in compiled:
            print(json.dumps({"config": name, "kernel": kernel_name, **resources(kernel)}), flush=True)


if __name__ == "__main__":
    main(CHIPS[int(sys.argv[1])], sys.argv[2:])

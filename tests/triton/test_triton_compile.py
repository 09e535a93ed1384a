"""Every kernel compiles without a GPU, fits the card, keeps its data in registers and uses the instructions meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import pytest

from tests.triton.chips import CHIPS


def compile_for(capability: int, config: str) -> dict[str, dict[str, Any]]:
    """What is said of each kernel, by its name."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["TRITON_DEFAULT_FP_FUSION"] = "0"  # as Triton 3.10 will have it
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton.compile_for", str(capability), config],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels = {line["kernel"]: line for line in map(json.loads, done.stdout.splitlines())}
    for name, kernel in kernels.items():
        assert kernel["stack"] <= 128, f"{name} spills {kernel['stack']} bytes"
        assert kernel["enable_fp_fusion"] or name == "rotate_kernel", f"{name} adds a product in two steps"
        assert kernel["shared"] <= CHIPS[capability].shared_bytes, name
        assert not any("TF32" in op for op in kernel["ops"]), f"{name} multiplies in tf32"
    return kernels


@pytest.mark.parametrize(
    "config",
    [
        "llama-3.1-8b hot padded",
        "group of 16",
        "llama-3.1-8b, 8 bits",
        "llama-3.1-8b, two planes",
        "llama-3.1-8b hot, even",
        "all directions",
    ],
)
def test_triton_kernels_compile_for_sm90(config: str) -> None:
    kernels = compile_for(90, config)
    names = (
        "append", "step", *(["fetch"] if "even" in config else []), "decode", "norm", "rotate", "gated", "prompt",
        *(["span"] if "padded" in config or "two planes" in config else []),
        *(["narrow", "widen"] if "8 bits" in config or "two planes" in config else []),
    )  # fmt: skip
    assert set(kernels) == {f"{name}_kernel" for name in names}
    step = kernels["step_kernel"]
    product = "IGMMA" if "8 bits" in config or "two planes" in config else "HGMMA"
    assert any(op.startswith(product) for op in step["ops"])
    copies = {op: count for op, count in step["ops"].items() if op.startswith("LDGSTS")}
    assert copies.pop("LDGSTS.E.BYPASS.128") >= 24
    assert sum(copies.values()) <= 6, "only what is a few numbers to a tile is copied in less than 16 bytes at a time"
    far = kernels["fetch_kernel" if "even" in config else "step_kernel"]["ops"]["LDG.E.128.STRONG.GPU"]
    assert far > 0, "rows come over the link in 16-byte loads"
    assert step["ops"]["LDG.E.128"] > 0, "and those of the tail out of device memory"
    assert step["reg"] * step["num_warps"] * 32 * 2 <= 65536, "two programs fit a multiprocessor"
    prompt = kernels["prompt_kernel"]["ops"]
    assert any(op.startswith("HGMMA") for op in prompt)
    assert any(op.startswith("LDGSTS.E.BYPASS.128") for op in prompt)
    products = sum(count for op, count in prompt.items() if op.startswith("HGMMA"))
    assert prompt["WARPGROUP.DEPBAR.LE"] * 2 < products, "none waits for the one before it"
    for name in ("norm", "gated"):
        assert kernels[f"{name}_kernel"]["ops"]["LDG.E.128"] >= 2, name
        assert kernels[f"{name}_kernel"]["ops"]["STG.E.128"] >= 1, name


@pytest.mark.parametrize(
    ("capability", "config"),
    [
        (80, "gpt-oss-like"),
        (80, "llama-3.1-8b, two planes"),
        (89, "llama-3.1-8b, two planes"),
        (89, "fp32, head size 128"),
        (90, "gpt-oss-like, two planes"),
        (120, "llama-3.1-8b, two planes"),
    ],
)
def test_triton_kernels_fit_other_cards(capability: int, config: str) -> None:
    kernels = compile_for(capability, config)
    step, room = kernels["step_kernel"], CHIPS[capability].shared_bytes
    assert step["shared"] * 2 <= room, "two programs fit a multiprocessor"
    assert step["reg"] * step["num_warps"] * 32 * 2 <= 65536

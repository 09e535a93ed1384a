"""Every kernel compiles for sm_90 without a GPU, keeps its data in registers and uses the instructions meant."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize("config", ["llama-3.1-8b hot padded", "gemma-like"])
def test_triton_kernels_compile_for_sm90(config: str) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    done = subprocess.run(
        [sys.executable, "-m", "tests.triton.compile_sm90", config],
        capture_output=True, text=True, env=environment, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    kernels = {line["kernel"]: line for line in map(json.loads, done.stdout.splitlines())}
    assert set(kernels) == {
        "append_kernel", "score_kernel", "weight_kernel", "select_kernel", "gather_kernel", "decode_kernel",
    }  # fmt: skip
    for name, kernel in kernels.items():
        assert kernel["stack"] <= 64, f"{name} spills {kernel['stack']} bytes"
        assert kernel["shared"] <= 227 * 1024, name
    assert any(op.startswith("HGMMA") for op in kernels["score_kernel"]["ops"])
    assert kernels["score_kernel"]["ops"]["LDGSTS.E.BYPASS.128"] > 0
    assert kernels["gather_kernel"]["ops"]["LDG.E.128.STRONG.GPU"] > 0

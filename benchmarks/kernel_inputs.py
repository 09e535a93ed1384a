"""Shapes and tensors of the kernel benchmark, and the compilation of its kernels in parallel processes.

A shape's tensors come filled, to be timed, or unwritten on the CPU, to be compiled for: the host code that launches is
the same for both, so what was compiled ahead is found in Triton's cache.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.precompile import compile_only
from kcache.backends.base import LowRank
from kcache.backends.triton import Chip, DenseWorkspace, HotRows, Tuning, Workspace, append, dense_decode
from kcache.backends.triton.inputs import Results, StepInputs
from kcache.backends.triton.step import Step
from kcache.planning.sizes import rank_of
from kcache.policy import Spread
from kcache.tiers.lowrank import LowRankTail

SHARDS = 12


@dataclass(frozen=True)
class Case:
    """A shape to time."""

    name: str
    batch: int
    kv_heads: int
    group: int
    length: int
    dim: int = 128
    topn: int = 128

    @property
    def rows(self) -> int:
        """Rows of work, ``B * Hkv``."""
        return self.batch * self.kv_heads

    @property
    def kv_bytes(self) -> int:
        """Bytes of K, and of V, in bf16."""
        return self.rows * self.length * self.dim * 2

    @property
    def tail_bytes(self) -> int:
        """Bytes that combine reads for the tail: coefficients in bf16, and the scores."""
        return self.rows * self.length * (2 * rank_of(None, self.dim) + 4 * self.group)


CASES = [
    Case("llama-3.1-8b, batch 8, 32k", 8, 8, 4, 32768),
    Case("llama-3.1-8b, batch 1, 128k", 1, 8, 4, 131072),
    Case("llama-2-7b, batch 4, 15k", 4, 32, 1, 15360),
]


class Inputs:
    """The tensors of a case. ``fill=False`` leaves them unwritten: for compiling only."""

    def __init__(self, case: Case, device: torch.device, host: torch.Tensor, fill: bool = True, queries: int = 8):
        shape = (case.batch, case.kv_heads, case.length, case.dim)
        make = torch.randn if fill else torch.empty
        options: Any = {"dtype": torch.bfloat16, "device": device}
        heads = case.kv_heads * case.group
        self.case, self.device = case, device
        self.queries = [make(case.batch, heads, case.dim, **options) for _ in range(queries if fill else 1)]
        if fill:
            self.queries = [query * 2 for query in self.queries]
        self.keys, self.near = make(shape, **options), make(shape, **options)
        self.values = host[: case.rows * case.length * case.dim].view(shape)
        if fill:
            self.values.copy_(self.near)
        self.length = torch.full((1,), case.length, dtype=torch.int32, device=device)
        self.token = make(case.batch, case.kv_heads, case.dim, **options)
        self.scaling = case.dim**-0.5
        self.lowrank = self._tail(fill)
        self.tally = torch.zeros(case.batch, dtype=torch.int64, device=device)
        self.thresholds = [self._threshold(query) if fill else torch.empty(case.batch) for query in self.queries]

    def _tail(self, fill: bool) -> LowRank:
        """The low-rank tail of V."""
        rank, shape = rank_of(None, self.case.dim), (self.case.batch, self.case.kv_heads)
        if fill:
            tail = LowRankTail(rank, self.device)
            tail.append(self.near, None, 0)
            return tail.state()
        base, basis = torch.empty(*shape, self.case.dim), torch.empty(*shape, rank, self.case.dim)
        return LowRank(base, basis, torch.empty(*shape, rank, self.case.length, dtype=torch.bfloat16))

    def _threshold(self, query: torch.Tensor) -> torch.Tensor:
        """The threshold ``[B]`` above which each sequence has N rows per KV head."""
        case, found = self.case, []
        for one, keys in zip(query, self.keys, strict=True):
            scores = torch.matmul(one.view(case.kv_heads, case.group, case.dim).float(), keys.float().transpose(1, 2))
            weights = (scores * self.scaling).softmax(-1).amax(1)
            found.append(weights.flatten().topk(case.topn * case.kv_heads).values[-1])
        return torch.stack(found)

    def workspace(self, tuning: Tuning, spread: Spread = "need") -> Workspace:
        """Scratch for the TopN step."""
        case = self.case
        return Workspace(
            case.batch, case.kv_heads, case.group, case.dim, case.dim, case.length, case.topn, self.device,
            spread=spread, itemsize=2, tuning=tuning,
        )  # fmt: skip

    def step(self, workspace: Workspace, index: int, hot: HotRows | None = None) -> Step:
        """A step, for one of the queries."""
        query, above = self.queries[index], workspace.spread == "need"
        inputs = StepInputs(
            query, self.keys, self.values, self.length, self.scaling, torch.empty_like(query), self.lowrank,
            threshold=self.thresholds[index] if above else None, tally=self.tally if above else None,
        )  # fmt: skip
        rows = self.case.rows
        picks = torch.empty(rows, workspace.width, dtype=torch.int32, device=self.device)
        results = Results(
            picks, torch.empty(rows, self.case.group, device=self.device), torch.empty(picks.shape, device=self.device)
        )
        return Step(workspace, inputs, results, hot)

    def scores(self, step: Step) -> None:
        """Score, and no more."""
        step.launch(0, fetches=False)
        step.ws.done.zero_()

    def scores_and_tail(self, step: Step) -> None:
        """Score and sum the tail."""
        step.launch(step.shares, fetches=False)
        step.ws.done.zero_()
        step.ws.tickets.zero_()

    def hot(self) -> HotRows:
        """A store of hot rows."""
        return HotRows(self.case.batch, self.case.kv_heads, 1024, self.case.dim, torch.bfloat16, self.device)

    def dense(self, tuning: Tuning) -> Callable[[torch.Tensor], torch.Tensor]:
        """A dense step over K and V in device memory."""
        case = self.case
        workspace = DenseWorkspace(
            case.batch, case.kv_heads, case.group, case.dim, case.dim, case.length, self.device, itemsize=2,
            tuning=tuning,
        )  # fmt: skip
        return lambda query: dense_decode(
            query, self.keys, self.near, self.length, scaling=self.scaling, workspace=workspace
        )

    def append(self) -> None:
        """Store a token in the last place."""
        append(self.token, self.token, self.keys, self.values, self.length, offset=-1, lowrank=self.lowrank)


def compile_shard(shard: int, cases: list[Case], chip: Chip) -> None:
    """Compile this shard's share of all kernels into Triton's cache, without touching the device."""
    cpu, host = torch.device("cpu"), torch.empty(max(case.kv_bytes for case in cases) // 2, dtype=torch.bfloat16)
    base = Tuning(chip=chip)
    jobs = [
        (case, stage, base) for case in cases for stage in ("step", "hot", "scores", "tail", "even", "dense", "append")
    ]
    with compile_only(chip.capability):
        for case, stage, tuning in jobs[shard::SHARDS]:
            inputs = Inputs(case, cpu, host, fill=False)
            if stage == "dense":
                inputs.dense(tuning)(inputs.queries[0])
            elif stage == "append":
                inputs.append()
            elif stage == "scores":
                inputs.scores(inputs.step(inputs.workspace(tuning), 0))
            elif stage == "tail":
                inputs.scores_and_tail(inputs.step(inputs.workspace(tuning), 0))
            else:
                workspace = inputs.workspace(tuning, "even" if stage == "even" else "need")
                inputs.step(workspace, 0, inputs.hot() if stage == "hot" else None).run()


def precompile(arguments: list[str]) -> float:
    """Run all shards; a shard that fails only means that its kernels compile later. Returns seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "benchmarks.kernels", *arguments, "--compile-shard"]
    unseen = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    running = [
        subprocess.Popen([*command, str(shard)], stderr=subprocess.DEVNULL, env=unseen) for shard in range(SHARDS)
    ]
    failed = sum(process.wait() != 0 for process in running)
    if failed:
        print(f"{failed} of {SHARDS} compile shards failed", flush=True)
    return time.perf_counter() - began

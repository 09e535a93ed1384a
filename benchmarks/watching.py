"""What being watched costs a decode step: ratios of step times within one process, by who is watching.

    python -m benchmarks.watching [--output docs/benchmarks/watching.json]

One model, one cache over real text, and turns of a few decode steps each, taken in a new order every round: with
nothing published, published without a viewer, with a viewer attached over the socket that reads at the dashboard's
rate (a process of its own, as `kcache inspect` is), recorded; and once more with nothing published, which shows what
the measurement itself is worth. A turn's figure is its mean step, so that a frame now and then counts too; a round
gives each way a ratio to its unpublished turns, and what is printed is the median over rounds, an interval for that
median, and quartiles. Beside it stands processor time per step, which other programs disturb less: of the thread that
decodes, of the publisher's thread, of the viewer's process. With as many threads as processors, as torch chooses,
they compete with the engine; --threads leaves them one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

WAYS = ("none", "none again", "published", "viewer", "recording")
TARGETS = {"published": 1.01, "viewer": 1.03}
_SETTLE_STEPS = 2


def main() -> None:
    """Measure, print a table, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--ctx", type=int, default=4096, help="tokens before the first step")
    parser.add_argument("--steps", type=int, default=16, help="steps of a turn that are timed")
    parser.add_argument("--seconds", type=float, default=120.0, help="how long to measure, the prefill aside")
    parser.add_argument("--threads", type=int, help="of torch; default: its own choice")
    parser.add_argument("--rate", type=float, default=5.0, help="frames per second the viewer asks for")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--view", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.view:
        view(options.rate)
        return
    result = measure(options)
    print(table(result))
    if options.output is not None:
        scratch = options.output.with_suffix(".tmp")
        scratch.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        scratch.replace(options.output)


def view(rate_hz: float) -> None:
    """Be the viewer: attach to each socket named on standard input and read until told to leave it."""
    from kcache.watch.attach import Place, attach

    source, began_s = None, 0.0
    for line in sys.stdin:
        if source is not None:
            seen, spent_s = len(source.span()), time.process_time() - began_s
            source.close()
            print(seen, spent_s, flush=True)
            source = None
        if name := line.strip():
            source = attach(Place(Path(name)))
            source.ask(rate_hz=rate_hz, picks=True)
            source.wait(5.0)
            began_s = time.process_time()
            print("attached", flush=True)


class Viewer:
    """The process that watches."""

    def __init__(self, rate_hz: float) -> None:
        command = [sys.executable, "-m", "benchmarks.watching", "--view", "--rate", str(rate_hz)]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        self.frames, self.spent_s = 0, 0.0

    def _say(self, line: str) -> str:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline().strip()

    @contextmanager
    def watching(self, path: Path) -> Iterator[None]:
        """Watch the socket while the body runs."""
        if self._say(str(path)) != "attached":
            raise RuntimeError("the viewer could not attach")
        try:
            yield
        finally:
            frames, spent_s = self._say("").split()
            self.frames, self.spent_s = self.frames + int(frames), self.spent_s + float(spent_s)

    def close(self) -> None:
        """End it."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=10)


@dataclass
class Turn:
    """What a turn took: mean seconds a step, and processor seconds of the engine's and the publisher's thread."""

    step_s: float
    engine_s: float
    watch_s: float


class Steps:
    """Decode steps over the same context again and again."""

    def __init__(self, options: argparse.Namespace) -> None:
        import torch

        import kcache
        from kcache.bench.context import reference_prose
        from kcache.decoding.forward import prefill

        if options.threads:
            torch.set_num_threads(options.threads)
        self.lm = kcache.load(options.model)
        text = reference_prose()[: options.ctx * 8]
        ids = torch.tensor([self.lm.tokenizer(text)["input_ids"][: options.ctx]], device=self.lm.device)
        self.cache = kcache.KCache(self.lm.model, kcache.Policy())
        with kcache.attach(self.lm.model), torch.inference_mode():
            *_, (logits, _) = prefill(self.lm.model, self.cache, ids, None)
        self._first = logits.argmax(-1)[:, None]

    def turn(self, count: int) -> Turn:
        """Run ``count`` steps; the cache is cut back afterwards."""
        import torch

        from kcache.decoding.forward import step_logits

        token, clock = self._first, watch_clock()
        began = engine = watch = 0.0
        with torch.inference_mode():
            for number in range(count + _SETTLE_STEPS):
                if number == _SETTLE_STEPS:
                    began, engine, watch = time.perf_counter(), time.thread_time(), clock()
                token = step_logits(self.lm.model, self.cache, token).argmax(-1)[:, None]
                if token.is_cuda:
                    torch.cuda.synchronize()
        turn = Turn((time.perf_counter() - began) / count, time.thread_time() - engine, clock() - watch)
        self.cache.crop(-(count + _SETTLE_STEPS))
        return turn


def watch_clock() -> Callable[[], float]:
    """Processor seconds of the publisher's thread."""
    for thread in threading.enumerate():
        if thread.name == "kcache-watch" and thread.ident is not None:
            clock = time.pthread_getcpuclockid(thread.ident)
            return lambda: time.clock_gettime(clock)
    return lambda: 0.0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Take turns until the time is up."""
    from kcache.attaching import attach
    from kcache.bench.env import surroundings

    steps, viewer, order = Steps(options), Viewer(options.rate), random.Random(0)
    rounds: list[dict[str, Turn]] = []
    watched_s = 0.0
    with tempfile.TemporaryDirectory() as folder, attach(steps.lm.model):
        until = time.monotonic() + options.seconds
        while time.monotonic() < until:
            turns: dict[str, Turn] = {}
            for way in order.sample(WAYS, len(WAYS)):
                record = Path(folder) / f"{len(rounds)}.kcr" if way == "recording" else None
                with ExitStack() as stack:
                    publication = stack.enter_context(published(steps, way, record))
                    if way == "viewer":
                        stack.enter_context(viewer.watching(publication.path))
                    began = time.monotonic()
                    turns[way] = steps.turn(options.steps)
                    watched_s += time.monotonic() - began if way == "viewer" else 0.0
            rounds.append(turns)
        size = sum(path.stat().st_size for path in Path(folder).iterdir()) / len(rounds)
    viewer.close()
    return {
        "env": surroundings(steps.lm.device),
        "model": options.model,
        "ctx": options.ctx,
        "steps_per_turn": options.steps,
        "rounds": len(rounds),
        "viewer_hz": round(viewer.frames / watched_s, 2),
        "recording_bytes_per_turn": round(size),
        "viewer_ms": round(viewer.spent_s / len(rounds) / (options.steps + _SETTLE_STEPS) * 1e3, 3),
        "ways": {way: figures(rounds, way, options.steps) for way in WAYS},
    }


@contextmanager
def published(steps: Steps, way: str, record: Path | None) -> Iterator[Any]:
    """Publish as the way asks for."""
    from kcache import publish

    if way.startswith("none"):
        yield None
        return
    with publish(steps.lm, command="watching", record=record) as publication:
        yield publication


def figures(rounds: list[dict[str, Turn]], way: str, steps: int) -> dict[str, Any]:
    """Milliseconds per step, the ratio to nothing published, and processor time per step."""
    alone = [(turns["none"].step_s + turns["none again"].step_s) / 2 for turns in rounds]
    if way.startswith("none"):  # one against the other
        alone = [turns["none again" if way == "none" else "none"].step_s for turns in rounds]
    ratios = [turns[way].step_s / other for turns, other in zip(rounds, alone, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
    left, right = interval(ratios)
    return {
        "step_ms": round(statistics.median(turns[way].step_s for turns in rounds) * 1e3, 3),
        "ratio": round(middle, 4),
        "ratio_quartiles": [round(low, 4), round(high, 4)],
        "ratio_95": [round(left, 4), round(right, 4)],
        "engine_ms": round(statistics.median(turns[way].engine_s for turns in rounds) / steps * 1e3, 3),
        "watch_ms": round(statistics.median(turns[way].watch_s for turns in rounds) / steps * 1e3, 3),
    }


def interval(values: list[float], samples: int = 2000) -> tuple[float, float]:
    """A 95 % bootstrap interval for the median."""
    draw = random.Random(1)
    medians = sorted(statistics.median(draw.choices(values, k=len(values))) for _ in range(samples))
    return medians[samples // 40], medians[-samples // 40 - 1]


def table(result: dict[str, Any]) -> str:
    """The figures as Markdown."""
    cores = f"{result['env']['threads']} threads on {result['env']['cores']} cores"
    lines = [
        f"{result['model']}, {result['ctx']:,} tokens, {result['rounds']} rounds of {result['steps_per_turn']} steps, "
        f"viewer at {result['viewer_hz']} frames/s, {cores}",
        "",
        "| watched by | ms/step | slower by | 95 % interval | quartiles | wanted | engine, ms CPU | publisher |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for way, row in result["ways"].items():
        sure, rounds = (_percents(row[name]) for name in ("ratio_95", "ratio_quartiles"))
        wanted = f"< {(TARGETS[way] - 1) * 100:.0f} %" if way in TARGETS else ""
        spent = f"{row['engine_ms']:.2f} | {row['watch_ms']:.2f}"
        slower = _percents([row["ratio"]])
        lines.append(f"| {way} | {row['step_ms']:.2f} | {slower} % | {sure} | {rounds} | {wanted} | {spent} |")
    lines += ["", f"viewer: {result['viewer_ms']:.2f} ms of processor time a step"]
    return "\n".join(lines)


def _percents(ratios: list[float]) -> str:
    return " to ".join(f"{(ratio - 1) * 100:+.1f}" for ratio in ratios)


if __name__ == "__main__":
    main()

"""A source made up beforehand, and a clock that stands still until a test turns it."""

from __future__ import annotations

import functools
import threading
from dataclasses import replace
from typing import Any

import numpy as np

from kcache.telemetry import LayerKind, Stats, StepMode
from kcache.watch.frame import (
    Frame,
    Info,
    LayerFrame,
    Mark,
    Memory,
    Phase,
    SequenceFrame,
    Speed,
    bucket_tokens,
)

MIB = 2**20
LAYERS, KV_HEADS, GROUP, TOPN = 30, 3, 3, 64
PROMPT = 6000
NEEDLE = range(3300, 3316)
"""Where the made-up model looks in its middle layers."""
_SAID = [
    "The",
    "secret",
    "code",
    "of",
    "the",
    "blue",
    "lighthouse",
    "is",
    "7413",
    "and",
    "nobody",
    "else",
    "knows",
    "it",
]

INFO = Info(
    pid=4242,
    command="chat",
    model="smollm2",
    started_s=1.8e9,
    device="CPU",
    host_only=True,
    weights_bytes=257 * MIB,
    context_length=8192,
    policy={"topn": TOPN, "dense_below": 2048, "tail": "lowrank"},
)


@functools.lru_cache(maxsize=512)
def frame(
    step: int,
    *,
    number: int | None = None,
    phase: Phase = "decode",
    prompt: int = PROMPT,
    mode: StepMode = "topn",
    picks: bool = True,
    layers: int = LAYERS,
    batch: int = 1,
    run: int = 1,
    turns: tuple[Mark, ...] = (),
    hot: bool = True,
) -> Frame:
    """The frame after a decode step, or of a prompt's forward where ``phase`` says so."""
    tokens = prompt + step
    width = bucket_tokens(tokens)
    found = tuple(_layer(index, step, tokens, width, phase, mode, picks, layers, hot) for index in range(layers))
    totals = Stats(
        **{
            name: sum(getattr(layer.stats, name) for layer in found)
            for name in Stats.__dataclass_fields__
            if name not in ("steps", "tokens")
        },
        steps=step,
        tokens=tokens,
    )
    sequences = tuple(SequenceFrame(0, tokens - at, step - at, at % 3 == 2) for at in range(batch))
    return Frame(
        number=step if number is None else number,
        time_s=1.8e9 + 10 + 0.1 * step,
        run=run,
        step=step,
        phase=phase,
        batch=batch,
        observed=batch,
        tokens=tokens,
        bucket_tokens=width,
        layers=found,
        totals=totals,
        memory=Memory(24 << 30, 18 << 30, None, None, 24 << 30, 18 << 30, 1 << 30),
        speed=Speed(20.0 + step % 3, 45.0 + 5 * (step % 4), 13_100.0) if phase == "decode" else Speed(),
        marks=turns or ((Mark(0, "prompt"), Mark(prompt, "answer")) if step else (Mark(0, "prompt"),)),
        sequences=sequences,
        job=(3, 12) if batch > 1 else None,
    )


def _layer(
    index: int, step: int, tokens: int, width: int, phase: Phase, mode: StepMode, picks: bool, layers: int, hot: bool
) -> LayerFrame:
    resident = index < 2 and layers > 2
    kind: LayerKind = "resident" if resident else "tiered"
    chosen = None if phase != "decode" or resident else _picks(index, step, tokens)
    histogram = np.zeros(-(-tokens // width), np.uint32)
    if chosen is not None:
        histogram += np.bincount(chosen.reshape(-1) // width, minlength=len(histogram)).astype(np.uint32)
    row = 128
    v_bytes, moved = tokens * KV_HEADS * row, step * KV_HEADS * TOPN if not resident and mode == "topn" else 0
    offloaded = not resident and mode != "dense"
    k, v, tail = v_bytes, 0 if offloaded else v_bytes, v_bytes // 16 if offloaded else 0
    stats = Stats(
        bytes_h2d=(moved - (moved * 8 // 10 if hot else 0)) * row,
        bytes_d2h=v_bytes if offloaded else 0,
        rows_fetched=moved,
        hot_hits=moved * 8 // 10 if hot else 0,
        device_bytes=k + v + tail,
        host_bytes=v_bytes if offloaded else 0,
        k_bytes=k,
        resident_v_bytes=v,
        overhead_bytes=tail,
        full_kv_bytes=2 * v_bytes,
        steps=step,
        tokens=tokens,
    )
    now: StepMode = "prefill" if phase == "prefill" else "dense" if resident else mode
    mass = None if chosen is None else np.linspace(0.99, 0.7 + index / 150, KV_HEADS * GROUP, dtype=np.float32)
    overlap = None if chosen is None or step < 2 else 0.5 + index / 100
    weights = held = None
    if chosen is not None and mass is not None:
        weights = _weights(chosen, mass)
        held = (
            np.bincount(chosen.reshape(-1) // width, weights.reshape(-1), len(histogram)).astype(np.float32) / KV_HEADS
        )
    exact = (chosen, weights) if picks else (None, None)
    return LayerFrame(index, kind, now, stats, overlap, histogram, mass, held, *exact)


def _weights(picks: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """The first tokens weigh a third, the needle most of the rest where it is seen."""
    found = np.where(picks < 3, 0.1, np.where((picks >= NEEDLE.start) & (picks < NEEDLE.stop), 0.04, 0.001))
    wanted = mass.reshape(KV_HEADS, -1).mean(1)[None, :, None]
    return (found / found.sum(2, keepdims=True) * wanted).astype(np.float32)


def _picks(index: int, step: int, tokens: int) -> np.ndarray:
    """Half near the end, a few at the beginning, and in the middle layers the needle."""
    random = np.random.default_rng(index * 1000 + step // 4)
    looks = 10 <= index <= 22 and step >= 4 and tokens > NEEDLE.stop
    wanted = [0, 1, 2, *(NEEDLE if looks else ())]
    rows = []
    for _ in range(KV_HEADS):
        near = tokens - 1 - random.geometric(1 / (40 + 10 * index), 2 * TOPN)
        anywhere = random.choice(tokens, min(tokens, 2 * TOPN), replace=False)
        pool = [*wanted, *near[near >= 0].tolist()[: TOPN - len(wanted) - 10], *anywhere.tolist()]
        rows.append(sorted(list(dict.fromkeys(pool))[:TOPN]))
    return np.array([rows], np.int32)


class FakeSource:
    """Frames given beforehand; more come when a test says so. See :class:`~kcache.watch.source.Source`."""

    def __init__(self, frames: list[Frame], live: bool = True, info: Info = INFO) -> None:
        self.frames, self.live, self.info = list(frames), live, info
        self.closed: str | None = None
        self.called: tuple[str, ...] = ()
        self.asked: list[dict[str, Any]] = []

    def add(self, *frames: Frame) -> None:
        self.frames += frames

    def end(self, reason: str) -> None:
        self.live, self.closed = False, reason

    def span(self) -> range:
        return range(len(self.frames))

    def frame(self, index: int) -> Frame:
        if not 0 <= index < len(self.frames):
            raise IndexError(f"frame {index}")
        return self.frames[index]

    def latest(self) -> Frame | None:
        return self.frames[-1] if self.frames else None

    def pieces(self, start: int, end: int, sequence: int = 0, index: int | None = None) -> list[str]:
        known = self.frames[-1 if index is None else index].tokens if self.frames else 0
        return [self._word(at) if at < known else "" for at in range(start, end)]

    @staticmethod
    def _word(at: int) -> str:
        if at in NEEDLE:
            return f" {_SAID[at - NEEDLE.start]}" if at - NEEDLE.start < len(_SAID) else "."
        if at % 200 == 0:
            return "<|im_start|>"
        words = ("the", "sea", "was", "calm", "and", "grey", "as", "slate", "under", "a", "low", "sky")
        return ("\n\n" if at % 120 == 7 else " ") + words[(at * 7) % len(words)]

    def names(self, index: int | None = None) -> tuple[str, ...]:
        return self.called

    def ask(self, **wanted: Any) -> None:
        self.asked.append({name: value for name, value in wanted.items() if value is not None})

    def close(self) -> None:
        self.end("closed")


class FakeClock:
    """Time that a test turns; a thread that waits is seen to wait."""

    def __init__(self) -> None:
        self._now = 0.0
        self._waiting: tuple[threading.Event, float] | None = None

    def now(self) -> float:
        return self._now

    def advance(self, seconds: float) -> None:
        self._now += seconds

    def wait(self, bell: threading.Event, seconds: float) -> None:
        due = self._now + seconds
        self._waiting = bell, due
        while not bell.is_set() and self._now < due - 1e-9:
            bell.wait(0.002)
        self._waiting = None

    @property
    def settled(self) -> bool:
        """Whether the thread waits for time to pass, with nothing left to do."""
        waiting = self._waiting
        return waiting is not None and not waiting[0].is_set() and self._now < waiting[1] - 1e-9


def conversation(steps: int = 8, **changes: Any) -> list[Frame]:
    """A prompt that is read, and an answer of so many steps."""
    return [frame(0, number=1, phase="prefill", **changes), *(frame(step, **changes) for step in range(1, steps + 1))]


def two_turns() -> list[Frame]:
    """A prompt and an answer, then another of each."""
    first = conversation(5)
    marks = (*first[-1].marks, Mark(PROMPT + 5, "prompt"), Mark(PROMPT + 40, "answer"))
    later = [replace(frame(step), number=10 + step, marks=marks, tokens=PROMPT + step) for step in range(41, 45)]
    middle = replace(frame(40, phase="prefill"), marks=marks[:3], step=5, number=9)
    return [*first, middle, *later]

"""Picks recorded on real text, and their replay: random weights have no locality and say nothing of hot rows.

    python3 -m benchmarks.pick_trace [--output FILE]     records with the demo model, under the default policy

A trace holds which rows each layer and KV head picked in a few dozen successive steps. Replayed, a step selects as
ever, and then the picks of the trace take the place of its own: as many rows on average, found in the store of hot rows
as often as real ones are. A row of work reads the trace at its own clock, which is on the device, so a recorded step
goes on from step to step. The tally counts a step's own picks all the same: it steers the threshold, which no trace
would bring back to where it belongs.

Shapes: T steps, S streams (layers times heads), W picks at most, filled up with -1.
"""

from __future__ import annotations

import argparse
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from kcache.backends.triton import step as steps
from kcache.backends.triton.above import pick_above
from kcache.backends.triton.hot import HotRows
from kcache.backends.triton.step import Step

FILE = Path(__file__).parent / "picks_smollm2.npz"
CONTEXT = 7680


class Trace:
    """A recorded trace, ready to be replayed in contexts of ``length`` rows.

    Attributes
    ----------
    picks : Tensor ``[T, S, W]`` int32
        Positions stretched to the length: what matters is which are the same from step to step.
    source : Tensor int32
        T, S and W, and then the picks.
    """

    def __init__(self, file: Path, length: int, device: torch.device) -> None:
        with np.load(file) as stored:
            counts, flat = stored["counts"], stored["positions"].astype(np.int64)
            recorded = int(stored["length"])
        if length < recorded:
            raise ValueError(f"the trace was recorded in {recorded} rows, and cannot be replayed in {length}")
        picks = np.full((*counts.shape, int(counts.max())), -1, np.int32)
        picks[np.arange(picks.shape[2]) < counts[..., None]] = flat * length // recorded
        self.picks = torch.from_numpy(picks).to(device)
        self.source = torch.cat([torch.tensor(picks.shape, dtype=torch.int32, device=device), self.picks.flatten()])
        self._layers: weakref.WeakKeyDictionary[HotRows, int] = weakref.WeakKeyDictionary()

    @property
    def rows(self) -> float:
        """Picks of a row of work in a step, on average."""
        return float((self.picks >= 0).sum()) / (self.picks.shape[0] * self.picks.shape[1])

    def layer(self, hot: HotRows) -> int:
        """The number of the layer that a store belongs to: in the order in which they first fetch."""
        return self._layers.setdefault(hot, len(self._layers))


@triton.jit
def pick_traced(
    scores, block_top, part_max, part_sum, sinks, threshold, lse, listed, found, picks, tally, clock, source, source_at,
    length, row, capacity, blocks, splits,
    HEADS: tl.constexpr, G: tl.constexpr, G2: tl.constexpr, SP: tl.constexpr, BLOCK: tl.constexpr, MOST: tl.constexpr,
    TILE: tl.constexpr, MP: tl.constexpr, BP: tl.constexpr, GS: tl.constexpr, HAS_SINKS: tl.constexpr,
    HAS_TALLY: tl.constexpr,
):  # fmt: skip
    """``pick_above``, but for its picks: those of its stream in the step that its clock is at."""
    _own = pick_above(
        scores, block_top, part_max, part_sum, sinks, threshold, lse, listed, found, picks, tally, clock, source,
        source_at, length, row, capacity, blocks, splits, HEADS, G, G2, SP, BLOCK, MOST, TILE, MP, BP, GS, HAS_SINKS,
        HAS_TALLY,
    )  # fmt: skip
    tl.debug_barrier()
    steps, streams, width = tl.load(source), tl.load(source + 1), tl.load(source + 2)
    at = tl.load(clock + row) % steps * streams + (source_at + row) % streams
    kept = row * 0
    for first in range(0, MOST, TILE):
        lane = first + tl.arange(0, TILE)
        pick = tl.load(source + 3 + at.to(tl.int64) * width + lane, mask=lane < width, other=-1)
        tl.store(picks + row * MOST + lane, pick, mask=lane < MOST)
        kept += tl.sum(((pick >= 0) & (lane < MOST)).to(tl.int32), 0)
    return kept


@contextmanager
def replayed(trace: Trace) -> Iterator[None]:
    """Inside this block, decode steps with hot rows fetch what the trace says."""

    class TracedStep(Step):
        """A step whose own picks give way to the trace's."""

        def __init__(self, workspace: Any, inputs: Any, results: Any, hot: HotRows | None = None) -> None:
            super().__init__(workspace, inputs, results, hot)
            if hot is not None:
                self.pick, self.source, self.source_at = pick_traced, trace.source, trace.layer(hot) * self.rows

    before = steps.Step
    steps.Step = TracedStep  # type: ignore[misc]
    try:
        yield
    finally:
        steps.Step = before  # type: ignore[misc]


def record(count: int = 48) -> dict[str, Any]:
    """Record a trace: the demo model reads the reference prose, and then its next tokens one by one."""
    import kcache
    from kcache.attaching import attach
    from kcache.bench.context import real_ids
    from kcache.cache import KCache
    from kcache.decoding.forward import prefill, step_logits

    lm = kcache.load("smollm2")
    ids = real_ids(lm, CONTEXT + count + 8, 1)
    cache = KCache(lm.model, kcache.Policy(offload="all"), max_length=ids.shape[1])
    taken: list[list[np.ndarray]] = []
    with attach(lm.model):
        for _ in prefill(lm.model, cache, ids[:, :CONTEXT], None):
            pass
        for step in range(count + 8):
            step_logits(lm.model, cache, ids[:, CONTEXT + step : CONTEXT + step + 1])
            found = [layer.picks for layer in cache.snapshot().layers if layer.picks is not None]
            taken.append([np.sort(head[head >= 0]) for picks in found for head in picks.reshape(-1, picks.shape[-1])])
    taken = taken[8:]  # the threshold has settled by then
    counts = np.array([[len(head) for head in step] for step in taken], np.uint16)
    positions = np.concatenate([head for step in taken for head in step]).astype(np.uint16)
    return {"counts": counts, "positions": positions, "length": np.int64(ids.shape[1]), "topn": np.int64(128)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=FILE)
    options = parser.parse_args()
    trace = record()
    np.savez_compressed(options.output, **trace)
    counts = trace["counts"]
    print(f"{counts.shape[0]} steps of {counts.shape[1]} heads, {counts.mean():.1f} rows each: {options.output}")


if __name__ == "__main__":
    main()

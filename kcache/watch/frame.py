"""What a viewer sees: one immutable :class:`Frame` per decode step or piece of a prompt, and who it comes from.

A frame is the whole state at one moment. Counters are totals since the cache was made, so a viewer that missed frames
subtracts two it has and loses nothing; :func:`since` does that. Viewers read frames from a
:class:`~kcache.watch.source.Source`. Nothing here imports torch.

Shapes: S sequences observed, Hkv KV heads, Hq query heads, N picks, W buckets.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

import numpy as np

from kcache.telemetry import LayerKind, Stats, StepMode

Phase = Literal["idle", "prefill", "decode"]
Role = Literal["prompt", "answer"]

MOST_BUCKETS = 128
"""Buckets of a histogram at most; a long context fills more than half of them, a short one has a bucket per token."""
HALF_LIFE_STEPS = 16
"""After so many steps a pick counts half in a history of picks, wherever one is shown."""


@dataclass(frozen=True, slots=True)
class Info:
    """Who publishes, fixed for as long as it does.

    Attributes
    ----------
    pid : int
    command : str
        What runs: ``"chat"``, ``"generate"``, ``"bench"``, or what a program called itself.
    model : str
    started_s : float
        Unix time.
    device : str
        Name of the device that holds K: a GPU's, or the CPU's.
    host_only : bool
        Both tiers are RAM; a viewer then says "device tier (RAM)" and "host tier".
    weights_bytes : int
    context_length : int or None
        The model's, where its config says.
    link_gb_s : float or None
        Measured bandwidth of the link, host to device, where somebody measured it.
    policy : dict
        Fields of :class:`~kcache.Policy` of the cache first seen; empty while there was none, filled in when there is.
    environment : dict of str to str
        Versions and hardware.
    """

    pid: int
    command: str
    model: str
    started_s: float
    device: str
    host_only: bool
    weights_bytes: int
    context_length: int | None = None
    link_gb_s: float | None = None
    policy: dict[str, str | int | float | bool | None] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Memory:
    """What the machine itself says, in bytes, beside our own accounting; ``None`` where nobody knows.

    Attributes
    ----------
    device_total, device_free : int or None
        The GPU's, by NVML or the driver: all processes. On a host-only run the RAM's.
    allocated, reserved : int or None
        By torch in the publishing process, on a GPU. ``allocated`` less weights and cache is activations and the like.
    host_total, host_free : int
        RAM.
    process : int
        RAM the publishing process holds.
    """

    device_total: int | None = None
    device_free: int | None = None
    allocated: int | None = None
    reserved: int | None = None
    host_total: int = 0
    host_free: int = 0
    process: int = 0


@dataclass(frozen=True, slots=True)
class Speed:
    """How fast it goes; ``None`` before there is anything to tell.

    Attributes
    ----------
    tok_s : float or None
        Over the last decode steps of this answer, all sequences together.
    itl_ms : float or None
        Inter-token latency: mean of the steps since the frame before.
    ttft_ms : float or None
        From the start of the prompt's first forward to the first token, for the latest prompt.
    """

    tok_s: float | None = None
    itl_ms: float | None = None
    ttft_ms: float | None = None


@dataclass(frozen=True, slots=True)
class Mark:
    """A boundary in the context: from position ``start`` on the tokens are a prompt's or an answer's."""

    start: int
    role: Role


@dataclass(frozen=True, slots=True)
class SequenceFrame:
    """One sequence of a batch.

    Attributes
    ----------
    padding : int
        Positions at the beginning that are left padding.
    tokens : int
        Real tokens in the cache.
    completion_tokens : int
        Those decoded since the latest prompt.
    done : bool
        It has produced an end token; the others are still going.
    """

    padding: int
    tokens: int
    completion_tokens: int
    done: bool


@dataclass(frozen=True, slots=True, eq=False)
class LayerFrame:
    """One layer at the moment of a frame.

    Attributes
    ----------
    index : int
    kind : {"tiered", "resident", "stock"}
    mode : {"idle", "prefill", "dense", "topn"}
        How the latest forward attended. A ``dense`` layer with picks shows what *would* have been picked.
    stats : Stats
        Bytes held now; traffic and rows since the cache was made.
    overlap : float or None
        Share of the picks that the decode step just before had picked as well, 0 to 1.
    histogram : ndarray ``[W]`` uint32
        Picks per bucket of ``Frame.bucket_tokens`` positions, all observed sequences and heads together. All zero
        where nothing was picked.
    mass : ndarray ``[Hq]`` float32, or None
        Share of attention the picks hold per query head, mean over observed sequences, to 1/100. Heads of one KV head
        follow each other.
    held : ndarray ``[W]`` float32, or None
        Share of attention that the picks of each bucket hold, mean over all query heads and observed sequences. In
        recordings coarse, 0 below a hundredth, and in some frames only.
    picks : ndarray ``[S, Hkv, N]`` int32, or None
        The exact picked positions, ascending; heads that picked fewer than others are filled up with -1 at the end.
        Picked per query head, they are those of the group together, and some repeat.
        Only in some frames: see :meth:`Source.ask <kcache.watch.source.Source.ask>`.
    weights : ndarray ``[S, Hkv, N]`` float32, or None
        Share of attention that each of them holds, mean over its KV head's query heads; 0 where a pick is -1. Not in
        recordings.
    """

    index: int
    kind: LayerKind
    mode: StepMode
    stats: Stats
    overlap: float | None
    histogram: np.ndarray
    mass: np.ndarray | None = None
    held: np.ndarray | None = None
    picks: np.ndarray | None = None
    weights: np.ndarray | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """Everything at one moment.

    Attributes
    ----------
    number : int
        Counts the frames its publisher made; a viewer may miss some.
    time_s : float
        Unix time.
    run : int
        Which cache of the process this is, from 1; counters begin anew with it.
    step : int
        Decode steps the cache has run.
    phase : {"idle", "prefill", "decode"}
    batch : int
        Sequences in the cache; of ``sequences``, those that have ended may have left it.
    observed : int
        The first so many of them are looked at for histograms, mass and picks; fewer than ``batch`` when it is large.
    tokens : int
        Positions in the cache: the longest sequence, padding included.
    bucket_tokens : int
        Positions per bucket, a power of two: bucket ``b`` is positions ``b * bucket_tokens`` on, that many. In a
        recording of a large model it may be larger than it was live, and change.
    layers : tuple of LayerFrame
    totals : Stats
        Over all layers. ``full_kv_bytes`` is the ghost: what a full KV cache of the same room would take.
    memory : Memory
    speed : Speed
    marks : tuple of Mark
        Turn boundaries, ascending.
    sequences : tuple of SequenceFrame
    job : (int, int) or None
        Prompts done and prompts in all, for a batch job.
    """

    number: int
    time_s: float
    run: int
    step: int
    phase: Phase
    batch: int
    observed: int
    tokens: int
    bucket_tokens: int
    layers: tuple[LayerFrame, ...]
    totals: Stats
    memory: Memory
    speed: Speed
    marks: tuple[Mark, ...] = ()
    sequences: tuple[SequenceFrame, ...] = ()
    job: tuple[int, int] | None = None

    @property
    def began(self) -> int:
        """Sequences that the batch began with."""
        return max(self.batch, len(self.sequences))

    @property
    def buckets(self) -> int:
        """How many buckets W the histograms have; 0 while the cache is empty."""
        return -(-self.tokens // self.bucket_tokens)

    def positions(self, bucket: int) -> range:
        """The positions of a bucket that the cache holds."""
        return range(bucket * self.bucket_tokens, min(self.tokens, (bucket + 1) * self.bucket_tokens))

    @property
    def heat(self) -> np.ndarray:
        """The histograms of all layers, ``[layers, W]`` uint32: the heat map."""
        if not self.layers:
            return np.zeros((0, self.buckets), np.uint32)
        return np.stack([layer.histogram for layer in self.layers])


def bucket_tokens(tokens: int, most: int = MOST_BUCKETS) -> int:
    """Positions per bucket for a cache of ``tokens``: the smallest power of two that gives at most ``most`` buckets."""
    width = 1
    while tokens > most * width:
        width *= 2
    return width


def zoom(picks: np.ndarray, start: int, end: int, buckets: int) -> np.ndarray:
    """Count picks in ``buckets`` equal parts of the positions ``start:end``.

    Parameters
    ----------
    picks : ndarray ``[..., N]``
        Positions, as in :attr:`LayerFrame.picks`; ``picks[:, head]`` for one KV head. -1 is no position.
    start, end, buckets : int

    Returns
    -------
    ndarray ``[buckets]``
    """
    return np.histogram(picks, bins=buckets, range=(start, max(start + 1, end)))[0]


_TOTALS = ("bytes_h2d", "bytes_d2h", "rows_fetched", "hot_hits", "steps")


def since(before: Stats, after: Stats) -> Stats:
    """What was counted between two moments of one run; bytes held and tokens are those of ``after``.

    Never negative: a cache that was reset in between began to count anew.
    """
    values = {item.name: getattr(after, item.name) for item in fields(Stats)}
    for name in _TOTALS:
        earlier = getattr(before, name)
        values[name] -= earlier if earlier <= values[name] else 0
    return Stats(**values)

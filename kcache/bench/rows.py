"""One row of a benchmark: one engine at one context, batch and N, with everything that was measured of it.

Bytes are of K and V held when the run ended. ``ratio`` is the speed of this engine over that of ``ratio_to``: above 1
means faster. A value that was not measured, or means nothing for the engine, is None.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

Status = Literal["ok", "unavailable", "does not fit", "too long", "failed"]


@dataclass(frozen=True)
class Row:
    """What is known of one engine in one case.

    Attributes
    ----------
    engine, model, dtype, device : str
    ctx, batch : int
        Context in tokens before the first decoded one, and sequences decoded together.
    topn : int or None
        Rows fetched per KV head; None for engines that read them all.
    status : {"ok", "unavailable", "does not fit", "too long", "failed"}
    reason : str or None
        Why there are no figures.
    speed_only : bool
        Whether the context is longer than the model's, so that only the speed means anything.
    mode : {"topn", "dense"} or None
        How kcache's layers attended: ``"dense"`` where the context was too short for TopN, or V stayed.
    graph : str or None
        ``"replayed"`` when kcache's steps were replayed from a recording, or why not; None where nothing records them.
    context_from : {"random", "text"}
        Whether the context was filled in, or prefilled from a text.
    repeats, steps : int
        Turns, and decode steps timed per turn, as asked for.
    turns, steps_timed : int
        Turns taken and steps timed in all; fewer where a step takes long.
    decode_ms_p50, decode_ms_p99 : float
        Inter-token latency over all steps timed.
    decode_ms_low, decode_ms_high : float
        The lowest and highest median of a turn.
    decode_tok_s : float
        Tokens per second of the whole batch at the median.
    prefill_tok_s, ttft_ms : float or None
        With a real prefill: prompt tokens per second of the whole batch, and time to the first token.
    device_kv_bytes, host_kv_bytes : int
    peak_memory_bytes : int or None
        Device memory (RAM on a host-only run) the engine took at its peak, weights not counted.
    link_bytes_per_token : float
        Bytes brought from the host tier per decoded token of one sequence.
    link_share, memory_share : float
        Of the measured bandwidth of link and device memory, what the step's bytes made use of.
    hit_rate : float or None
        Share of fetched rows that were found on the device.
    floor_ms, floor_multiple : float
        What the step's own bytes take at measured bandwidth, and the median over that.
    ratio, ratio_low, ratio_high : float or None
        Speed over that of ``ratio_to``, turn by turn, each by its median: their median, lowest and highest.
    ratio_to : str or None
    kl, top1 : float or None
        Mean KL divergence from full attention in nats, and share of steps with the same likeliest token.
    predicted_tok_s, prediction_error : float or None
        What the plan's roofline says of this engine, and how far that is above what was measured (0.1 is 10 %).
    policy : dict or None
    env : dict
        Where and when it was measured.
    """

    engine: str
    model: str
    ctx: int
    batch: int
    topn: int | None = None
    dtype: str = ""
    device: str = ""
    status: Status = "ok"
    reason: str | None = None
    speed_only: bool = False
    mode: str | None = None
    graph: str | None = None
    context_from: str = "random"
    repeats: int = 0
    steps: int = 0
    turns: int = 0
    steps_timed: int = 0
    decode_ms_p50: float | None = None
    decode_ms_p99: float | None = None
    decode_ms_low: float | None = None
    decode_ms_high: float | None = None
    decode_tok_s: float | None = None
    prefill_tok_s: float | None = None
    ttft_ms: float | None = None
    device_kv_bytes: int | None = None
    host_kv_bytes: int | None = None
    peak_memory_bytes: int | None = None
    link_bytes_per_token: float | None = None
    link_share: float | None = None
    memory_share: float | None = None
    hit_rate: float | None = None
    floor_ms: float | None = None
    floor_multiple: float | None = None
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    ratio_to: str | None = None
    kl: float | None = None
    top1: float | None = None
    predicted_tok_s: float | None = None
    prediction_error: float | None = None
    policy: dict[str, Any] | None = None
    env: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, in order."""
        return asdict(self)

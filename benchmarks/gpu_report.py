"""From the jobs' figures to ratios, each beside what its own bytes allow, and to the table and the record of a run.

    python -m benchmarks.gpu_report RECORD EARLIER ...

joins runs of one card into the first file: what a run had no time for comes from an earlier one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Ratio:
    """A figure of the record.

    Attributes
    ----------
    key : str
    of, over : str
        Names of two jobs; of one alone where it is held against its own floor.
    target : float or None
    kind : {"speed", "floor", "prefill", "peak"}
        ``"speed"`` divides tokens per second, more is better; ``"prefill"`` and ``"peak"`` divide times and bytes, less
        is better; ``"floor"`` is a step's time over that of its bytes.
    """

    key: str
    of: str
    over: str
    target: float | None
    kind: Literal["speed", "floor", "prefill", "peak"] = "speed"

    @property
    def more_is_better(self) -> bool:
        """Whether the target is a lower bound."""
        return self.kind == "speed"


RATIOS = (
    Ratio("batch8_32k_vs_dense", "batch8_32k/kcache", "batch8_32k/dense", 1.3),
    Ratio("equal_hbm_32k_vs_dense", "equal_hbm_32k/kcache", "equal_hbm_32k/dense", 1.5),
    Ratio("equal_hbm_32k_k16_vs_dense", "equal_hbm_32k/k16", "equal_hbm_32k/dense", 1.5),
    Ratio("equal_hbm_32k_k8_vs_dense", "equal_hbm_32k/k8", "equal_hbm_32k/dense", 2.3),
    Ratio("batch1_128k_fits_vs_dense", "batch1_128k/kcache", "batch1_128k/dense", 0.98),
    Ratio("batch8_32k_vs_hf_dynamic", "batch8_32k/kcache", "batch8_32k/hf-dynamic", 3.0),
    Ratio("batch1_32k_vs_hf_offloaded", "batch1_32k/kcache", "batch1_32k/hf-offloaded", 10.0),
    Ratio("batch8_32k_floor_multiple", "batch8_32k/kcache", "batch8_32k/kcache", 1.5, "floor"),
    Ratio("llama2_7b_15k_vs_dense", "llama2_7b_15k/kcache", "llama2_7b_15k/dense", 1.4),
    Ratio("prefill_32k_time_vs_dense", "prefill_32k/kcache", "prefill_32k/dense", 1.1, "prefill"),
    Ratio("prefill_32k_peak_vs_dense", "prefill_32k/kcache", "prefill_32k/dense", 1.1, "peak"),
    Ratio("batch8_32k_k8_vs_dense", "batch8_32k/k8", "batch8_32k/dense", None),
    Ratio("batch8_32k_k16_vs_dense", "batch8_32k/k16", "batch8_32k/dense", None),
    Ratio("llama2_7b_15k_k16_vs_dense", "llama2_7b_15k/k16", "llama2_7b_15k/dense", None),
    Ratio("batch8_32k_no_hits_vs_dense", "batch8_32k/no-hits", "batch8_32k/dense", None),
    Ratio("equal_hbm_32k_no_hits_vs_dense", "equal_hbm_32k/no-hits", "equal_hbm_32k/dense", None),
    Ratio("llama2_7b_15k_no_hits_vs_dense", "llama2_7b_15k/no-hits", "llama2_7b_15k/dense", None),
    Ratio("prefill_padded_time_vs_torch", "prefill_padded_16k/kcache", "prefill_padded_16k/torch", None, "prefill"),
    Ratio("prefill_padded_peak_vs_torch", "prefill_padded_16k/kcache", "prefill_padded_16k/torch", None, "peak"),
)


def value_of(ratio: Ratio, figures: Mapping[str, Figures]) -> float | None:
    """A ratio's value; None where a job it needs has no figures."""
    pair = [figures.get(name) for name in (ratio.of, ratio.over)]
    if any(one is None or one["status"] != "ok" for one in pair):
        return None
    one, other = (each for each in pair if each is not None)
    if ratio.kind == "floor":
        return _number(one["floor_multiple"])
    name = {"speed": "decode_tok_s", "prefill": "prefill_ms_p50", "peak": "peak_memory_bytes"}[ratio.kind]
    above, below = _number(one[name]), _number(other[name])
    return None if above is None or not below else above / below


def ceiling_of(ratio: Ratio, figures: Mapping[str, Figures]) -> float | None:
    """What the ratio would be if both jobs took no longer than their bytes; for others than speeds, 1."""
    if value_of(ratio, figures) is None:
        return None
    if ratio.kind != "speed":
        return 1.0
    one, other = figures[ratio.of], figures[ratio.over]
    return (one["batch"] / one["floor_ms"]) / (other["batch"] / other["floor_ms"])


def record(
    env: dict[str, Any], figures: Mapping[str, Figures], left_out: Mapping[str, str], took_s: float
) -> dict[str, Any]:
    """The whole record of a run, as plain values."""
    values = {ratio.key: value_of(ratio, figures) for ratio in RATIOS}
    ceilings = {ratio.key: ceiling_of(ratio, figures) for ratio in RATIOS}
    return {
        "env": env,
        "ratios": {key: round(value, 4) for key, value in values.items() if value is not None},
        "ceilings": {key: round(value, 4) for key, value in ceilings.items() if value is not None},
        "targets": {ratio.key: ratio.target for ratio in RATIOS if ratio.target is not None},
        "measurements": [{"name": name, **figures[name]} for name in figures],
        "left_out": dict(left_out),
        "took_s": round(took_s, 1),
    }


def joined(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Several runs, the newest first, as one record: each ratio is of the newest run that has both its jobs.

    No ratio is of two runs. A row says in ``run`` which it is of, the number of its ``env`` in ``runs``, and
    ``ratio_runs`` says so of each ratio; the record's own ``env`` is that of the newest.
    """
    by_run = [{row["name"]: row for row in one["measurements"]} for one in records]
    ratio_runs: dict[str, int] = {}
    used: list[set[str]] = [set() for _ in records]
    for ratio in RATIOS:
        of = next((run for run, rows in enumerate(by_run) if value_of(ratio, rows) is not None), None)
        if of is not None:
            ratio_runs[ratio.key] = of
            used[of] |= {ratio.of, ratio.over}
    values = {key: records[run]["ratios"][key] for key, run in ratio_runs.items()}
    ceilings = {key: records[run]["ceilings"][key] for key, run in ratio_runs.items()}
    left_out = {name: why for one in reversed(records) for name, why in one["left_out"].items()}
    return {
        **records[0],
        "runs": [one["env"] for one in records],
        "ratio_runs": ratio_runs,
        "ratios": values,
        "ceilings": ceilings,
        "measurements": [
            {**row, "run": run}
            for run, rows in enumerate(by_run)
            for name, row in rows.items()
            if name in used[run] or row["status"] != "ok"
        ],
        "left_out": {name: why for name, why in left_out.items() if not any(name in names for names in used)},
        "took_s": sum(one["took_s"] for one in records),
    }


def job_line(name: str, figures: Figures) -> str:
    """One line of the table of jobs."""
    if figures["status"] != "ok":
        return f"{name:26} {figures['status']}: {figures.get('reason')}"
    if "prefill_ms_p50" in figures:
        peak = figures["peak_memory_bytes"]
        return (
            f"{name:26} prompt of {figures['ctx']:,} in {figures['prefill_ms_p50']:.0f} ms "
            f"[{figures['prefill_ms_low']:.0f}–{figures['prefill_ms_high']:.0f}], the first in "
            f"{figures['prefill_first_ms']:.0f}, peak " + ("unknown" if peak is None else f"{peak / 2**30:.1f} GiB")
        )
    hits = figures.get("hit_rate")
    return (
        f"{name:26} batch {figures['batch']:3}  {figures['decode_ms_p50']:7.2f} ms "
        f"[{figures['decode_ms_low']:.2f}–{figures['decode_ms_high']:.2f}]  {figures['decode_tok_s']:8.1f} tok/s  "
        f"{figures['floor_multiple']:.2f} x floor  link {100 * figures['link_share']:.0f} %"
        + ("" if hits is None else f"  hits {100 * hits:.0f} %")
        + ("" if figures.get("graph") in (None, "replayed") else f"  no graph: {figures['graph']}")
    )


def ratio_lines(figures: Mapping[str, Figures], left_out: Mapping[str, str]) -> list[str]:
    """The table of ratios."""
    lines = [f"{'ratio':34} {'measured':>9} {'ceiling':>8} {'target':>8}"]
    for ratio in RATIOS:
        value, ceiling = value_of(ratio, figures), ceiling_of(ratio, figures)
        target = "" if ratio.target is None else f"{'≥' if ratio.more_is_better else '≤'} {ratio.target:g}"
        if value is None or ceiling is None:
            why = next((left_out[name] for name in (ratio.of, ratio.over) if name in left_out), "not measured")
            lines.append(f"{ratio.key:34} {'—':>9} {'—':>8} {target:>8}  {why}")
            continue
        lines.append(f"{ratio.key:34} {value:9.3f} {ceiling:8.3f} {target:>8}  {_verdict(ratio, value)}".rstrip())
    return lines


def _verdict(ratio: Ratio, value: float) -> str:
    if ratio.target is None:
        return ""
    met = value >= ratio.target if ratio.more_is_better else value <= ratio.target
    return "met" if met else "missed"


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def main(paths: Sequence[str]) -> None:
    """Join the records in these files into the first."""
    records = [json.loads(Path(path).read_text(encoding="utf-8")) for path in paths]
    if len({one["env"]["device"] for one in records}) != 1 or any("runs" in one for one in records):
        raise SystemExit("only runs of the same card can be joined, each as the benchmark wrote it")
    Path(paths[0]).write_text(json.dumps(joined(records), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])

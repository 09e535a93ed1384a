"""Write the tables of docs/benchmarks.md and docs/fidelity.md from the rows in the folders of those names.

    python benchmarks/page.py

A table stands between ``<!-- rows FILE -->`` (one file, as ``kcache bench`` prints it), ``<!-- runs FILE ... -->``
(the same cases in several runs, kcache's speed over each other engine), ``<!-- fidelity FILE ... -->``, ``needle``,
``tasks`` or ``tune`` (as those commands print them), ``<!-- llama FILE -->`` (what ``benchmarks/beside_llama.py``
wrote), ``<!-- gpu FILE -->`` (the record of :mod:`benchmarks.gpu`) and ``<!-- end -->``. Files that are not there leave
their table as it is.
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kcache_cli.bench.same import COMMAND, NAMES
from kcache_cli.bench.table import markdown
from kcache_cli.evaluate import fidelity_table, needle_table, tasks_table, tune_table
from kcache_cli.rows.formats import Row
from kcache_cli.rows.store import read_rows

DOCS = Path(__file__).parent.parent / "docs"
TABLES: dict[str, Any] = {
    "fidelity": fidelity_table,
    "needle": needle_table,
    "tasks": tasks_table,
    "tune": tune_table,
}
BLOCK = re.compile(r"(<!-- (rows|runs|llama|gpu|fidelity|needle|tasks|tune) ([^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def runs_table(runs: Sequence[Sequence[Row]]) -> str:
    """Milliseconds per step of each engine in each run, and how much faster kcache was than it."""
    lines = ["| ctx | batch | engine | ms/step p50, by run | kcache's speed over it |", "|---:|---:|---|---:|---:|"]
    by_run = [{(row["ctx"], row["batch"], row["engine"], row["topn"]): row for row in run} for run in runs]
    for key in sorted(by_run[0], key=lambda key: key[:2]):
        rows = [run[key] for run in by_run if run.get(key, {}).get("decode_ms_p50")]
        ours = [_ours(run, key[0], key[1]) for run in by_run if run.get(key, {}).get("decode_ms_p50")]
        if not rows:
            continue
        times = ", ".join(f"{row['decode_ms_p50']:.1f}" for row in rows)
        ratios = [row["decode_ms_p50"] / ms for row, ms in zip(rows, ours, strict=True) if ms]
        faster = ", ".join(f"{ratio:.2f}×" for ratio in ratios) if key[2] != "kcache" else ""
        name = key[2] if key[3] is None else f"{key[2]} N={key[3]}"
        lines.append(f"| {key[0]:,} | {key[1]} | {name} | {times} | {faster} |")
    return "\n".join(lines) + "\n"


def _ours(run: dict[tuple[int, int, str, int | None], Row], ctx: int, batch: int) -> float | None:
    """The time of kcache in the case; the median over its N."""
    times = [row["decode_ms_p50"] for key, row in run.items() if key[:3] == (ctx, batch, "kcache")]
    times = [ms for ms in times if ms]
    return statistics.median(times) if times else None


def llama_table(record: Row) -> str:
    """Milliseconds per step of kcache and llama.cpp in the same turns, and how much faster kcache is."""
    lines = ["| ctx | engine | ms/step p50 | kcache's speed over it |", "|---:|---|---:|---:|"]
    for case in record["cases"]:
        middles = {name: [statistics.median(turn) for turn in turns] for name, turns in case["turns"].items()}
        for name, turns in middles.items():
            by_turn = [other / ours for other, ours in zip(turns, middles["kcache"], strict=True)]
            faster = f"{statistics.median(by_turn):.2f}× [{min(by_turn):.2f}–{max(by_turn):.2f}]"
            label = f"kcache N={case['topn']}" if name == "kcache" else name
            times = f"{statistics.median(turns):.1f} [{min(turns):.1f}–{max(turns):.1f}]"
            lines.append(f"| {case['ctx']:,} | {label} | {times} | {'' if name == 'kcache' else faster} |")
    peer, env = record["cases"][0]["peer"], record["env"]
    lines += ["", f"llama-cpp-python {peer['ready']}: {peer['system']}", f"{env['cpu']} · {env['time']}"]
    return "\n".join(lines) + "\n"


def gpu_table(record: Row) -> str:
    """The ratios of a GPU's record, each with its ceiling and target, and then its jobs."""
    runs = record.get("runs", [record["env"]])
    lines = ["| ratio | measured | ceiling | wanted | run |", "|---|---:|---:|---:|---:|"]
    for key in dict.fromkeys([*record["targets"], *record["ratios"]]):
        value, target, ceiling = (record[name].get(key) for name in ("ratios", "targets", "ceilings"))
        bound = "≤" if key.endswith(("multiple", "time_vs_dense", "peak_vs_dense")) else "≥"
        cells = [
            key,
            "not taken" if value is None else f"{value:.2f}",
            "" if ceiling is None else f"{ceiling:.2f}",
            "" if target is None else f"{bound} {target:g}",
            "" if value is None else str(record.get("ratio_runs", {}).get(key, 0) + 1),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| job | run | batch | ms p50 | floor ms | tok/s | hits | KV on the device, GiB |"]
    lines += ["|---|" + "---:|" * 7]
    for job in record["measurements"]:
        head = f"| {job['name']} | {job.get('run', 0) + 1} | {job['batch']}"
        if job["status"] != "ok":
            lines.append(f"{head} | {job['status']} | | | | |")
            continue
        prompt = "prefill_ms_p50" in job
        low, high = (job["prefill_ms_" + end if prompt else "decode_ms_" + end] for end in ("low", "high"))
        time = f"{job['prefill_ms_p50' if prompt else 'decode_ms_p50']:.2f} [{low:.2f}–{high:.2f}]"
        rest = (
            ["", "", ""]
            if prompt
            else [f"{job['floor_ms']:.2f}", f"{job['decode_tok_s']:.0f}", _percent(job["hit_rate"])]
        )
        cells = [time, *rest, f"{job['device_kv_bytes'] / 2**30:.1f}"]
        lines.append(f"{head} | {' | '.join(cells)} |")
    lines += [f"| {name} | | | left out: {reason} | | | | |" for name, reason in record["left_out"].items()]
    lines.append("")
    for run, env in enumerate(runs):
        versions = " · ".join(f"{name} {env[name]}" for name in ("torch", "triton", "transformers"))
        speeds = f"memory {env['memory_gb_s']:.0f} GB/s, rows over the link {env['gather_gb_s']:.1f} GB/s"
        where = f"{env['device']} · {versions} · {speeds} · {env['time']} · commit {env['commit']}"
        lines.append(f"{run + 1}. {where}")
    return "\n".join(lines) + "\n"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.0f} %"


def fill(text: str, folder: Path) -> str:
    """Return the page with its tables written anew."""

    def table(match: re.Match[str]) -> str:
        paths = [folder / name for name in match[3].split()]
        if not all(path.exists() for path in paths):
            return match[0]
        if match[2] in ("llama", "gpu"):
            table_of = llama_table if match[2] == "llama" else gpu_table
            body = table_of(json.loads(paths[0].read_text(encoding="utf-8")))
        elif match[2] in TABLES:
            page = TABLES[match[2]]
            body = page.markdown([row for path in paths for row in read_rows(path, "rows", page.COMMAND, page.NAMES)])
        else:
            files = [read_rows(path, "rows", COMMAND, NAMES) for path in paths]
            body = markdown(files[0]) if match[2] == "rows" else runs_table(files)
        return f"{match[1]}{body}{match[4]}"

    return BLOCK.sub(table, text)


def main() -> None:
    """Rewrite the pages."""
    for name in ("benchmarks", "fidelity"):
        page = DOCS / f"{name}.md"
        page.write_text(fill(page.read_text(encoding="utf-8"), DOCS / name), encoding="utf-8")


if __name__ == "__main__":
    main()

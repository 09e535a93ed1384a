"""The arithmetic of the GPU benchmark: ratios, ceilings, batches that fit, what is left out, and the record."""

from __future__ import annotations

import json
import os
import subprocess
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import Bench, commit, file_of, main
from benchmarks.gpu_jobs import GIB, Job, all_jobs, batch_of, largest_batch, measure, measure_prefill, spec_of
from benchmarks.gpu_models import SHAPES, make_model
from benchmarks.gpu_report import RATIOS, ceiling_of, ratio_lines, record, value_of
from benchmarks.gpu_report import main as join_files
from benchmarks.page import gpu_table
from kcache.bench.context import LayerShape
from kcache.bench.engines import make_engine
from kcache.cache import KCache
from tests.bench.machines import machine, tiny

ROOT = Path(__file__).parents[2]
KEYS = {
    "batch8_32k_vs_dense", "equal_hbm_32k_vs_dense", "equal_hbm_32k_k8_vs_dense", "batch1_128k_fits_vs_dense",
    "batch8_32k_vs_hf_dynamic", "batch1_32k_vs_hf_offloaded", "batch8_32k_floor_multiple", "llama2_7b_15k_vs_dense",
    "prefill_32k_time_vs_dense",
}  # fmt: skip

FULL = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


def row(batch: int = 8, ms: float = 10.0, floor_ms: float = 8.0, **more: Any) -> dict[str, Any]:
    return {
        "status": "ok", "batch": batch, "decode_ms_p50": ms, "decode_ms_low": ms - 1, "decode_ms_high": ms + 1,
        "decode_tok_s": batch * 1e3 / ms, "floor_ms": floor_ms, "floor_multiple": ms / floor_ms, "link_share": 0.25,
        "hit_rate": None, **more,
    }  # fmt: skip


def prompt(ms: float, peak: int) -> dict[str, Any]:
    return {
        "status": "ok", "ctx": 32768, "batch": 1, "prefill_first_ms": 2 * ms,
        "prefill_ms_p50": ms, "prefill_ms_low": ms, "prefill_ms_high": ms,
        "peak_memory_bytes": peak,
    }  # fmt: skip


def figures_of(job: Job) -> dict[str, Any]:
    """Batch 8 dense: 800 tok/s, floor 8 ms; everybody else twice as fast with a floor of 5 ms."""
    if job.engine == "prefill":
        return prompt(1000 if job.name.endswith("dense") else 1050, 4 * GIB)
    return row() if job.name.endswith("dense") else row(ms=5.0, floor_ms=5.0)


class Clock:
    """Goes on by what each job takes."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def bench(
    budget_s: float = 1e6,
    output: Path | None = None,
    failing: str = "",
    error: Exception = FULL,
    alive: Callable[[], bool] = lambda: True,
) -> tuple[Bench, list[str]]:
    clock, said = Clock(), list[str]()

    def run(job: Job) -> dict[str, Any]:
        clock.now_s += job.seconds
        if failing and failing in job.name:
            raise error
        return figures_of(job)

    return Bench(run, {"device": "Test"}, output, budget_s, clock, said.append, alive), said


def test_every_key_that_is_asked_for_has_its_jobs() -> None:
    assert {ratio.key for ratio in RATIOS} >= KEYS
    names = {job.name for job in all_jobs()}
    assert all({ratio.of, ratio.over} <= names for ratio in RATIOS)
    assert {job.shape for job in all_jobs()} == set(SHAPES)
    assert len({job.name for job in all_jobs()}) == len(all_jobs())


def test_ratios_and_their_ceilings() -> None:
    figures = {job.name: figures_of(job) for job in all_jobs()}
    by_key = {ratio.key: ratio for ratio in RATIOS}
    assert value_of(by_key["batch8_32k_vs_dense"], figures) == pytest.approx(2.0)
    assert ceiling_of(by_key["batch8_32k_vs_dense"], figures) == pytest.approx(1.6)
    assert value_of(by_key["batch8_32k_floor_multiple"], figures) == pytest.approx(1.0)
    assert value_of(by_key["prefill_32k_time_vs_dense"], figures) == pytest.approx(1.05)
    assert value_of(by_key["prefill_32k_peak_vs_dense"], figures) == pytest.approx(1.0)
    figures["equal_hbm_32k/dense"] = row(batch=10, ms=12.5, floor_ms=10.0)
    figures["equal_hbm_32k/kcache"] = row(batch=17, ms=12.5, floor_ms=8.5)
    assert value_of(by_key["equal_hbm_32k_vs_dense"], figures) == pytest.approx(1.7)
    assert ceiling_of(by_key["equal_hbm_32k_vs_dense"], figures) == pytest.approx(2.0)


def test_verdicts() -> None:
    run, _ = bench()
    run.go(all_jobs())
    lines = {line.split()[0]: line for line in ratio_lines(run.figures, run.left_out)}
    assert lines["batch8_32k_vs_dense"].endswith("met")
    assert lines["batch1_32k_vs_hf_offloaded"].endswith("missed")
    assert "1.000" in lines["batch1_32k_vs_hf_offloaded"]
    assert lines["prefill_32k_time_vs_dense"].endswith("met")


def test_the_record_is_written_after_each_job(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "h200.json"
    run, _ = bench(output=file)
    jobs = all_jobs()
    run.go(jobs[:2])
    written = json.loads(file.read_text())
    assert [one["name"] for one in written["measurements"]] == [job.name for job in jobs[:2]]
    assert set(written["ratios"]) == {"batch8_32k_vs_dense", "batch8_32k_floor_multiple"}
    assert written["ratios"]["batch8_32k_vs_dense"] == 2.0
    assert written["env"] == {"device": "Test"}
    run.go(jobs[2:])
    assert set(json.loads(file.read_text())["ratios"]) >= KEYS


def test_jobs_without_time_are_left_out_and_shorter_ones_still_run() -> None:
    run, said = bench(budget_s=50)
    run.go([Job("a/x", "llama-2-7b", "dense", 64, 1, seconds=30), Job("b/x", "llama-2-7b", "dense", 64, 1, seconds=30),
            Job("c/x", "llama-2-7b", "dense", 64, 1, seconds=15)])  # fmt: skip
    assert list(run.figures) == ["a/x", "c/x"]
    assert run.left_out == {"b/x": "20 s were left, it takes 30"}
    assert any("left out" in line for line in said)
    assert record({}, run.figures, run.left_out, 1.0)["left_out"] == run.left_out


def test_a_job_that_runs_out_of_memory_is_a_row_with_the_reason() -> None:
    run, said = bench(failing="batch8_32k/kcache")
    found = run.go(all_jobs()[:3])
    failed = next(one for one in found["measurements"] if one["name"] == "batch8_32k/kcache")
    assert failed["status"] == "does not fit"
    assert "Tried to allocate" in failed["reason"]
    assert "batch8_32k_vs_dense" not in found["ratios"]
    assert any("does not fit" in line for line in said)


def test_an_error_nobody_foresaw_is_a_row_and_the_rest_goes_on() -> None:
    run, _ = bench(failing="batch8_32k/kcache", error=AttributeError("no such thing"))
    run.go(all_jobs()[:3])
    assert [figures["status"] for figures in run.figures.values()] == ["ok", "failed", "ok"]


def test_a_device_that_answers_no_more_ends_the_run(tmp_path: Path) -> None:
    """An illegal address fails whatever follows in the process: that would only be misleading rows."""
    file = tmp_path / "h200.json"
    run, said = bench(failing="batch8_32k/kcache", output=file, error=RuntimeError("CUDA error"), alive=lambda: False)
    run.go(all_jobs()[:3])
    assert [figures["status"] for figures in run.figures.values()] == ["ok", "failed"]
    assert run.left_out == {all_jobs()[2].name: "the device does not answer since batch8_32k/kcache"}
    assert json.loads(file.read_text())["left_out"] == run.left_out
    assert any("does not answer" in line for line in said)


def test_the_record_is_named_after_the_card() -> None:
    assert file_of("NVIDIA H200") == "h200.json"
    assert file_of("NVIDIA H100 80GB HBM3") == "h100.json"
    assert file_of("NVIDIA A100-SXM4-80GB") == "a100.json"
    assert file_of("NVIDIA GH200 480GB") == "gh200.json"
    assert file_of("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090.json"


def test_everything_for_a_gpu_runs_whatever_fails(tmp_path: Path) -> None:
    """The first look, the benchmark and the tests in this order, figures into one folder, and the exit code tells."""
    fake = tmp_path / "python"
    for failing in ("benchmarks.gpu", "nothing"):
        fake.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\ncase "$*" in *{failing}*) exit 3;; esac\n')
        fake.chmod(0o755)
        env = {**os.environ, "PYTHON": str(fake), "OUT": str(tmp_path / "out")}
        done = subprocess.run([ROOT / "benchmarks" / "gpu.sh", "--only", "k8"], env=env, check=False)
        assert done.returncode == (failing != "nothing")
        calls = [line for line in (tmp_path / "calls").read_text().splitlines() if not line.startswith("-c")]
        assert calls[0] == f"benchmarks/first_look.py --output {tmp_path}/out/first_look.json"
        assert calls[1] == f"-m benchmarks.gpu --folder {tmp_path}/out --only k8"
        assert "tests/gpu" in calls[2] and "tests/triton/test_triton_device.py" in calls[2]
        (tmp_path / "calls").unlink()
    assert (tmp_path / "out").is_dir()
    done = subprocess.run([ROOT / "benchmarks" / "gpu.sh"], env={**env, "PARTS": "look tests"}, check=False)
    assert done.returncode == 0
    calls = [line for line in (tmp_path / "calls").read_text().splitlines() if not line.startswith("-c")]
    assert [call.split()[-1].split("/")[-1] for call in calls] == ["first_look.json", "test_triton_prompt.py"]


def test_every_ratio_asked_for_fits_the_budget() -> None:
    """By the jobs' own estimates, in their order."""
    run, _ = bench(budget_s=330)
    assert set(run.go(all_jobs())["ratios"]) >= KEYS


def test_a_prompt_begins_without_the_cache_of_the_one_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache refers to itself, so without the collector its memory would be freed within the next one's peak."""
    alive: list[int] = []

    class Peak:
        def __init__(self, device: torch.device) -> None:
            alive.append(sum(ref() is not None for ref in made))

        def added_bytes(self) -> int:
            return 0

    lm = tiny()
    made: list[weakref.ref[KCache]] = []

    class Counted(KCache):
        def __init__(self, model: Any, *args: Any, **more: Any) -> None:
            super().__init__(model, *args, **more)
            made.append(weakref.ref(self))

    monkeypatch.setattr("benchmarks.gpu_jobs.PeakMemory", Peak)
    monkeypatch.setattr("benchmarks.gpu_jobs.KCache", Counted)
    measure_prefill(Job("case/prefill", "tiny", "prefill", 48, 1), lm, repeats=2)
    assert alive == [1, 1, 1]


def test_the_largest_batch_that_fits_both_tiers() -> None:
    assert largest_batch(lambda batch: (3 * batch, batch), 10, 100) == 3
    assert largest_batch(lambda batch: (batch, 3 * batch), 10, 7) == 2
    assert largest_batch(lambda batch: (20 * batch, 0), 10, 7) == 0


def test_batches_of_an_equal_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Llama-3.1-8B at 32k: K is half of the cache, and a KCache keeps that and an eighth of V beside it."""
    shapes = [LayerShape(8, 128, 128, torch.bfloat16, torch.device("cpu"))] * 32
    monkeypatch.setattr("psutil.virtual_memory", lambda: type("Ram", (), {"total": 10**15, "available": 10**15})())
    jobs = {job.name: job for job in all_jobs()}
    found = {
        name: batch_of(jobs[f"equal_hbm_32k/{name}"], make_engine(name, jobs[f"equal_hbm_32k/{name}"].policy), shapes,
                       141 * GIB, 16 * GIB)
        for name in ("dense", "kcache")
    } | {
        "k8": batch_of(jobs["equal_hbm_32k/k8"], make_engine("kcache", jobs["equal_hbm_32k/k8"].policy), shapes,
                       141 * GIB, 16 * GIB)
    }  # fmt: skip
    assert found == {"dense": 9, "kcache": 17, "k8": 29}


def test_the_models_have_the_sizes_of_their_names(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"llama-3.1-8b": 8.03e9, "llama-2-7b": 6.74e9}
    for shape, size in sizes.items():
        model = make_model(shape, torch.device("meta")).model
        assert sum(parameter.numel() for parameter in model.parameters()) == pytest.approx(size, rel=0.01)


def test_jobs_run_on_a_tiny_model() -> None:
    """The way a job takes through the benchmark of kcache, on the CPU."""
    lm = tiny()
    spec = spec_of(all_jobs()[0])
    assert spec.warmup + spec.steps > 12
    for engine in ("dense", "kcache", "hf-dynamic"):
        job = Job(f"case/{engine}", "tiny", engine, 48, 2, policy=replace(all_jobs()[1].policy, topn=4, dense_below=0))
        found = measure(job, lm, machine(), GIB, replace(spec_of(job), repeats=2, steps=2))
        assert found["status"] == "ok", found["reason"]
        assert found["batch"] == 2
        assert found["decode_ms_p50"] > 0
    found = measure_prefill(Job("case/prefill", "tiny", "prefill", 48, 1), lm, repeats=1)
    assert found["prefill_ms_p50"] > 0
    found = measure(Job("case/none", "tiny", "dense", 48, budget=1), lm, machine(), GIB)
    assert found["status"] == "does not fit"


def test_without_a_device_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr("sys.argv", ["gpu"])
    with pytest.raises(SystemExit, match="no CUDA device here"):
        main()


def test_the_commit_is_known_in_a_repository() -> None:
    found = commit()
    assert found is None or len(found.removesuffix("-dirty")) == 40


def test_runs_of_a_card_become_one_record_without_ratios_across_them(tmp_path: Path) -> None:
    """A run that had no time for all: what it has is its own, the rest is the earlier one's."""
    env = {"device": "H9", "memory_gb_s": 1.0, "gather_gb_s": 2.0, "time": "now", "commit": "new"}
    env |= dict.fromkeys(("torch", "triton", "transformers"), "1")
    figures = {job.name: {**figures_of(job), "device_kv_bytes": GIB} for job in all_jobs()}
    late = "batch8_32k/dense", "batch8_32k/kcache", "equal_hbm_32k/kcache", "prefill_32k/kcache"
    newer = {name: figures[name] for name in late}
    newer["batch8_32k/kcache"] = {**row(ms=4.0, floor_ms=5.0), "device_kv_bytes": GIB}
    newer["prefill_32k/kcache"] = {**row(), "status": "failed"}
    files = tmp_path / "h9.json", tmp_path / "earlier.json"
    files[0].write_text(json.dumps(record(env, newer, {"batch8_32k/no-hits": "no time", "x": "no time"}, 1.0)))
    files[1].write_text(json.dumps(record({**env, "commit": "old"}, figures, {"y": "no time"}, 2.0)))
    join_files([str(file) for file in files])
    found = json.loads(files[0].read_text())
    assert found["ratios"]["batch8_32k_vs_dense"] == 2.5 and found["ratio_runs"]["batch8_32k_vs_dense"] == 0
    for key in ("equal_hbm_32k_vs_dense", "batch8_32k_vs_hf_dynamic", "prefill_32k_time_vs_dense"):
        assert found["ratio_runs"][key] == 1
    assert found["ratios"]["batch8_32k_vs_hf_dynamic"] == 1.0, "both of the earlier run"
    rows = [(each["name"], each["run"]) for each in found["measurements"]]
    assert ("batch8_32k/kcache", 0) in rows and ("batch8_32k/kcache", 1) in rows
    assert ("equal_hbm_32k/kcache", 0) not in rows, "no ratio is of it"
    assert ("prefill_32k/kcache", 0) in rows, "what failed is told"
    assert found["left_out"] == {"x": "no time", "y": "no time"}
    assert [each["commit"] for each in found["runs"]] == ["new", "old"]
    table = gpu_table(found)
    assert "| batch8_32k_vs_dense | 2.50 |" in table
    assert "2. H9" in table
    with pytest.raises(SystemExit, match="each as the benchmark wrote it"):
        join_files([str(file) for file in files])

"""kcache plan: its table, its JSON, its errors; from a config alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import kcache.speed.machine
from tests.cli.conftest import Run
from tests.planning.test_memory import give_ram
from tests.planning.test_plan import LLAMA_2_7B, LLAMA_3_8B
from tests.speed.test_machine import CPU

GIB = 2**30


@pytest.fixture
def config(tmp_path: Path) -> str:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_3_8B))
    return str(path)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kcache.speed.machine, "measure", lambda device, quick: CPU)


def planned(run: Run, *args: str) -> dict[str, Any]:
    result = run("plan", *args, "--json")
    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 1
    return json.loads(result.stdout)


def test_json(run: Run, config: str) -> None:
    sizes = ("--hbm", "80GiB", "--host", "512GiB", "--gpu", "h100")
    found = planned(run, config, "--ctx", "128k", "--batch", "auto", *sizes, "--topn", "128", "--k-bits", "16")
    assert (found["ctx"], found["batch"], found["model_ctx"]) == (131072, "auto", 131072)
    full, ours = found["methods"]["full"], found["methods"]["kcache"]
    for method in (full, ours):
        assert method["weights_bytes"] == 16_060_522_496
        assert method["k_bytes"] == method["v_bytes"] == method["batch"] * 8 * GIB
        assert method["device_bytes"] <= 80 * GIB
        assert method["tok_s_predicted"] > 0
        parts = ("weights_bytes", "k_bytes", "resident_v_bytes", "overhead_bytes", "activation_bytes")
        assert method["device_bytes"] == sum(method[part] for part in parts)
        assert method["v_bytes"] == method["resident_v_bytes"] + method["host_bytes"]
    assert (full["batch"], full["max_batch"], full["host_bytes"]) == (3, 3, 0)
    assert ours["max_batch"] > full["max_batch"]
    assert ours["max_ctx"] > full["max_ctx"] > 131072
    assert ours["tok_s_predicted"] > 1.3 * full["tok_s_predicted"]
    assert found["curve"][-1]["ctx"] == 131072
    assert found["curve"][-1]["kcache_tok_s_predicted"] == ours["tok_s_predicted"]


def test_json_says_how_k_was_planned(run: Run, config: str) -> None:
    args = (config, "--ctx", "32k", "--batch", "2", "--gpu", "h100", "--host", "64GiB")
    assert planned(run, *args)["policy"]["k_bits"] == "8+8"
    assert planned(run, *args, "--k-bits", "16")["policy"]["k_bits"] == 16
    assert planned(run, *args, "--dtype", "float32")["policy"]["k_bits"] == 16


def test_table_and_bars(run: Run, config: str) -> None:
    result = run("plan", config, "--ctx", "40k", "--batch", "2", "--gpu", "rtx4090", "--host", "64GiB")
    assert result.exit_code == 0, result.stderr
    for words in ("14.96 GiB", "5.00 GiB", "no: device memory", "RTX 4090", "predicted", "of 32", "×", "█", "does not"):
        assert words in result.stdout
    assert "\x1b" not in result.stdout


def test_this_machine(run: Run, measured: None) -> None:
    result = run("plan", "smollm2")
    assert result.exit_code == 0, result.stderr
    assert "8,192 tokens · batch 1\n" in result.stdout
    assert "×1.00" in result.stdout
    assert "both tiers are the same RAM" in result.stdout
    assert "\n  kcache plan smollm2 --gpu h100\n" in result.stdout
    assert run("plan", "smollm2", "--batch", "auto").stdout.count("fastest") == 2
    found = planned(run, "smollm2", "--ctx", "128k", "--batch", "1")
    assert found["device"]["device_bytes"] is None
    assert any("made for 8,192" in note for note in found["notes"])
    assert found["methods"]["kcache"]["resident_layers"] == 2
    card = planned(run, "smollm2", "--hbm", "1GiB", "--batch", "1")
    assert card["device"]["device_bytes"] == GIB


def test_policy_flags_and_hits(run: Run, config: str) -> None:
    args = (config, "--ctx", "32k", "--batch", "8", "--gpu", "h100", "--host", "64GiB", "--offload", "all")
    cold, warm = planned(run, *args), planned(run, *args, "--hit-rate", "0.8", "--dense-layers", "0")
    assert cold["policy"]["offload"] == "all"
    assert cold["methods"]["kcache"]["resident_layers"] == 2
    assert warm["methods"]["kcache"]["resident_layers"] == 0
    links = [found["methods"]["kcache"]["predicted"]["link_bytes"] for found in (cold, warm)]
    assert links == [8 * 30 * 8 * 128 * 256, pytest.approx(8 * 32 * 8 * 128 * 256 * 0.2, abs=1)]
    hint = [note for note in cold["notes"] if "--hit-rate 0.8" in note]
    as_hinted = planned(run, *args, "--hit-rate", "0.8")
    assert f"({as_hinted['methods']['kcache']['tok_s_predicted']:,.1f} tok/s)" in hint[0]
    assert not any("--hit-rate" in note for note in warm["notes"])
    single = planned(run, *args, "--batch", "4", "--dtype", "float32")
    assert single["methods"]["full"]["k_bytes"] == cold["methods"]["full"]["k_bytes"]


def test_where_nothing_has_to_leave_it_is_said(run: Run, config: str) -> None:
    """Without a remark, a plan that shows no gain reads as if there were none to be had."""
    args = (config, "--gpu", "h100", "--host", "64GiB", "--ctx", "32k", "--batch", "2")
    notes = planned(run, *args)["notes"]
    assert [note for note in notes if "32,768 tokens in a batch of 2" in note and "--offload all" in note]
    assert not any("room on the device" in note for note in planned(run, *args, "--offload", "all")["notes"])
    assert not any("room on the device" in note for note in planned(run, *args, "--offload", "none")["notes"])


def test_what_is_kept_free_is_a_row(run: Run, config: str) -> None:
    args = (config, "--hbm", "80GiB", "--gpu", "h100", "--host", "64GiB", "--ctx", "32k", "--batch", "2")
    method = planned(run, *args)["methods"]["kcache"]
    left = 80 * GIB - method["weights_bytes"]
    assert method["unused_bytes"] == left // 20 - method["activation_bytes"] - method["scratch_bytes"] > 0
    many = planned(run, *args[:-1], "8")["methods"]["kcache"]
    assert many["activation_bytes"] > left // 20
    assert many["unused_bytes"] == 2**29, "what is worked in is an estimate"
    assert f"{method['unused_bytes'] / GIB:.2f} GiB" in run("plan", *args).stdout.split("kept free")[1].splitlines()[0]


def test_a_budget_beyond_the_card_is_the_card_s(run: Run, config: str) -> None:
    args = (config, "--gpu", "rtx4090", "--host", "64GiB", "--ctx", "32k")
    plain, generous = planned(run, *args), planned(run, *args, "--kv-budget", "100TiB")
    assert generous["methods"] == plain["methods"]


def test_more_may_be_allowed_where_there_is_more(run: Run, config: str) -> None:
    args = ("plan", config, "--gpu", "h100", "--host", "64GiB", "--ctx", "32k", "--batch", "1")
    assert "with more allowed (--kv-budget)" in run(*args, "--kv-budget", "1GiB").stderr
    large = ("plan", config, "--gpu", "rtx4090", "--host", "64GiB", "--ctx", "128k", "--batch", "9")
    assert "--kv-budget" not in run(*large, "--kv-budget", "100GiB").stderr


def test_what_fits_in_no_batch_is_not_called_the_fastest(run: Run, config: str) -> None:
    result = run("plan", config, "--gpu", "rtx4090", "--host", "64GiB", "--ctx", "128k")
    assert result.exit_code == 3
    first = " ".join(result.stdout.partition("NVIDIA")[0].split())  # a long folder makes lines of it
    assert "no batch fits" in first and "fastest" not in first


def test_windows_alone_leave_nothing_to_tier(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**LLAMA_3_8B, "model_type": "mistral", "sliding_window": 4096}))
    args = ("plan", str(path), "--gpu", "h100", "--host", "64GiB", "--ctx", "32k", "--batch", "1")
    result = run(*args)
    assert "each attends a sliding window" in result.stdout
    assert "none of 0" not in result.stdout
    assert " any" in result.stdout.split("longest context")[1].splitlines()[0]


def test_ram_of_this_machine_is_not_taken_for_another_s_in_silence(
    run: Run, config: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    args = ("plan", config, "--gpu", "h100", "--ctx", "128k", "--batch", "5")
    small = run(*args, "--host", "4GiB")
    assert "host memory" in small.stderr and "--host" not in small.stderr
    give_ram(monkeypatch, 4 * GIB)
    here = run(*args)
    assert here.exit_code == 3
    assert "host memory" in here.stderr and "--host is for another machine's" in here.stderr


def test_layers_that_stay_and_cost_time_are_told(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(LLAMA_2_7B))
    args = (
        "plan",
        str(path),
        "--ctx",
        "15k",
        "--batch",
        "14",
        "--gpu",
        "h200",
        "--host",
        "512GiB",
        "--hit-rate",
        ".89",
    )
    said = " ".join(run(*args, "--kv-budget", "80GiB").stdout.split())
    assert "V of 14 of 32 layers has room on the device" in said and "with --offload all a step would take" in said
    assert "--offload all" not in run(*args, ".89", "--offload", "all").stdout
    assert "--offload all" not in run(*args, "0").stdout, "the link would take longer"


def test_what_does_not_fit_is_shown_and_refused(run: Run, config: str) -> None:
    args = ("plan", config, "--ctx", "128k", "--batch", "16", "--gpu", "h100", "--host", "512GiB")
    result = run(*args, "--json")
    assert result.exit_code == 3
    assert json.loads(result.stdout)["methods"]["kcache"]["fits"] is False
    assert result.stderr.count("\n") == 1
    assert "in a batch of 5" in result.stderr
    assert run(*args).exit_code == 3


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("--batch", "0"), "--batch 0"),
        (("--batch", "many"), "--batch many"),
        (("--hbm", "much"), "--hbm much"),
        (("--hbm", "24"), "24GiB"),
        (("--kv-budget", "zz"), "kv_budget: not a size"),
        (("--host", "0"), "--host 0"),
        (("--gpu", "tpu"), "--gpu tpu: no figures for a GPU called 'tpu'; known are b200, h200, h100"),
        (("--hit-rate", "1.5"), "--hit-rate"),
        (("--ctx", "none"), "--ctx"),
        (("--topn", "0"), "topn"),
        (("--plot", "figure.docx"), "the name must end in .png, .svg, .pdf"),
        (("--plot", "nowhere/figure.svg"), "the folder nowhere does not exist"),
        (("--plot", "/"), "is a folder"),
    ],
)
def test_bad_values(run: Run, config: str, args: tuple[str, ...], said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache_cli.plan_run.answer", lambda question: pytest.fail("what is refused is planned"))
    result = run("plan", config, *args)
    assert result.exit_code == 2
    assert said in result.stderr
    assert result.stdout == ""


@pytest.mark.parametrize("text", ["{", "[]", '{"model_type": "bert"}'])
def test_bad_configs(run: Run, tmp_path: Path, text: str) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    result = run("plan", str(path), "--gpu", "h100")
    assert result.exit_code == 1
    assert result.stderr.count("\n") == 1


def test_a_config_that_is_not_there(run: Run, tmp_path: Path) -> None:
    assert run("plan", str(tmp_path / "config.json"), "--gpu", "h100").exit_code == 1


def test_without_the_hub_a_config_is_said_to_do(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kcache.models.hub._listing", lambda repo, revision: None)
    result = run("plan", "nobody/has-this", "--gpu", "h100")
    assert result.exit_code == 1
    assert "the hub cannot be reached" in result.stderr
    assert result.stderr.endswith("kcache plan PATH/config.json\n")


def test_plot(run: Run, config: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.svg"
    assert run("plan", config, "--gpu", "h100", "--ctx", "32k", "--plot", str(path)).exit_code == 0
    assert "predicted tok/s" in path.read_text() or path.stat().st_size > 1000


def test_8_bits_on_a_cpu_are_said_to_be_slow(run: Run, measured: None, tmp_path: Path) -> None:
    policy = tmp_path / "bytes.toml"
    policy.write_text("v_bits = 8\n")
    here = planned(run, "smollm2", "--policy", str(policy))
    card = planned(run, "smollm2", "--policy", str(policy), "--gpu", "h100", "--hbm", "80GiB")
    assert [any("slow on a CPU" in note for note in found["notes"]) for found in (here, card)] == [True, False]


@pytest.mark.parametrize(("load", "warned"), [(99.0, True), (0.0, False)])
def test_speeds_measured_on_a_busy_machine_are_warned_about(
    load: float, warned: bool, run: Run, config: str, measured: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kcache.speed.findings.current_load", lambda: load)
    result = run("plan", config, "--ctx", "8k")
    assert ("the machine is busy (load 99.0" in result.stderr) == warned
    assert "busy" not in run("plan", config, "--ctx", "8k", "--gpu", "h100").stderr

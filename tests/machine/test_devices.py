"""A model spread over several places: weights on disk, a budget for each device, maps that are wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import kcache
from kcache.layers.residency import Residency
from kcache.machine.devices import input_device, read_device_map
from kcache.planning.need import ModelShape
from tests.saved import save_tiny

POLICY = kcache.Policy(topn=8, dense_below=0, dense_layers=1)
ON_DISK = {
    "half": {
        "model.embed_tokens": "cpu",
        "model.rotary_emb": "cpu",
        "model.layers.0": "cpu",
        "model.layers.1": "disk",
        "model.layers.2": "disk",
        "model.norm": "cpu",
        "lm_head": "cpu",
    },
    "all": {"model": "disk", "lm_head": "disk"},
}


def answer(lm: kcache.LoadedModel) -> list[int]:
    prompts = ["several words to attend to, and then some more of them", "a shorter prompt"]
    greedy = kcache.Sampling(temperature=0)
    return [event.token_id for event in kcache.generate(lm, prompts, POLICY, sampling=greedy, max_new_tokens=12)]


@pytest.mark.parametrize("name", list(ON_DISK))
def test_weights_on_disk_give_the_same_tokens(name: str, tiny_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    lm = kcache.load(tiny_folder, device_map=ON_DISK[name], dtype="float32")
    kept = {str(parameter.device) for parameter in lm.model.model.layers[1].parameters()}
    assert kept == {"meta"}, "the weights are not in memory between forwards"
    assert lm.device == input_device(lm.model) == torch.device("cpu")
    assert answer(lm) == answer(kcache.load(tiny_folder, device_map="cpu", dtype="float32"))
    assert capfd.readouterr() == ("", "")


def test_a_map_from_a_file(tmp_path: Path) -> None:
    file = tmp_path / "map.json"
    file.write_text(json.dumps(ON_DISK["half"]))
    assert read_device_map(file) == ON_DISK["half"]


@pytest.mark.parametrize(
    ("text", "say"),
    [
        ("{", "not JSON"),
        ("[]", "no device map"),
        ("{}", "no device map"),
        ('{"lm_head": "gpu"}', "'gpu', which is no device"),
        ('{"lm_head": true}', "True, which is no device"),
        ('{"lm_head": null}', "None, which is no device"),
        ('{"lm_head": "cuda:99"}', "CUDA devices here"),
        ('{"lm_head": 99}', "on cuda:99, and torch sees"),
        ('{"lm_head": -1}', "-1, which is no device"),
    ],
)
def test_maps_that_are_wrong(tmp_path: Path, text: str, say: str) -> None:
    file = tmp_path / "map.json"
    file.write_text(text)
    with pytest.raises(kcache.InputError, match=say):
        read_device_map(file)
    with pytest.raises(kcache.InputError, match="cannot be read"):
        read_device_map(tmp_path / "nowhere.json")


class FakeLayer:
    """As much of a layer as a plan asks for."""

    is_initialized = False
    offloaded = False
    length = 0
    waits_for_attention = False
    hot = None

    def __init__(self, index: int, device: torch.device) -> None:
        self.index, self.device = index, device

    def stats(self) -> kcache.Stats:
        return kcache.Stats()

    def spill(self) -> None:
        raise AssertionError("nothing to move")


FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
ROW = 2 * 4 * 4  # 2 heads, 4 numbers, fp32


def planned(where: list[torch.device], rows: int, arriving: torch.device | None = None, **policy: Any) -> Residency:
    """The plan of a cache whose layers are expected at ``where``, for ``rows`` rows."""
    layers = [FakeLayer(index, device) for index, device in enumerate(where)]
    if arriving is not None:
        layers[0].device = arriving
    residency = Residency(kcache.Policy(dense_below=0, tail="none", **policy), rows)
    residency.layers = layers
    residency.devices = dict(enumerate(where))
    keys = torch.zeros(1, 2, 1, 4)
    residency.plan(residency.layers[0], keys, keys, 1)
    return residency


def stay(residency: Residency) -> list[bool]:
    return [residency.is_resident(layer) for layer in residency.layers]


def test_each_device_has_a_budget_of_its_own() -> None:
    """Room for K of three layers and V of two on each: 3 layers here and 2 there fill it differently."""
    budget = 5 * ROW * 100
    plan = planned([FIRST, FIRST, FIRST, SECOND, SECOND], 100, dense_layers=0, kv_budget=budget)
    assert stay(plan) == [True, True, False, True, True]
    together = planned([FIRST] * 5, 100, dense_layers=0, kv_budget=budget)
    assert stay(together) == [False] * 5


def test_dense_layers_are_the_models_first_wherever_they_are() -> None:
    plan = planned([FIRST, SECOND, FIRST, SECOND], 100, dense_layers=1, offload="all", kv_budget=10**6)
    assert stay(plan) == [True, False, False, False]
    plan = planned([FIRST, SECOND, FIRST, SECOND], 100, dense_layers=3, offload="all", kv_budget=10**6)
    assert stay(plan) == [True, True, True, False]


def test_the_device_that_is_full_is_named() -> None:
    with pytest.raises(kcache.DoesNotFitError, match=r"memory on cuda:0 .* about 66 tokens would fit"):
        planned([FIRST, FIRST, FIRST, SECOND], 100, dense_layers=0, kv_budget=2 * ROW * 100)


def test_a_model_that_moved_is_planned_where_it_is() -> None:
    budget = 5 * ROW * 100
    plan = planned([FIRST, FIRST, FIRST], 100, arriving=SECOND, dense_layers=0, kv_budget=budget)
    assert set(plan.devices.values()) == {SECOND}
    assert stay(plan) == [True, True, False]


def test_a_cli_map_is_used_and_excludes_a_device(tmp_path: Path) -> None:
    from kcache_cli.engine import KCacheEngine
    from kcache_cli.options import ModelOptions

    file = tmp_path / "map.json"
    file.write_text(json.dumps(ON_DISK["half"]))
    folder = save_tiny(tmp_path / "model")
    options = ModelOptions(model=str(folder), device_map=file)
    assert KCacheEngine().plan(options, POLICY).host_only
    lm = KCacheEngine().load(options, lambda *report: None)
    assert lm.model.hf_device_map["model.layers.1"] == "disk"
    with pytest.raises(kcache.InputError, match="exclude each other"):
        KCacheEngine().load(ModelOptions(model=str(folder), device="cpu", device_map=file), lambda *report: None)


def on_a_card(free: int, monkeypatch: pytest.MonkeyPatch, **policy: Any) -> tuple[Residency, ModelShape]:
    """The plan of a cache of 8,192 rows in 28 layers, on a card with so much free."""
    shape = ModelShape(
        k_row=ROW, v_row=ROW, layers=28, untiered=0, windows=(), query_heads=4, group=2, dim=4, query_width=16,
        hidden=16, inner=64, vocabulary=1000, dtype_bytes=4,
    )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 2 * free))
    for name in ("memory_reserved", "memory_allocated"):
        monkeypatch.setattr(torch.cuda, name, lambda device: 0)
    residency = Residency(kcache.Policy(dense_below=0, tail="none", dense_layers=2, **policy), 8192, shape=shape)
    residency.layers = [FakeLayer(index, FIRST) for index in range(28)]
    residency.devices = dict.fromkeys(range(28), FIRST)
    keys = torch.zeros(1, 2, 1, 4)
    residency.plan(residency.layers[0], keys, keys, 1)
    return residency, shape


def test_v_leaves_the_model_memory_to_work_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where V of most layers would fit beside the reserve, there must still be room for a prompt's activations."""
    whole, layer = 2 * 28 * ROW * 8192, ROW * 8192
    monkeypatch.setattr("kcache.layers.residency.reserve", lambda free: 2**20)
    monkeypatch.setattr("kcache.layers.residency.LEAST_RESERVE", 0)
    plan, shape = on_a_card(whole + 2**20 - layer, monkeypatch)
    working = shape.working_bytes(8192, 1, plan.policy, offloads=True)
    assert working > 10 * layer
    assert sum(stay(plan)) == 28 - (working + layer - 2**20 + layer - 1) // layer
    plan, _ = on_a_card(whole + shape.working_bytes(8192, 1, plan.policy, offloads=False), monkeypatch)
    assert all(stay(plan)), "what stays as a whole needs no room for V on its way"
    plan, _ = on_a_card(28 * layer + 2 * layer + 2**20, monkeypatch)
    assert sum(stay(plan)) == 2, "nothing is refused for an estimate"
    plan, _ = on_a_card(whole, monkeypatch, kv_budget=whole)
    assert all(stay(plan)), "a budget that was given is kept to"

"""A model over two GPUs: each layer's K on that layer's device, one threshold for all, the tokens of one GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import kcache
from tests.saved import save_tiny

pytestmark = pytest.mark.gpu(2)

MAP = {
    "model.embed_tokens": 0,
    "model.rotary_emb": 0,
    "model.layers.0": 0,
    "model.layers.1": 0,
    "model.layers.2": 1,
    "model.layers.3": 1,
    "model.norm": 1,
    "lm_head": 1,
}


def decode(lm: kcache.LoadedModel, policy: kcache.Policy) -> tuple[list[int], kcache.KCache]:
    cache = kcache.KCache(lm.model, policy, max_length=512)
    prompt = [3 + number % 200 for number in range(300)]
    greedy = kcache.Sampling(temperature=0)
    events = kcache.generate(lm, [prompt, prompt[:250]], cache=cache, sampling=greedy, max_new_tokens=24)
    return [event.token_id for event in events], cache


@pytest.mark.parametrize("spread", ["even", "need"])
@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_two_gpus_give_the_tokens_of_one(tmp_path: Path, spread: str, backend: str) -> None:
    folder = save_tiny(tmp_path, num_hidden_layers=4, head_dim=64)
    policy = kcache.Policy.from_dict(
        {"topn": 16, "dense_below": 0, "dense_layers": 1, "spread": spread, "backend": backend, "offload": "all"}
    )
    alone, _ = decode(kcache.load(folder, device_map="cuda:0", dtype="float32"), policy)
    spread_out, cache = decode(kcache.load(folder, device_map=MAP, dtype="float32"), policy)
    assert spread_out == alone
    assert [str(layer.device) for layer in cache.tiered_layers] == ["cuda:0", "cuda:0", "cuda:1", "cuda:1"]
    assert [layer.keys.device.index for layer in cache.tiered_layers] == [0, 0, 1, 1]
    assert [layer.offloaded for layer in cache.tiered_layers] == [False, True, True, True]


def test_weights_in_ram_run_on_the_gpus(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, num_hidden_layers=4, head_dim=64)
    policy = kcache.Policy(topn=16, dense_below=0, dense_layers=1, backend="reference")
    alone, _ = decode(kcache.load(folder, device_map="cuda:0", dtype="float32"), policy)
    offloaded, cache = decode(kcache.load(folder, device_map={**MAP, "model.layers.1": "cpu"}, dtype="float32"), policy)
    assert offloaded == alone
    assert all(layer.device.type == "cuda" for layer in cache.tiered_layers)
    assert torch.device("cuda", 1) in {layer.device for layer in cache.tiered_layers}

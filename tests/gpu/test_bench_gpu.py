"""The benchmark where there is a device: every engine runs, and what crosses the link is counted."""

from __future__ import annotations

import pytest
import torch

from kcache.bench.cases import make_cases
from kcache.bench.run import run
from kcache.bench.spec import Spec
from kcache.models.loaded import LoadedModel
from kcache.policy import Policy
from kcache.speed.machine import measure
from tests.bench.machines import tiny

pytestmark = pytest.mark.gpu

ENGINES = ("kcache", "dense", "hf-static", "hf-dynamic", "hf-offloaded")


@pytest.mark.parametrize("real_prefill", [False, True])
def test_every_engine_runs(real_prefill: bool) -> None:
    shape = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    lm = tiny(**shape)
    lm = LoadedModel("tiny", lm.model.to("cuda", torch.bfloat16), lm.tokenizer)
    policy = Policy(dense_below=0, dense_layers=1, offload="all", hot_rows=0)
    spec = Spec(ctxs=(512,), batches=(2,), topns=(32,), engines=ENGINES, policy=policy, repeats=2, steps=3,
                real_prefill=real_prefill, check_plan=True)  # fmt: skip
    (rows,) = list(run(lm, spec, make_cases(spec), measure("cuda")))
    assert [row.status for row in rows] == ["ok"] * 5, [row.reason for row in rows]
    kcache, dense, *_, offloaded = rows
    assert kcache.mode == "topn" and kcache.host_kv_bytes and kcache.link_bytes_per_token
    assert dense.link_bytes_per_token == 0 and dense.host_kv_bytes == 0
    assert offloaded.link_bytes_per_token and offloaded.link_bytes_per_token > kcache.link_bytes_per_token
    assert all(row.peak_memory_bytes and row.floor_multiple for row in rows)

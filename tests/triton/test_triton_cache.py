"""The Triton kernels through a cache: thresholds that follow from step to step, as the reference's do."""

from __future__ import annotations

import pytest
import torch

from kcache.attention import attach
from kcache.cache import KCache
from kcache.policy import Policy
from tests.models import left_padding, make, tokens
from tests.pair import forward

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on CPU tensors only if interpreted")

POLICY = Policy(topn=4, dense_layers=0, dense_below=0, resident_layers=0)


@pytest.mark.parametrize("policy", [POLICY, POLICY.replace(select="head", tail_rank=3)], ids=["group", "head"])
def test_triton_cache_decodes_as_the_reference(policy: Policy) -> None:
    model = make("llama", head_dim=16, num_hidden_layers=2)
    caches = [KCache(model, policy.replace(backend=backend)) for backend in ("triton", "reference")]
    mask = left_padding([58, 31])

    def step(ids: torch.Tensor) -> None:
        nonlocal mask
        if mask.shape[1] < caches[0].tiered_layers[0].length + ids.shape[1]:
            mask = torch.cat([mask, mask.new_ones(2, ids.shape[1])], 1)
        with attach(model):
            got, want = (forward(model, cache, ids, mask) for cache in caches)
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
        fetched = [[layer.rows_fetched for layer in cache.tiered_layers] for cache in caches]
        assert fetched[0] == fetched[1]

    step(tokens(1, 2, 58))
    for number in range(2):
        step(tokens(2 + number, 2, 1))
    for cache in caches:
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 0]))
    mask = mask[[1, 0], :-1]
    for number in range(2):
        step(tokens(5 + number, 2, 1))
    spreads = [cache.shared.spread for cache in caches]
    assert spreads[0] is not None and spreads[1] is not None
    torch.testing.assert_close(spreads[0].begin(0, 2, 2, mask.device)[0], spreads[1].begin(0, 2, 2, mask.device)[0])
    assert caches[0].stats.rows_fetched > 0
    assert caches[0].shared.backend(mask.device)._workspaces, "the reference answered instead"

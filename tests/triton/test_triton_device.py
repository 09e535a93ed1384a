"""The Triton kernels on a CUDA device at real sizes: captured in a graph, repeated."""

from __future__ import annotations

import pytest
import torch

from kcache.backends.base import DecodeStep
from kcache.backends.reference import ReferenceBackend
from kcache.backends.triton import DenseWorkspace, HotRows, Workspace, append, dense_decode, triton_decode
from kcache.policy import Policy, Spread
from kcache.tiers.lowrank import LowRankTail
from tests.triton.problem import assert_near

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

BATCH, KV_HEADS, GROUP, DIM, CAPACITY = 4, 8, 4, 128, 16384
POLICY = Policy(topn=128)


class State:
    """A tiered layer's buffers, filled up to ``length`` by the kernels' own append."""

    def __init__(self, length: int, hot: bool = False) -> None:
        options = {"dtype": torch.bfloat16, "device": "cuda"}
        shape = (BATCH, KV_HEADS, CAPACITY, DIM)
        self.keys = torch.full(shape, float("nan"), **options)
        self.near = torch.full(shape, float("nan"), **options)
        self.keys[:, :, :length] = torch.randn(BATCH, KV_HEADS, length, DIM, **options)
        self.near[:, :, :length] = torch.randn(BATCH, KV_HEADS, length, DIM, **options)
        self.values = torch.empty(shape, dtype=torch.bfloat16).pin_memory()
        self.values.copy_(self.near)
        tail = LowRankTail(None, torch.device("cuda"), lambda: CAPACITY)
        tail.append(self.near[:, :, :length], None, 0)
        self.lowrank = tail.state()
        self.threshold = torch.full((BATCH,), 2e-3, device="cuda")
        self.tally = torch.zeros(BATCH, dtype=torch.int64, device="cuda")
        self.length = torch.full((1,), length, dtype=torch.int32, device="cuda")
        self.query = torch.zeros(BATCH, KV_HEADS * GROUP, DIM, **options)
        self.new_key = torch.empty(BATCH, KV_HEADS, DIM, **options)
        self.new_value = torch.empty(BATCH, KV_HEADS, DIM, **options)
        self.hot = HotRows(BATCH, KV_HEADS, 512, DIM, torch.bfloat16, torch.device("cuda")) if hot else None
        self.draw()

    def draw(self) -> None:
        """A new token: the query stays near the last one, as real ones do."""
        self.query.copy_(0.9 * self.query + torch.randn_like(self.query))
        self.new_key.normal_()
        self.new_value.normal_()


def workspaces(spread: Spread) -> tuple[Workspace, DenseWorkspace]:
    device = torch.device("cuda")
    topn = Workspace(
        BATCH, KV_HEADS, GROUP, DIM, DIM, CAPACITY, POLICY.topn, device, spread=spread, itemsize=2
    )  # fmt: skip
    return topn, DenseWorkspace(BATCH, KV_HEADS, GROUP, DIM, DIM, CAPACITY, device)


@pytest.mark.parametrize("spread", ["need", "even"])
@pytest.mark.parametrize("hot", [False, True])
def test_triton_graph_replays_a_growing_context(hot: bool, spread: Spread) -> None:
    state = State(1000, hot)
    topn, dense = workspaces(spread)
    scaling = DIM**-0.5
    threshold, tally = (state.threshold, state.tally) if spread == "need" else (None, None)

    def step() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        append(
            state.new_key, state.new_value, state.keys, state.values, state.length, lowrank=state.lowrank
        )  # fmt: skip
        append(state.new_key, state.new_value, state.keys, state.near, state.length)
        state.length += 1
        found = triton_decode(
            state.query, state.keys, state.values, state.length, scaling=scaling, workspace=topn,
            lowrank=state.lowrank, threshold=threshold, tally=tally, hot=state.hot,
        )  # fmt: skip
        full = dense_decode(state.query, state.keys, state.near, state.length, scaling=scaling, workspace=dense)
        return *found, full

    step()  # compiles, and appends the first token
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, picks, mass, full = step()
    for count in range(40):
        state.draw()
        before = state.tally.clone()
        out.fill_(float("nan"))
        full.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        length = 1002 + count
        assert state.length.item() == length
        torch.testing.assert_close(state.values[:, :, length - 1].cuda(), state.new_value, rtol=0, atol=0)
        want = ReferenceBackend().decode(
            DecodeStep(
                state.query,
                state.keys,
                state.values,
                length,
                scaling,
                POLICY,
                lowrank=state.lowrank,
                threshold=threshold,
            )
        )
        shared = ((picks.unsqueeze(-1) == want.picks.unsqueeze(-2)).any(-1) & (picks >= 0)).sum()
        assert shared > 0.999 * (want.picks >= 0).sum()
        if threshold is not None:
            assert torch.equal(state.tally - before, (picks >= 0).flatten(1).sum(1))
        assert_near(out, want.out, torch.bfloat16)
        torch.testing.assert_close(mass, want.mass, rtol=1e-3, atol=1e-5)
        whole = torch.nn.functional.scaled_dot_product_attention(
            state.query.float().unsqueeze(2), state.keys[:, :, :length].float(), state.near[:, :, :length].float(),
            enable_gqa=True,
        ).squeeze(2)  # fmt: skip
        assert_near(full, whole, torch.bfloat16)
    if state.hot is not None:
        assert state.hot.hits.sum().item() > 0


@pytest.mark.parametrize("spread", ["need", "even"])
@pytest.mark.parametrize("hot", [False, True])
def test_triton_step_repeats_bit_for_bit(hot: bool, spread: Spread) -> None:
    state = State(CAPACITY, hot)
    topn, _ = workspaces(spread)
    seen = []
    for _ in range(30):
        out, picks, _ = triton_decode(
            state.query, state.keys, state.values, CAPACITY, scaling=DIM**-0.5, workspace=topn,
            lowrank=state.lowrank, threshold=state.threshold if spread == "need" else None, hot=state.hot,
        )  # fmt: skip
        seen.append((out, picks.clone()))
    for out, picks in seen[1:]:
        assert torch.equal(out, seen[0][0])
        assert torch.equal(picks, seen[0][1])

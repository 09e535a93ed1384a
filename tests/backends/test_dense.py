"""Exact attention equals attention written out in fp64, with masks, sinks, soft-capping and a past."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcache.backends import dense


def straight(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor | None,
    scaling: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """Attention by its definition; a query that may attend nothing gives zeros."""
    heads, count = query.shape[1:3]
    length = keys.shape[2]
    keys, values = (rows.double().repeat_interleave(heads // rows.shape[1], 1) for rows in (keys, values))
    scores = query.double() @ keys.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    if mask is None:
        mask = torch.ones(count, length, dtype=torch.bool).tril(length - count)
    if mask.dtype != torch.bool:
        scores = scores + mask.double()
        mask = mask > -1e30
    peak = torch.where(mask, scores, -1e300).amax(-1, keepdim=True)
    exp = torch.where(mask, (scores - peak).exp(), 0.0)
    total = exp.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + (sinks.double().view(1, -1, 1, 1) - peak).exp()
    return (exp / total).nan_to_num(0) @ values


@settings(max_examples=120, derandomize=True, deadline=None, database=None)
@given(
    seed=st.integers(0, 10**6),
    batch=st.integers(1, 3),
    kv_heads=st.integers(1, 3),
    group=st.sampled_from([1, 2, 4]),
    count=st.sampled_from([1, 2, 7, 33]),
    past=st.sampled_from([0, 1, 16, 50]),
    dims=st.sampled_from([(8, 8), (16, 16), (8, 12)]),
    masking=st.sampled_from(["causal", "bool", "additive"]),
    softcap=st.sampled_from([None, None, 1.5]),
    sinks=st.booleans(),
    spare=st.sampled_from([0, 9]),
)
def test_attend(
    seed: int,
    batch: int,
    kv_heads: int,
    group: int,
    count: int,
    past: int,
    dims: tuple[int, int],
    masking: str,
    softcap: float | None,
    sinks: bool,
    spare: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=draw)

    length = past + count
    query = randn(batch, count, kv_heads * group, dims[0]).transpose(1, 2)
    keys = randn(batch, kv_heads, length + spare, dims[0])[:, :, :length]
    values = randn(batch, kv_heads, length + spare, dims[1])[:, :, :length]
    mask = None
    if masking != "causal":
        mask = torch.ones(count, length, dtype=torch.bool).tril(past).expand(batch, 1, -1, -1).clone()
        mask[0, :, :, : length // 2] = False
        if masking == "additive":
            mask[..., 0] = True  # where all is excluded, an additive mask attends evenly
            mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    sink = randn(kv_heads * group) if sinks else None
    got = dense.attend(query, keys, values, mask, 0.3, softcap, sink)
    want = straight(query, keys, values, mask, 0.3, softcap, sink)
    assert got.shape == want.shape
    torch.testing.assert_close(got.double(), want, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count", [1, 20])
@pytest.mark.parametrize("past", [0, 40])
@pytest.mark.parametrize("masked", [False, True])
def test_half_precision(dtype: torch.dtype, count: int, past: int, masked: bool) -> None:
    query, keys, values = (
        torch.randn(2, heads, n, 16).to(dtype) for heads, n in ((4, count), (2, past + count), (2, past + count))
    )
    mask = torch.ones(count, past + count, dtype=torch.bool).tril(past).expand(2, 1, -1, -1) if masked else None
    got = dense.attend(query, keys, values, mask, 0.25)
    assert got.dtype == dtype
    torch.testing.assert_close(
        got.double(), straight(query, keys, values, mask, 0.25, None, None), atol=0.03, rtol=0.03
    )


def test_a_mask_of_its_own_per_head() -> None:
    query, keys, values = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    mask = torch.rand(2, 4, 1, 9) < 0.7
    mask[..., -1] = True
    for softcap in (None, 2.0):
        got = dense.attend(query, keys, values, mask, 0.3, softcap)
        torch.testing.assert_close(
            got.double(), straight(query, keys, values, mask, 0.3, softcap, None), atol=1e-5, rtol=1e-4
        )


def test_slices_of_queries_when_scores_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    query, keys, values = torch.randn(2, 4, 30, 8), torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 8)
    whole = dense.attend(query, keys, values, None, 0.3, 2.0)
    monkeypatch.setattr("kcache.backends.plain._SCORE_BYTES", 2 * 4 * 50 * 4 * 7)
    torch.testing.assert_close(dense.attend(query, keys, values, None, 0.3, 2.0), whole)


@pytest.mark.parametrize("past", [0, 9])
@pytest.mark.parametrize("heads_of_mask", [None, 1, 6])
@pytest.mark.parametrize("room", [1, 2 * 2 * 40 * 24 * 4, 2**30])
def test_kernels_that_know_no_groups_take_some_heads_at_a_time(
    past: int, heads_of_mask: int | None, room: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dense, "_knows_groups", lambda *_: False)
    monkeypatch.setattr(dense, "_REPEATED_BYTES", room)
    draw = torch.Generator().manual_seed(past)
    query = torch.randn(2, 6, 31, 16, generator=draw)
    keys, values = torch.randn(2, 3, 31 + past, 16, generator=draw), torch.randn(2, 3, 31 + past, 8, generator=draw)
    mask = None
    if heads_of_mask is not None:
        mask = torch.rand(2, heads_of_mask, 31, 31 + past, generator=draw) < 0.7
        mask[..., 0] = True
    want = straight(query, keys, values, mask, 0.25, None, None)
    parts = dense._some_heads_at_a_time(query, keys, values, mask, 0.25)
    torch.testing.assert_close(parts.double(), want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(dense.attend(query, keys, values, mask, 0.25).double(), want, atol=1e-5, rtol=1e-5)


def test_on_a_card_only_flash_attention_knows_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense, "is_too_old", lambda device: device.index == 1)

    class On:
        """As much of a tensor as is asked about."""

        def __init__(self, place: str, dtype: torch.dtype = torch.bfloat16, dim: int = 128) -> None:
            self.device, self.dtype, self.shape = torch.device(place), dtype, (1, 8, 64, dim)

    def knows(query: On, mask: object = None) -> bool:
        return dense._knows_groups(query, query, mask)  # type: ignore[arg-type]

    assert knows(On("cuda:0"))
    assert knows(On("cpu"), mask=object())
    assert not knows(On("cuda:0"), mask=object())
    assert not knows(On("cuda:1", torch.float16))
    assert not knows(On("cuda:0", torch.float32))
    assert not knows(On("cuda:0", dim=320))

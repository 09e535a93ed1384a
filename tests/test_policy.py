"""A policy validates itself, compares by value and survives a round trip through plain values."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcache.errors import KCacheError, PolicyError
from kcache.policy import Policy, parse_bytes

BAD: list[tuple[str, Any]] = [
    *[("topn", value) for value in (0, -1, 1.5, float("nan"), "64", None, True, False)],
    *[("dense_layers", value) for value in (-1, 0.5, None, True)],
    *[("dense_below", value) for value in (-1, 0.5, None, True)],
    *[("tail_rank", value) for value in (0, -16, 1.0)],
    *[("tail_rank", value) for value in (0, -4, 1.5)],
    *[("prefill_chunk", value) for value in (0, -1, None)],
    *[("resident_layers", value) for value in (-1, 1.5, True)],
    *[("select", value) for value in ("all", "", None, 3, "Group")],
    *[("tail", value) for value in ("mean", None, True)],
    *[("offload", value) for value in ("some", None, True)],
    *[("backend", value) for value in ("cuda", None)],
    *[("kv_budget", value) for value in ("lots", "-1GiB", -1, "", "1 potato", "nan", True, "GiB")],
]


@pytest.mark.parametrize(("name", "value"), BAD)
def test_nonsense_is_refused_with_a_helpful_text(name: str, value: Any) -> None:
    with pytest.raises(ValueError) as refused:  # noqa: PT011 - the type is the promise
        Policy(**{name: value})
    assert isinstance(refused.value, PolicyError)
    assert isinstance(refused.value, KCacheError)
    text = str(refused.value)
    assert "\n" not in text
    assert repr(value) in text or str(value) in text
    if name != "kv_budget":
        assert name in text


def test_contradictions_are_refused() -> None:
    with pytest.raises(PolicyError, match="resident_layers"):
        Policy(offload="none", resident_layers=3)
    with pytest.raises(PolicyError, match="topn"):
        Policy().replace(topn=0)
    with pytest.raises(PolicyError, match="unknown policy field 'tail_block'"):
        Policy.from_dict({"topn": 64, "tail_block": 16})
    with pytest.raises(PolicyError, match="unknown policy field 'top_n'"):
        Policy.from_dict({"top_n": 3})


def test_defaults_are_within_what_was_promised() -> None:
    policy = Policy()
    assert 512 <= policy.dense_below <= 2048
    assert (policy.select, policy.offload, policy.backend) == ("group", "auto", "auto")
    assert policy.tail == "lowrank"
    assert policy.dense_layers > 0


def test_the_paper() -> None:
    paper = Policy.paper(96)
    assert (paper.topn, paper.select, paper.tail, paper.dense_layers) == (96, "head", "none", 0)
    assert Policy.paper().topn == Policy().topn
    assert Policy.paper(8, dense_layers=1, tail="renormalise").tail == "renormalise"
    assert Policy.paper(8, dense_layers=1).dense_layers == 1
    with pytest.raises(PolicyError):
        Policy.paper(0)


@pytest.mark.parametrize(
    ("given", "kernels", "itemsize", "kept"),
    [
        ("auto", True, 2, "8+8"),
        ("auto", True, 4, 16),
        ("auto", False, 2, 16),
        (16, True, 2, 16),
        (8, True, 2, 8),
        ("8+8", False, 4, "8+8"),
    ],
)
def test_k_is_kept_in_two_planes_where_kernels_decode_it(given: Any, kernels: bool, itemsize: int, kept: Any) -> None:
    policy = Policy(topn=7, k_bits=given)
    assert policy.settled(kernels, itemsize) == policy.replace(k_bits=kept)
    assert Policy.paper().settled(kernels, itemsize) == Policy.paper()
    assert Policy(offload="none", k_bits=given).settled(kernels, itemsize).key_planes in (0, policy.key_planes)


def test_value_semantics() -> None:
    assert Policy(topn=3) == Policy(topn=3) != Policy(topn=4)
    assert Policy(kv_budget="1GiB") == Policy(kv_budget=2**30)
    assert hash(Policy(kv_budget="1KiB")) == hash(Policy(kv_budget=1024))
    assert Policy().replace(topn=5) == Policy(topn=5)
    with pytest.raises(FrozenInstanceError):
        Policy().topn = 3  # type: ignore[misc]


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(
    st.builds(
        Policy,
        topn=st.integers(1, 10**9),
        dense_layers=st.integers(0, 99),
        dense_below=st.integers(0, 10**6),
        select=st.sampled_from(["group", "head"]),
        tail=st.sampled_from(["lowrank", "renormalise", "none"]),
        offload=st.sampled_from(["auto", "all"]),
        kv_budget=st.sampled_from([None, 0, 7, "20GiB", "1.5MB"]),
        resident_layers=st.sampled_from([None, 0, 3]),
        prefill_chunk=st.integers(1, 10**6),
        backend=st.sampled_from(["auto", "reference", "cpu", "triton"]),
    )
)
def test_round_trip(policy: Policy) -> None:
    data = policy.to_dict()
    assert Policy.from_dict(data) == policy
    assert list(data) == [field.name for field in fields(Policy) if field.name in data]
    assert None not in data.values()


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        (12, 12),
        ("12", 12),
        ("12b", 12),
        ("1k", 1024),
        ("1K", 1024),
        ("1KiB", 1024),
        ("1kb", 1000),
        (" 20 GiB ", 20 * 2**30),
        ("1.5g", 3 * 2**29),
        ("2TB", 2 * 10**12),
        ("0.5MiB", 2**19),
        ("1.", 1),
    ],
)
def test_sizes(text: int | str, size: int) -> None:
    assert parse_bytes(text) == size


def test_whole_numbers_of_numpy_are_taken_as_such() -> None:
    policy = Policy(topn=np.int64(64), tail_rank=np.int32(3))  # type: ignore[arg-type]
    assert policy == Policy(topn=64, tail_rank=3)
    assert type(policy.topn) is int
    with pytest.raises(PolicyError, match="topn must be a whole number"):
        Policy(topn=np.float64(64))  # type: ignore[arg-type]


def test_pieces_of_large_batches_are_shorter() -> None:
    assert [Policy().piece(batch) for batch in (1, 8, 9, 16, 128, 1000)] == [4096, 4096, 3640, 2048, 256, 256]
    assert [Policy(prefill_chunk=100).piece(batch) for batch in (1, 1000)] == [100, 100]

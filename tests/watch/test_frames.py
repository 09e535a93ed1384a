"""A frame through its columns: what is computed of picks, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kcache.errors import FormatError
from kcache.machine.arriving import Arriving
from kcache.telemetry import Stats
from kcache.watch.build import build
from kcache.watch.codec import pack, unpack
from kcache.watch.columns import STATS, read_frame
from kcache.watch.frame import Frame, Memory, bucket_tokens, since, zoom
from kcache.watch.moment import Captured, Picks
from tests.watch.steps import Steps


def sent(steps: Steps) -> tuple[dict[str, Any], Frame]:
    columns = unpack(pack(steps.step()))
    return columns, read_frame(columns)


@pytest.fixture(scope="module")
def steps() -> Steps:
    return Steps(layers=4, kv_heads=2, group=3, topn=16, tokens=5000)


def test_histogram_overlap_and_mass_are_those_of_the_picks(steps: Steps) -> None:
    _, before = sent(steps)
    _, frame = sent(steps)
    assert frame.tokens == before.tokens + 1
    assert frame.bucket_tokens == 64
    assert frame.heat.shape == (4, frame.buckets) == (4, 79)
    for layer, earlier in zip(frame.layers, before.layers, strict=True):
        assert layer.picks is not None and earlier.picks is not None
        assert layer.picks.shape == (1, 2, 16)
        assert (np.diff(layer.picks, axis=-1) > 0).all()
        counts = [((layer.picks // 64) == bucket).sum() for bucket in range(79)]
        assert layer.histogram.tolist() == counts
        again = sum(len(np.intersect1d(now, then)) for now, then in zip(layer.picks[0], earlier.picks[0], strict=True))
        assert layer.overlap == pytest.approx(again / 32, abs=0.006)
        assert layer.mass is not None and layer.mass.shape == (6,)
        assert layer.held is not None and layer.weights is not None
        held = [float(layer.weights[layer.picks // 64 == bucket].sum()) / 2 for bucket in range(79)]
        assert layer.held.tolist() == pytest.approx(held, rel=0.02, abs=1e-3)
        assert layer.held.sum() == pytest.approx(float(layer.mass.mean()), abs=0.03)
        assert (layer.held[layer.histogram == 0] == 0).all()
    assert np.abs(np.concatenate([layer.mass for layer in frame.layers]) - steps._mass).max() <= 0.0051
    assert frame.totals.rows_fetched == sum(layer.stats.rows_fetched for layer in frame.layers)
    assert frame.totals.tokens == frame.tokens
    with pytest.raises(ValueError, match="read-only"):
        frame.layers[0].histogram[0] = 1


def test_layers_of_different_shapes_and_picks_per_query_head(steps: Steps) -> None:
    shapes = ((1, 2, 3), (), (1, 1, 2, 4), (1, 2, 5))
    flat = torch.tensor(
        [5, 1, 3, 2, 9, 8, 7, 0, 4, 1, 7, 3, 2, 9, 0, -1, 6, 2, -1, 4, -1, -1, -1, 8], dtype=torch.int32
    )
    picks = Picks((1, 1), 1, shapes, (2, 0, 2, 2), (flat,), (), ())
    mass = Arriving(torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]))
    weights = torch.arange(24) / 100
    counts = [tuple(10 if name == "tokens" else 0 for name in STATS)] * 4
    before = torch.tensor([3, 1, 9, 8, 9, 2, -1, 2, -1, -1], dtype=torch.int32)
    shapes_before = ((1, 2, 3), (), (1, 1, 2, 1), (1, 2, 1))
    captured = Captured(
        9,
        1.0,
        1,
        counts,
        bytes(4),
        bytes(4),
        picks,
        (Arriving(flat),),
        (mass,),
        (Arriving(weights),),
        (Arriving(before),),
        shapes_before,
    )
    frame = read_frame(unpack(pack(build(captured, steps.text, Memory(), "decode", 1))))
    assert [None if layer.picks is None else layer.picks.tolist() for layer in frame.layers] == [
        [[[1, 3, 5], [2, 8, 9]]],
        None,
        [[[0, 1, 2, 3, 4, 7, 7, 9]]],
        [[[0, 2, 6], [4, 8, -1]]],
    ]
    near = {"abs": 0.005, "rel": 0.02}
    first, nothing, per_head, last = frame.layers
    assert first.weights is not None and per_head.weights is not None and last.weights is not None
    assert first.weights.ravel().tolist() == pytest.approx([0.01, 0.02, 0, 0.03, 0.05, 0.04], **near)
    wanted = [0.07, 0.09, 0.12, 0.11, 0.08, 0.06, 0.10, 0.13]  # in the order of picks, those of 7 either way
    assert per_head.weights.ravel().tolist() == pytest.approx([weight / 2 for weight in wanted], **near)
    assert last.weights.ravel().tolist() == pytest.approx([0.14, 0.17, 0.16, 0.19, 0.23, 0], **near)
    assert nothing.weights is None and nothing.held is None
    assert first.held is not None and per_head.held is not None
    assert first.held.tolist() == pytest.approx([0, 0.005, 0.015, 0.01, 0, 0, 0, 0, 0.025, 0.02], **near)
    assert per_head.held.tolist() == pytest.approx([0.035, 0.045, 0.06, 0.055, 0.04, 0, 0, 0.08, 0, 0.065], **near)
    assert [layer.overlap for layer in frame.layers] == [0.83, None, 0.12, 0]
    assert frame.layers[1].mass is None
    assert frame.layers[2].mass is not None and frame.layers[2].mass.tolist() == pytest.approx([0.3, 0.4])
    assert frame.layers[2].histogram.tolist() == [1, 1, 1, 1, 1, 0, 0, 2, 0, 1]


@pytest.mark.parametrize(("tokens", "width"), [(0, 1), (128, 1), (129, 2), (8192, 64), (8193, 128), (131072, 1024)])
def test_bucket_tokens(tokens: int, width: int) -> None:
    assert bucket_tokens(tokens) == width


def test_zoom_counts_in_a_range() -> None:
    picks = np.array([[[0, 10, 11, 29, 30, 99]]])
    assert zoom(picks, 10, 30, 2).tolist() == [2, 2]  # numpy counts the very end in
    assert zoom(picks, 5, 5, 1).tolist() == [0]


def test_since_is_never_negative() -> None:
    before, after = Stats(bytes_h2d=10, steps=4, device_bytes=7), Stats(bytes_h2d=15, steps=6, device_bytes=3)
    assert since(before, after) == Stats(bytes_h2d=5, steps=2, device_bytes=3)
    assert since(after, before) == Stats(bytes_h2d=10, steps=4, device_bytes=7)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", -1),
        ("tokens", True),
        ("time", float("nan")),
        ("time", "now"),
        ("kinds", b"\x09\0\0\0"),
        ("modes", b"\0"),
        ("phase", 7),
        ("counts", np.zeros((2, 4), np.int64)),
        ("counts", np.full((12, 4), -1, np.int64)),
        ("counts", np.zeros((len(STATS) + 1, 4), np.int64)),
        ("counts", np.array(3)),
        ("histogram", np.array(3)),
        ("histogram", np.zeros((4, 100), np.int64)),
        ("overlap", None),
        ("held", np.zeros((4, 64), np.uint8)),
        ("held", np.full((4, 128), 256, np.uint16)),
        ("weights", np.zeros(3, np.uint8)),
        ("heads", np.full(4, 2**25, np.int64)),
        ("mass", np.full(24, 101, np.uint8)),
        ("shapes", np.full((4, 2), 2**25, np.int64)),
        ("rows", np.full(8, 2**25, np.int64)),
        ("picks", np.full(128, 2**30, np.int64)),
        ("marks", [[1, 2, 3]]),
        ("marks", [["a", 1]]),
        ("sequences", {}),
        ("memory", [1]),
        ("speed", [None, "fast", None]),
        ("job", [1]),
    ],
)
def test_a_malformed_column_is_named(steps: Steps, name: str, value: Any) -> None:
    columns, _ = sent(steps)
    with pytest.raises(FormatError, match=name):
        read_frame({**columns, name: value})


def test_frames_made_before_hot_rows_were_counted_are_read(steps: Steps) -> None:
    columns, _ = sent(steps)
    older = {**columns, "counts": columns["counts"][:12]}
    assert STATS[12:] == ("hot_bytes",)
    assert read_frame(older).totals == replace(read_frame(columns).totals, hot_bytes=0)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_whatever_is_sent_is_a_frame_or_refused(data: st.DataObject) -> None:
    message = bytearray(_FRAME)
    for _ in range(data.draw(st.integers(1, 4))):
        message[data.draw(st.integers(0, len(message) - 1))] = data.draw(st.integers(0, 255))
    try:
        frame = read_frame(unpack(bytes(message)))
    except FormatError:
        return
    assert frame.heat.shape[0] == len(frame.layers)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_a_message_or_refused(data: bytes) -> None:
    try:
        message = unpack(data)
    except FormatError:
        return
    assert isinstance(message, dict)


_FRAME = pack(Steps(layers=2, kv_heads=1, group=1, topn=4, tokens=300).step())

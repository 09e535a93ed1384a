"""Recordings: what is written is what is read, small, and of a cut or damaged file as much as there is."""

from __future__ import annotations

import os
import zlib
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcache.errors import FormatError, InputError
from kcache.watch.codec import Message, pack, unpack
from kcache.watch.columns import read_frame
from kcache.watch.frame import Frame, Info
from kcache.watch.kcr import HEAD, HEADER, KEY, MAGIC, START, VERSION, record
from kcache.watch.recorder import Recorder
from kcache.watch.recording import Recording, open_recording
from kcache.watch.source import Source
from tests.watch.steps import Steps

INFO = Info(1, "test", "tiny", 1.0, "CPU", True, 100, policy={"topn": 4})


def written(path: Path, steps: Steps, count: int, end: bool = True) -> list[Frame]:
    """Record ``count`` steps; returns their frames as a live viewer would have them."""
    recorder = Recorder(path)
    recorder.begin(asdict(INFO))
    frames = []
    for _ in range(count):
        columns = steps.step()
        recorder.write(columns, steps.text)
        frames.append(read_frame(unpack(pack(columns))))
    if end:
        recorder.close("the run ended")
    assert recorder.problem is None
    return frames


def alike(one: Frame, other: Frame) -> None:
    """The same but for exact picks."""
    assert (one.number, one.time_s, one.tokens, one.totals) == (other.number, other.time_s, other.tokens, other.totals)
    assert (one.marks, one.sequences, one.speed, one.memory) == (
        other.marks,
        other.sequences,
        other.speed,
        other.memory,
    )
    for layer, twin in zip(one.layers, other.layers, strict=True):
        assert (layer.stats, layer.overlap, layer.mode) == (twin.stats, twin.overlap, twin.mode)
        assert np.array_equal(layer.histogram, twin.histogram)
        assert layer.mass is not None and twin.mass is not None
        assert np.array_equal(layer.mass, twin.mass)
        if layer.held is not None:
            assert twin.held is not None
            assert layer.held == pytest.approx(np.where(twin.held < 0.01, 0, twin.held), rel=0.15, abs=0.011)


def small() -> Steps:
    return Steps(layers=3, kv_heads=2, group=2, topn=8, tokens=500)


def test_reads_back_every_frame_in_any_order(tmp_path: Path) -> None:
    steps = small()
    frames = written(tmp_path / "run.kcr", steps, 150)
    recording = open_recording(tmp_path / "run.kcr")
    assert isinstance(recording, Source)
    assert recording.closed is None and not recording.live
    assert recording.info == INFO
    assert recording.span() == range(150)
    for index in [*range(150), 3, 149, 70, 69, 71, 0]:
        alike(recording.frame(index), frames[index])
    latest = recording.latest()
    assert latest is not None and latest.number == frames[-1].number
    with pytest.raises(IndexError):
        recording.frame(150)


def test_text_as_it_was_at_each_frame(tmp_path: Path) -> None:
    steps = small()
    frames = written(tmp_path / "run.kcr", steps, 20)
    recording = open_recording(tmp_path / "run.kcr")
    words = [f" w{token}" for token in steps.text.rows[0].ids]
    for index in (19, 0, 7):
        tokens = frames[index].tokens
        assert recording.pieces(tokens - 3, tokens + 2, index=index) == [*words[tokens - 3 : tokens], "", ""]
    assert recording.pieces(0, 4) == words[:4]
    assert recording.pieces(0, 2, sequence=1) == ["", ""]


def test_two_kib_a_step_at_32_layers(tmp_path: Path) -> None:
    path = tmp_path / "run.kcr"
    steps = Steps(layers=32, kv_heads=8, group=4, topn=128, tokens=32_000)
    recorder = Recorder(path)
    recorder.begin(asdict(INFO))
    recorder.write(steps.step(), steps.text)  # with the text of the prompt, which is no part of a step
    before = path.stat().st_size
    for _ in range(100):
        recorder.write(steps.step(), steps.text)
    recorder.close("done")
    assert (path.stat().st_size - before) / 100 <= 2048


def test_what_buckets_hold_is_written_where_there_is_room(tmp_path: Path) -> None:
    for name, steps, least in (
        ("small", small(), 40),
        ("demo", Steps(layers=30, kv_heads=3, group=3, topn=32, tokens=6000), 10),
        ("large", Steps(layers=32, kv_heads=4, group=4, topn=64, tokens=32_000), 10),
    ):
        written(tmp_path / f"{name}.kcr", steps, 40)
        recording = open_recording(tmp_path / f"{name}.kcr")
        frames = [recording.frame(index) for index in recording.span()]
        assert sum(frame.layers[0].held is not None for frame in frames) >= least
        for frame in frames:
            for layer in frame.layers:
                assert layer.weights is None
                assert layer.held is None or layer.held.shape == layer.histogram.shape


def test_a_recording_of_before_buckets_said_what_they_hold() -> None:
    """Twelve steps of :func:`small`, written by kcache as it was then."""
    recording, steps = open_recording(Path(__file__).parent / "earlier.kcr"), small()
    assert recording.closed is None and recording.span() == range(12)
    for index in recording.span():
        frame, twin = recording.frame(index), read_frame(steps.step())
        assert (frame.tokens, frame.step) == (twin.tokens, twin.step)
        for layer in frame.layers:
            assert layer.histogram.any() and layer.mass is not None
            assert layer.held is None and layer.weights is None


def test_only_steps_pay_for_picks(tmp_path: Path) -> None:
    """A prompt of many frames, or a step with many looks in between, makes no step larger than it may be."""
    path = tmp_path / "run.kcr"
    steps = Steps(layers=32, kv_heads=8, group=4, topn=128, tokens=4000)
    recorder = Recorder(path)
    recorder.begin(asdict(INFO))
    frame = steps.step()
    nothing = {**frame, "counts": np.zeros_like(frame["counts"])}
    recorder.write(nothing, steps.text)
    before = path.stat().st_size
    for _ in range(60):
        recorder.write({**nothing}, steps.text)
    for _ in range(20):
        columns = steps.step()
        for _ in range(3):
            recorder.write(columns, steps.text)
    recorder.close("done")
    assert (path.stat().st_size - before) / 20 <= 2048 + 3 * 200


def test_exact_picks_are_there_where_there_is_room_for_them(tmp_path: Path) -> None:
    frames = written(tmp_path / "run.kcr", small(), 100)
    recording = open_recording(tmp_path / "run.kcr")
    exact = [index for index in recording.span() if recording.frame(index).layers[0].picks is not None]
    assert len(exact) > 5
    for index in exact:
        for layer, twin in zip(recording.frame(index).layers, frames[index].layers, strict=True):
            assert np.array_equal(layer.picks, twin.picks)


def test_cut_anywhere_gives_the_frames_before(tmp_path: Path) -> None:
    path = tmp_path / "run.kcr"
    frames = written(path, small(), 3)
    data = path.read_bytes()
    header_end = START.size + HEAD.size + HEAD.unpack_from(data, START.size)[0]
    seen = set()
    for end in range(header_end, len(data)):
        path.write_bytes(data[:end])
        recording = open_recording(path)
        count = len(recording.span())
        seen.add(count)
        assert recording.closed is not None
        for index in recording.span():
            alike(recording.frame(index), frames[index])
    assert seen == set(range(4))


def test_what_a_cut_file_says(tmp_path: Path) -> None:
    path = tmp_path / "run.kcr"
    written(path, small(), 3, end=False)
    assert open_recording(path).closed == "the recording has no end: the process stopped after record 7"
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    closed = open_recording(path).closed
    assert closed is not None and closed.startswith("record 7 at byte ") and closed.endswith(" is cut short")


def test_a_damaged_record_costs_the_frames_up_to_the_next_key(tmp_path: Path) -> None:
    path = tmp_path / "run.kcr"
    frames = written(path, small(), 130)
    place = open_recording(path)._frames[10]
    data = bytearray(path.read_bytes())
    data[place.offset + 5] ^= 0xFF
    path.write_bytes(data)
    recording = open_recording(path)
    assert recording.closed == f"record {place.record} at byte {place.offset - HEAD.size} is damaged"
    left = [recording.frame(index) for index in recording.span()]
    assert [frame.number for frame in left] == [frame.number for frame in frames[:10] + frames[64:]]
    alike(left[-1], frames[-1])


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "not a recording"),
        (b"hello", "not a recording"),
        (START.pack(MAGIC, VERSION + 1), f"version {VERSION + 1}, this kcache reads {VERSION}"),
        (START.pack(MAGIC, VERSION), "no end"),
        (START.pack(MAGIC, VERSION) + b"\xff" * 40, "record 1 at byte 10 is cut short"),
        (START.pack(MAGIC, VERSION) + record(HEADER, {"pid": -1}), "record 1 at byte 10: "),
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "x.kcr"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=said):
        open_recording(path)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        open_recording(tmp_path / "nowhere.kcr")


def test_a_frame_that_is_malformed_behind_a_right_checksum(tmp_path: Path) -> None:
    path = tmp_path / "run.kcr"
    written(path, small(), 2, end=False)
    with path.open("ab") as file:
        file.write(record(KEY, {"tokens": "many"}))
    recording = open_recording(path)
    assert recording.span() == range(3)
    latest = recording.latest()
    assert latest is not None and latest.number == 2
    assert recording.span() == range(2)


def test_a_bomb_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run.kcr"
    written(path, small(), 1, end=False)
    deflate = zlib.compressobj(9, wbits=-15)
    payload = b"T" + deflate.compress(bytes(64 * 2**20)) + deflate.flush()
    with path.open("ab") as file:
        file.write(HEAD.pack(len(payload), zlib.crc32(payload)) + payload)
    closed = open_recording(path).closed
    assert closed is not None and "not one deflated message" in closed


def test_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "run.kcr"
    path.write_text("mine")
    with pytest.raises(InputError, match="exists"):
        Recorder(path)
    assert path.read_text() == "mine"
    with pytest.raises(InputError, match="cannot be written"):
        Recorder(tmp_path / "no" / "folder.kcr")


def test_a_full_disk_ends_the_recording_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, path = small(), tmp_path / "run.kcr"
    recorder = Recorder(path)
    recorder.begin(asdict(INFO))
    recorder.write(steps.step(), steps.text)

    def full(file: int, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        recorder.write(steps.step(), steps.text)
    assert recorder.problem is not None and "No space left" in recorder.problem
    recorder.write(steps.step(), steps.text)
    recorder.close("the run ended")
    assert open_recording(path).span() == range(1)


def test_cropped_and_begun_again(tmp_path: Path) -> None:
    """A second run starts with a frame that stands alone, and its own text."""
    path = tmp_path / "run.kcr"
    recorder = Recorder(path)
    recorder.begin(asdict(INFO))
    for run, tokens in ((1, 40), (2, 10)):
        steps = Steps(layers=1, kv_heads=1, group=1, topn=4, tokens=tokens)
        columns = {**steps.step(), "run": run}
        steps.text.run = run
        recorder.write(columns, steps.text)
    recorder.close("done")
    recording = open_recording(path)
    assert [recording.frame(index).run for index in recording.span()] == [1, 2]
    assert all(recording.pieces(0, 11, index=1)) and recording.pieces(11, 12, index=1) == [""]
    assert all(recording.pieces(0, 41, index=0))


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_any_damage_is_survived(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "fuzz.kcr"
    content = bytearray(_recorded(tmp_path_factory))
    for _ in range(data.draw(st.integers(1, 5))):
        at = data.draw(st.integers(0, len(content) - 1))
        match data.draw(st.sampled_from(["set", "cut", "insert", "drop"])):
            case "set":
                content[at] = data.draw(st.integers(0, 255))
            case "cut":
                del content[max(1, at) :]
            case "insert":
                content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
            case _:
                del content[max(1, at) : max(1, at) + data.draw(st.integers(1, 40))]
    path.write_bytes(content)
    _read_all(path)


@settings(max_examples=300, deadline=None)
@given(
    records=st.lists(
        st.tuples(st.sampled_from([b"H", b"K", b"D", b"T", b"E", b"?"]), st.binary(max_size=40)), max_size=6
    )
)
def test_any_records_are_survived(records: list[tuple[bytes, bytes]], tmp_path_factory: pytest.TempPathFactory) -> None:
    """Right checksums over anything."""
    path = tmp_path_factory.getbasetemp() / "records.kcr"
    parts = [START.pack(MAGIC, VERSION), record(HEADER, asdict(INFO))]
    for kind, body in records:
        parts.append(HEAD.pack(len(body) + 1, zlib.crc32(kind + body)) + kind + body)
    path.write_bytes(b"".join(parts))
    _read_all(path)


_PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2**40) | st.floats() | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=300, deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from(["delta", "run", "parts", "marks", "counts", "kinds"]), _PLAIN),
    data=st.data(),
)
def test_any_messages_are_survived(
    changes: Message, data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Well-formed records whose messages make no sense."""
    path = tmp_path_factory.getbasetemp() / "messages.kcr"
    path.write_bytes(_recorded(tmp_path_factory))
    kind = data.draw(st.sampled_from([b"H", b"K", b"D", b"T"]))
    with path.open("ab") as file:
        file.write(record(kind, changes) + record(b"D", {"delta": ["counts"], **changes}))
    _read_all(path)


@settings(max_examples=200, deadline=None)
@given(
    info=st.dictionaries(st.sampled_from([*asdict(INFO), "more"]), _PLAIN),
    left_out=st.sets(st.sampled_from([*asdict(INFO)])),
)
def test_any_header_is_survived(info: Message, left_out: set[str], tmp_path_factory: pytest.TempPathFactory) -> None:
    """A header is right, or the file is refused."""
    path = tmp_path_factory.getbasetemp() / "header.kcr"
    message = {name: value for name, value in {**asdict(INFO), **info}.items() if name not in left_out}
    path.write_bytes(START.pack(MAGIC, VERSION) + record(HEADER, message))
    try:
        recording = open_recording(path)
    except FormatError:
        with pytest.raises(FormatError, match="record 1 at byte 10"):
            open_recording(path)
    else:
        assert isinstance(recording.info, Info) and isinstance(recording.info.model, str)


def _recorded(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.getbasetemp() / "whole.kcr"
    if not path.exists():
        written(path, Steps(layers=2, kv_heads=1, group=1, topn=4, tokens=60), 4)
    return path.read_bytes()


def _read_all(path: Path) -> None:
    try:
        recording = Recording(path)
    except FormatError:
        return
    for index in recording.span():
        try:
            frame = recording.frame(index)
        except IndexError:
            break
        assert len(recording.pieces(0, 5, index=index)) == 5
        assert frame.tokens >= 0
    recording.latest()

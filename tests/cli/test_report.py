"""``kcache inspect --report``: what is on the page, that it loads nothing, and that hostile recordings stay text."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
from collections.abc import Iterator
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcache.errors import KCacheError
from kcache.telemetry import Stats
from kcache.watch.codec import Message, pack, unpack
from kcache.watch.columns import read_frame
from kcache.watch.frame import HALF_LIFE_STEPS, Frame, Info
from kcache.watch.kcr import DELTA, HEADER, KEY, MAGIC, START, VERSION, record
from kcache.watch.recorder import Recorder
from kcache.watch.recording import open_recording
from kcache.watch.tokens import Pieces
from kcache_cli.inspect.values import state
from kcache_cli.inspect.view import show
from kcache_cli.report.charts import Axis, nice
from kcache_cli.report.colours import picture
from kcache_cli.report.heat import Heat, rebucketed
from kcache_cli.report.page import page
from kcache_cli.report.samples import frames
from kcache_cli.report.text import turns
from tests.cli.conftest import Run
from tests.watch.steps import Steps, Words

INFO = Info(12, "chat", "tiny", 1.8e9, "CPU", True, 100, policy={"topn": 8}, environment={"torch": "2.0"})
ATTACK = """</script><script>alert(1)</script><img src=x onerror=alert(2)>"'{{ 7*7 }}\x1b[31m\u202e<!--"""


class Hostile(Words):
    """A tokenizer all of whose tokens are an attack."""

    def decode(self, ids: list[int], **options: object) -> str:
        return ATTACK * len(ids)


class Parsed(HTMLParser):
    """A page as a browser would take it apart."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self._inside: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        while self._inside and self._inside.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self._inside and self._inside[-1] == "script":
            self.scripts[-1] += data
        elif not self._inside or self._inside[-1] != "style":
            self.text.append(data)

    def count(self, tag: str) -> int:
        return sum(found == tag for found, _ in self.tags)


class Repeated:
    """A source that shows one frame again and again, a step later each time."""

    live = False
    closed = None
    info = INFO

    def __init__(self, frame: Frame, count: int) -> None:
        self._frame, self._count = frame, count

    def span(self) -> range:
        return range(self._count)

    def frame(self, index: int) -> Frame:
        totals = replace(self._frame.totals, bytes_h2d=1000 * index, steps=index + 1)
        return replace(self._frame, number=index, step=index + 1, time_s=1.8e9 + 0.05 * index, totals=totals)

    def latest(self) -> Frame:
        return self.frame(self._count - 1)

    def pieces(self, start: int, end: int, sequence: int = 0, index: int | None = None) -> list[str]:
        return [f" word{token}" for token in range(start, end)]

    def names(self, index: int | None = None) -> tuple[str, ...]:
        return ()

    def ask(self, **wishes: object) -> None: ...

    def close(self) -> None: ...


def recorded(path: Path, steps: Steps, count: int = 6, info: Info = INFO, end: bool = True) -> Path:
    recorder = Recorder(path)
    recorder.begin(asdict(info))
    for _ in range(count):
        recorder.write(steps.step(), steps.text)
    if end:
        recorder.close("the run ended")
    return path


def small() -> Steps:
    return Steps(layers=3, kv_heads=2, group=2, topn=8, tokens=500)


def one_frame(tokens: int = 500, steps: Steps | None = None) -> Frame:
    steps = steps or Steps(layers=32, kv_heads=2, group=2, topn=8, tokens=tokens)
    return read_frame(unpack(pack(steps.step())))


def test_the_page_of_a_recording(run: Run, tmp_path: Path) -> None:
    recording = recorded(tmp_path / "run.kcr", small())
    target = tmp_path / "out.html"
    result = run("inspect", str(recording), "--report", str(target))
    assert result.exit_code == 0, result.stderr
    assert result.stdout == "" and "the run as a page" in result.stderr
    parsed = Parsed(target.read_text(encoding="utf-8"))
    text = " ".join(" ".join(parsed.text).split())
    for part in (
        "tiny",
        "device tier (RAM)",
        "Where attention looks",
        "Step by step",
        "Memory",
        "Link",
        "topn",
        "torch",
    ):
        assert part in text
    assert parsed.count("table") == 2 and parsed.count("tr") >= 3 + 1
    maps = [dict(attributes) for tag, attributes in parsed.tags if tag == "div" and "data-cells" in attributes]
    last = open_recording(recording).latest()
    assert last is not None
    assert [(item["data-map"], item["data-rows"], item["data-columns"]) for item in maps] == [
        ("history", "3", str(last.buckets)),
        ("last", "3", str(last.buckets)),
        ("steps", "6", str(last.buckets)),
    ]
    assert not list(tmp_path.glob("tmp*"))


def test_it_loads_nothing_and_runs_one_script(tmp_path: Path) -> None:
    html = page(open_recording(recorded(tmp_path / "run.kcr", small())), "run.kcr")
    parsed = Parsed(html)
    for tag, attributes in parsed.tags:
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "srcset", "href", "action"):
                assert value is not None and value.startswith("data:image/png;base64,")
    assert not re.search(r"https?:|@import|url\(", html)
    policy = next(str(a["content"]) for tag, a in parsed.tags if a.get("http-equiv") == "Content-Security-Policy")
    data, script = parsed.scripts
    assert json.loads(data)["tokens"] == 506
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_hostile_words_stay_words(tmp_path: Path) -> None:
    steps = small()
    steps.text.pieces = Pieces(Hostile())
    info = Info(
        1,
        ATTACK,
        ATTACK,
        1.8e9,
        ATTACK,
        False,
        1,
        policy={ATTACK: ATTACK},
        environment={ATTACK: ATTACK},
    )
    attacked = Parsed(page(open_recording(recorded(tmp_path / "a.kcr", steps, info=info, end=False)), ATTACK))
    plain = Parsed(page(open_recording(recorded(tmp_path / "b.kcr", small())), "b.kcr"))
    assert len(attacked.scripts) == len(plain.scripts) == 2
    assert attacked.scripts[1] == plain.scripts[1]
    assert attacked.count("img") == plain.count("img")
    text = "".join(attacked.text)
    assert "<script>alert(1)</script>" in text and "{{ 7*7 }}" in text
    assert not re.search("[\x00-\x08\x1b\u202e]", text)


_NUMBERS = st.sampled_from([0, 1, 3, 500, 2**31, 2**51, 2**62, -1]) | st.floats(-1e19, 1e19) | st.none()


@settings(max_examples=40, deadline=None)
@given(
    changes=st.dictionaries(st.sampled_from(["tokens", "time", "run", "batch", "observed", "phase"]), _NUMBERS),
    marks=st.lists(st.tuples(_NUMBERS, st.integers(0, 2)).map(list), max_size=3),
    speed=st.lists(_NUMBERS, min_size=3, max_size=3),
    counts=st.integers(0, 2**51),
    started=_NUMBERS,
)
def test_any_numbers_make_a_page(
    changes: Message,
    marks: list[Any],
    speed: list[Any],
    counts: int,
    started: Any,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    """A recording whose checksums are right may say anything at all."""
    path = tmp_path_factory.getbasetemp() / "numbers.kcr"
    frame = small().step()
    odd = {**frame, "marks": marks, "speed": speed, "counts": np.full_like(frame["counts"], counts), **changes}
    info = {**asdict(INFO), "started_s": started}
    parts = [record(HEADER, info), record(KEY, frame), record(KEY, odd), record(DELTA, {"delta": [], **changes})]
    path.write_bytes(START.pack(MAGIC, VERSION) + b"".join(parts))
    with contextlib.suppress(KCacheError):
        source = open_recording(path)
        assert "Where the cache is" in page(source, "x")
        state(source, source.latest())
        show(source, source.latest())


def test_a_cut_recording_says_so(run: Run, tmp_path: Path) -> None:
    recording, target = recorded(tmp_path / "run.kcr", small()), tmp_path / "out.html"
    recording.write_bytes(recording.read_bytes()[:-9])
    result = run("inspect", str(recording), "--report", str(target))
    assert result.exit_code == 0
    assert "is cut short" in result.stderr and "is cut short" in target.read_text(encoding="utf-8")


def test_nothing_to_report(run: Run, tmp_path: Path) -> None:
    empty, target = recorded(tmp_path / "run.kcr", small(), count=0), tmp_path / "out.html"
    result = run("inspect", str(empty), "--report", str(target))
    assert result.exit_code == 2 and "no step was recorded" in result.stderr
    assert not target.exists()
    result = run("inspect", str(empty), "--report", str(tmp_path / "no" / "out.html"))
    assert result.exit_code == 2 and "does not exist" in result.stderr


def test_before_anything_was_picked(tmp_path: Path) -> None:
    """A run that stopped in its first prompt has memory and text, and no heat map."""
    frame = one_frame()
    layers = tuple(replace(layer, histogram=np.zeros_like(layer.histogram), mass=None) for layer in frame.layers)
    source = Repeated(replace(frame, layers=layers), 3)
    html = page(source, "x")
    assert "Where attention looks" not in html and "Where the cache is" in html


def test_a_long_run_is_a_couple_of_megabytes() -> None:
    html = page(Repeated(one_frame(60_000), 3000), "x")
    assert len(html.encode()) < 2 * 2**20
    assert "tokens are not shown" in html


def test_frames_taken_in_the_middle_of_a_step_are_left_out() -> None:
    frame = one_frame()

    class Middles(Repeated):
        def frame(self, index: int) -> Frame:
            whole = super().frame(index // 2)
            part = replace(whole, totals=replace(whole.totals, rows_fetched=index))
            return replace(part, number=index, phase="decode")

    kept = [index for index, _ in frames(Middles(frame, 10))]
    assert kept == [1, 3, 5, 7, 9]


def test_the_frame_that_says_it_is_over_does_not_replace_the_step() -> None:
    class Idle(Repeated):
        def frame(self, index: int) -> Frame:
            return replace(super().frame(min(index, 2)), phase="idle" if index > 2 else "decode")

    assert [(index, frame.phase) for index, frame in frames(Idle(one_frame(), 4))][-1] == (2, "decode")


@pytest.mark.parametrize(("width", "wanted"), [(1, 8), (8, 8), (16, 4)])
def test_rebucketing_keeps_sums(width: int, wanted: int) -> None:
    tokens = 64
    values = np.random.default_rng(0).random((3, tokens // width))
    found = rebucketed(values, width, wanted, tokens // wanted)
    assert found.shape == (3, tokens // wanted)
    assert np.allclose(found.sum(1), values.sum(1))
    wide = max(width, wanted)
    assert np.allclose(found.reshape(3, tokens // wide, -1).sum(2), values.reshape(3, tokens // wide, -1).sum(2))


def looking(at: int, step: int, run: int = 1, says: bool = True) -> Frame:
    frame = one_frame()
    histogram = np.zeros_like(frame.layers[0].histogram)
    histogram[at] = 10
    held = np.where(histogram > 0, at / 10, 0).astype(np.float32) if says else None
    layers = tuple(replace(layer, histogram=histogram, held=held) for layer in frame.layers)
    return replace(frame, layers=layers, step=step, run=run)


def test_the_history_fades_by_half() -> None:
    heat = Heat()
    for step in range(1, HALF_LIFE_STEPS + 1):
        heat.add(looking(3, step))
    for step in range(HALF_LIFE_STEPS + 1, 2 * HALF_LIFE_STEPS + 1):
        heat.add(looking(9, step))
    maps = heat.maps()
    assert maps is not None
    assert np.allclose(maps.history[:, 3] * 2, maps.history[:, 9])
    assert maps.last[:, 9].tolist() == [1.0] * len(maps.layers)
    assert maps.steps.shape[0] == 2 * HALF_LIFE_STEPS
    assert maps.steps[:HALF_LIFE_STEPS, 3].all() and not maps.steps[:HALF_LIFE_STEPS, 9].any()


def test_what_picks_hold_beside_where_they_are() -> None:
    heat = Heat()
    for step, says in enumerate((True, False, True), 1):
        heat.add(looking(2 * step, step, says=says))
    maps = heat.maps()
    assert maps is not None
    assert maps.held["last"][:, 6].tolist() == pytest.approx([0.6] * len(maps.layers))
    assert np.nansum(maps.held["steps"], 1).tolist() == pytest.approx([0.2, 0, 0.6])
    assert np.isnan(maps.held["steps"][1]).all() and not np.isnan(maps.held["steps"][[0, 2]]).any()
    first, last = maps.held["history"][0, 2], maps.held["history"][0, 6]
    weight = 0.5 ** (2 / HALF_LIFE_STEPS)
    assert last / 0.6 > first / 0.2 * weight and first / 0.2 + last / 0.6 == pytest.approx(1)
    silent = Heat()
    silent.add(looking(3, 1, says=False))
    unknown = silent.maps()
    assert unknown is not None and all(np.isnan(values).any() for values in unknown.held.values())


def test_a_new_run_has_a_heat_map_of_its_own() -> None:
    heat = Heat()
    heat.add(looking(3, 1))
    heat.add(looking(9, 1, run=2))
    maps = heat.maps()
    assert maps is not None and maps.run == 2
    assert not maps.history[:, 3].any() and len(maps.steps) == 1
    assert Heat().maps() is None


def test_a_picture_is_as_large_as_its_cells() -> None:
    found = picture(np.array([[0.0, 0.5], [1.0, 0.25]]), np.array([[0.0, 0.25], [1.0, np.nan]]))
    for image in (found.light, found.dark):
        data = base64.b64decode(image.removeprefix("data:image/png;base64,"))
        assert data.startswith(b"\x89PNG")
        assert (int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")) == (2, 2)
    cells = list(base64.b64decode(found.cells))
    assert cells[0] == 0 and cells[2] == 255 and cells[1] > cells[3]
    assert list(base64.b64decode(found.held)) == [0, 127, 254, 255]


def test_text_is_cut_where_buckets_and_turns_begin() -> None:
    frame = one_frame()
    found = turns(Repeated(frame, 1), 0, frame, None)
    starts = [piece.start for turn in found for piece in turn.pieces]
    assert all(start % frame.bucket_tokens == 0 or start in [mark.start for mark in frame.marks] for start in starts)
    words = "".join(piece.text for turn in found for piece in turn.pieces)
    assert words == "".join(f" word{token}" for token in range(frame.tokens))


def test_points_of_an_axis() -> None:
    axis = Axis(1500)
    assert axis.points == 600
    values = np.arange(1500.0)
    assert axis.last(values)[-1] == 1499
    assert axis.total(values).sum() == values.sum()
    values[:5] = np.nan
    assert np.isnan(axis.mean(values)[0]) and np.isfinite(axis.mean(values)[-1])


def test_scales_hold_what_they_show() -> None:
    for largest in _magnitudes():
        for base in (1000.0, 1024.0):
            assert largest <= nice(largest, base) <= 2.5 * largest
    assert nice(0) == nice(float("nan")) == 1.0


def _magnitudes() -> Iterator[float]:
    value = 1e-3
    while value < 1e13:
        yield value
        value *= 1.37


def test_a_run_of_nothing_but_zeros() -> None:
    """Counters of an empty cache make no division by zero."""
    frame = replace(one_frame(), totals=Stats(), layers=(), tokens=0, bucket_tokens=1, step=0)

    class Empty(Repeated):
        def frame(self, index: int) -> Frame:
            return frame

        def pieces(self, start: int, end: int, sequence: int = 0, index: int | None = None) -> list[str]:
            return []

    assert "Where the cache is" in page(Empty(frame, 1), "x")

"""Publishing a real, tiny model: what viewers in this process, on the socket and in the recording see."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

import kcache
from kcache import KCache, LoadedModel, Policy, Sampling, publish
from kcache.errors import InputError, WatchError
from kcache.watch.attach import Place, attach, find
from kcache.watch.frame import Frame, Mark
from kcache.watch.publication import Publication
from kcache.watch.recording import open_recording
from kcache.watch.source import Source
from tests.test_generation import loaded
from tests.tiny_models import holding, make, tokens

TOPN = Policy(topn=6, spread="even", dense_layers=1, dense_below=0)
GREEDY = Sampling(temperature=0)
PROMPT = "It was the best of times, it was the worst of times"


@pytest.fixture(scope="module")
def lm() -> LoadedModel:
    made = loaded()
    made.model.generation_config.eos_token_id = None
    return made


@pytest.fixture(autouse=True)
def _sockets(sockets: Path) -> None:
    """Every test has its own."""


def until(true: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.005)


def answer(lm: LoadedModel, policy: Policy = TOPN, count: int = 12, cache: KCache | None = None) -> str:
    events = kcache.generate(
        lm, PROMPT, None if cache is not None else policy, sampling=GREEDY, max_new_tokens=count, cache=cache
    )
    return "".join(event.text for event in events)


def frames_of(source: Source) -> list[Frame]:
    return [source.frame(index) for index in source.span()]


def test_a_recording_has_every_step_and_the_caches_own_figures(lm: LoadedModel, tmp_path: Path) -> None:
    cache = KCache(lm.model, TOPN)
    with publish(lm, record=tmp_path / "run.kcr", command="test") as publication:
        text = answer(lm, cache=cache)
    assert publication.lost == 0 and publication.problem is None
    recording = open_recording(tmp_path / "run.kcr")
    assert recording.closed is None
    assert recording.info.model == "tiny" and recording.info.command == "test" and recording.info.host_only
    assert recording.info.policy == TOPN.replace(k_bits=16).to_dict()
    frames = frames_of(recording)
    assert [frame.step for frame in frames if frame.phase == "decode"] == list(range(1, 12))
    last, snapshot = frames[-1], cache.snapshot()
    assert last.totals == cache.stats
    assert [layer.stats for layer in last.layers] == [layer.stats for layer in snapshot.layers]
    assert [layer.kind for layer in last.layers] == ["resident", "tiered", "tiered"]
    for frame in frames:
        for layer in frame.layers:
            assert layer.histogram.sum() == (2 * 6 if layer.mode == "topn" else 0)
    for layer, shot in zip(last.layers[1:], snapshot.layers[1:], strict=True):
        assert shot.picks is not None and shot.mass is not None and layer.mass is not None
        wanted = np.bincount(shot.picks.reshape(-1), minlength=last.tokens)
        assert layer.histogram.tolist() == wanted.tolist()
        assert np.abs(layer.mass - shot.mass[0].reshape(-1)).max() <= 0.0051
        assert shot.weights is not None and layer.held is not None
        held = np.bincount(shot.picks.reshape(-1), shot.weights.reshape(-1), last.tokens) / shot.picks.shape[1]
        assert layer.held == pytest.approx(np.where(held < 0.01, 0, held), rel=0.15, abs=0.011)
    size = len(PROMPT)
    assert last.marks == (Mark(0, "prompt"), Mark(size, "answer"))
    assert "".join(recording.pieces(0, size)) == PROMPT
    assert text.startswith("".join(recording.pieces(size, last.tokens)).removesuffix("\ufffd"))
    assert last.speed.ttft_ms is not None and last.speed.tok_s is not None
    assert last.memory.host_total > last.memory.process > 0


def test_the_link_per_token_leaves_out_what_a_prompt_reads_back(lm: LoadedModel, tmp_path: Path) -> None:
    from kcache_cli.tui.model.layers import layer_rows
    from kcache_cli.tui.model.link import link_view
    from kcache_cli.tui.model.moment import Moment
    from kcache_cli.tui.model.trace import Trace

    cache = KCache(lm.model, TOPN.replace(prefill_chunk=4))
    with publish(lm, record=tmp_path / "run.kcr"):
        answer(lm, cache=cache)
    stats = cache.stats
    row_bytes = 8 * 4
    fetched = stats.rows_fetched * row_bytes
    assert stats.bytes_h2d > fetched, "later pieces of the prompt have read V back"
    recording, trace = open_recording(tmp_path / "run.kcr"), Trace()
    for frame in frames_of(recording):
        trace.add(frame)
    moment = Moment(recording.info, frame, trace.past())
    view = link_view(moment)
    assert view.per_token == pytest.approx(fetched / stats.steps) and view.total_h2d == stats.bytes_h2d
    assert sum(row.link or 0 for row in layer_rows(moment)) == pytest.approx(fetched / stats.steps)


def test_heads_that_pick_as_many_rows_as_they_need(lm: LoadedModel, tmp_path: Path) -> None:
    cache = KCache(lm.model, TOPN.replace(spread="need"))
    with publish(lm, record=tmp_path / "run.kcr"):
        answer(lm, cache=cache)
    recording = open_recording(tmp_path / "run.kcr")
    for index in recording.span():
        frame = recording.frame(index)
        for layer in frame.layers:
            if layer.picks is not None:
                assert (layer.picks >= 0).sum() == layer.histogram.sum() > 0
    last, snapshot = recording.frame(recording.span()[-1]), cache.snapshot()
    for layer, shot in zip(last.layers[1:], snapshot.layers[1:], strict=True):
        assert shot.picks is not None
        wanted = np.bincount(shot.picks[shot.picks >= 0], minlength=last.tokens)
        assert layer.histogram.tolist() == wanted.tolist()
    assert last.totals == cache.stats


def test_a_viewer_sees_what_the_recording_says(lm: LoadedModel, tmp_path: Path) -> None:
    with publish(lm, record=tmp_path / "run.kcr") as publication:
        (place,) = find()
        assert place.path == publication.path
        live, here = attach(place), publication.source()
        for source in (live, here):
            assert isinstance(source, Source)
            source.ask(rate_hz=60)
            until(lambda source=source: source.latest() is not None)
        cache = KCache(lm.model, TOPN)
        answer(lm, cache=cache)
        for source in (live, here):
            until(lambda source=source: (frame := source.latest()) is not None and frame.step == 11)
            until(lambda source=source: source.pieces(len(PROMPT) - 1, len(PROMPT)) == [PROMPT[-1]])
    until(lambda: live.closed is not None)
    assert live.closed == here.closed == "the run ended"
    recording = open_recording(tmp_path / "run.kcr")
    recorded = {frame.number: frame for frame in frames_of(recording)}
    for source in (live, here):
        newest = source.latest()
        assert newest is not None
        twin = recorded[newest.number]
        assert newest.totals == twin.totals
        assert np.array_equal(newest.heat, twin.heat)
        assert any(layer.picks is not None for layer in newest.layers)
        source.close()


def test_who_comes_between_steps_sees_the_present_state(lm: LoadedModel) -> None:
    cache = KCache(lm.model, TOPN)
    with publish(lm):
        answer(lm, cache=cache)
        live = attach(find()[0])
        assert live.wait(10)
        frame = live.latest()
        assert frame is not None
        assert frame.totals == cache.stats
        assert frame.layers[1].picks is not None
        until(lambda: live.pieces(0, len(PROMPT)) == list(PROMPT))
        live.close()
        live.close()
        assert live.closed == "closed"


def test_before_anything_has_run(lm: LoadedModel) -> None:
    with publish(lm):
        live = attach(find()[0])
        assert live.wait(10)
        frame = live.latest()
        assert frame is not None
        assert (frame.layers, frame.tokens, frame.phase) == ((), 0, "idle")
        assert live.pieces(0, 2) == ["", ""]
        live.close()


def test_who_came_before_the_first_cache_comes_to_know_its_policy(lm: LoadedModel) -> None:
    with publish(lm) as publication:
        assert publication.path is not None
        near, far = publication.source(), attach(Place(publication.path))
        assert near.info.policy == far.info.policy == {}
        answer(lm)
        until(lambda: bool(near.info.policy) and bool(far.info.policy))
        assert near.info.policy == far.info.policy == TOPN.replace(k_bits=16).to_dict()
        assert near.info.pid == far.info.pid
        far.close()


def test_viewers_come_and_go_and_the_engine_goes_back_to_rest(lm: LoadedModel) -> None:
    with publish(lm) as publication:
        for _ in range(3):
            live = attach(find()[0])
            live.ask(rate_hz=60)
            answer(lm)
            assert live.wait(10)
            live.close()
        until(lambda: not publication._server.viewers)
        answer(lm)
        assert publication._capture.due_s == float("inf")
        assert not publication._capture.ready


def test_the_engine_hands_over_without_waiting_for_anybody(lm: LoadedModel) -> None:
    """With a publisher's thread that does nothing, a run ends all the same: the queue is bounded and drops."""
    publication = publish(lm)
    publication._server.wait = lambda timeout_s: time.sleep(0.01)  # type: ignore[method-assign]
    publication._turn = lambda: None  # type: ignore[method-assign]
    capture = publication._capture
    capture.due_s = 0.0
    cache = KCache(lm.model, TOPN)
    for _ in range(30):
        answer(lm, cache=cache)
    assert len(capture.ready) == 256
    assert capture.lost == 30 * 13 - 256  # a prompt, 11 steps, and what there is when the last token is out
    assert capture.ready[-1].counts[1] == cache.layers[1].counts()
    publication.close()


def test_another_cache_is_another_run(lm: LoadedModel) -> None:
    with publish(lm) as publication:
        here = publication.source()
        here.ask(rate_hz=60)
        caches = [KCache(lm.model, TOPN) for _ in range(2)]
        for run, cache in enumerate(caches, start=1):
            answer(lm, cache=cache)
            until(lambda run=run: (frame := here.latest()) is not None and (frame.run, frame.step) == (run, 11))
        until(lambda: (frame := here.latest()) is not None and frame.phase == "idle")


def test_one_cache_alone(lm: LoadedModel) -> None:
    cache, other = KCache(lm.model, TOPN), KCache(lm.model, TOPN)
    with publish(cache, model="mine") as publication:
        here = publication.source()
        assert here.info.model == "mine"
        answer(lm, cache=other)
        assert publication._capture.run == 0
        answer(lm, cache=cache)
        until(lambda: (frame := here.latest()) is not None and frame.totals == cache.stats)


def test_generate_of_transformers_is_seen_too(lm: LoadedModel) -> None:
    cache = KCache(lm.model, TOPN)
    ids = tokens(3, 1, 20)
    with publish(lm.model) as publication, kcache.attach(lm.model):
        here = publication.source()
        lm.model.generate(ids, **holding(cache), max_new_tokens=6, do_sample=False)
        until(lambda: (frame := here.latest()) is not None and frame.totals == cache.stats)
        frame = here.latest()
        assert frame is not None and frame.step == 5
        assert frame.marks == (Mark(0, "prompt"), Mark(20, "answer"))


def test_a_padded_batch(lm: LoadedModel, tmp_path: Path) -> None:
    with publish(lm, record=tmp_path / "run.kcr") as publication:
        publication.job(3, 8)
        list(kcache.generate(lm, ["abcdef", "xy"], TOPN, sampling=GREEDY, max_new_tokens=4))
    recording = open_recording(tmp_path / "run.kcr")
    frame = recording.latest()
    assert frame is not None
    assert (frame.batch, frame.observed, frame.job) == (2, 2, (3, 8))
    assert [(row.padding, row.tokens, row.completion_tokens) for row in frame.sequences] == [(0, 9, 4), (4, 5, 4)]
    assert all(row.done for row in frame.sequences)
    assert recording.pieces(0, 6, 1) == ["", "", "", "", "x", "y"]


@pytest.mark.parametrize("stop", [(), ("\n",)])
def test_each_sequence_is_told_to_its_last_token(lm: LoadedModel, stop: tuple[str, ...], tmp_path: Path) -> None:
    """That token is not fed, so no forward tells of it; one batch follows another without a pause."""
    made: list[list[int]] = []
    with publish(lm, record=tmp_path / "run.kcr") as publication:
        here = publication.source()
        here.ask(rate_hz=0.2)  # which would look when all is over
        for batch, names in ((["abcdef", "xy", "q"], ["a", "b", "c"]), (["one", "two"], ["d", "e"]), (["more"], ())):
            publication.name(names)
            counts = [0] * len(batch)
            for event in kcache.generate(lm, batch, TOPN, sampling=GREEDY, max_new_tokens=9, stop=stop):
                counts[event.index] = event.completion_tokens
            made.append(counts)
    recording = open_recording(tmp_path / "run.kcr")
    ends = {recording.frame(index).run: index for index in recording.span() if recording.frame(index).run}
    assert list(ends) == [1, 2, 3]
    for (run, index), counts in zip(ends.items(), made, strict=True):
        frame = recording.frame(index)
        assert [row.completion_tokens for row in frame.sequences] == counts, run
        assert all(row.done for row in frame.sequences) and frame.phase == "idle"
        assert frame.totals.steps == max(counts) - 1
    assert [recording.names(index) for index in ends.values()] == [("a", "b", "c"), ("d", "e"), ()]
    assert recording.names(ends[1]) == ("a", "b", "c")
    latest = here.latest()
    assert latest is not None and [row.completion_tokens for row in latest.sequences] == made[-1]
    assert latest.run == 3 and here.names() == ()


def test_a_frame_says_what_was_known_in_its_step(lm: LoadedModel, tmp_path: Path) -> None:
    """A publisher that comes late makes of each step what it would have made of it at once."""
    publication = publish(lm, record=tmp_path / "run.kcr")
    turn, publication._turn = publication._turn, lambda: None  # type: ignore[method-assign]
    publication._capture.due_s = 0.0
    for _ in range(2):
        answer(lm, cache=KCache(lm.model, TOPN))
    publication._turn = turn  # type: ignore[method-assign]
    publication.close()
    recording = open_recording(tmp_path / "run.kcr")
    frames = [frame for frame in frames_of(recording) if frame.phase == "decode"]
    assert [(frame.run, frame.sequences[0].completion_tokens) for frame in frames] == [
        (run, step) for run in (1, 2) for step in range(1, 12)
    ]


def test_a_large_batch_is_observed_in_part(lm: LoadedModel, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from kcache.watch import moment

    monkeypatch.setattr(moment, "MOST_PICKS", 50)  # 2 layers x 2 heads x 6 rows are 24 a sequence
    with publish(lm, record=tmp_path / "run.kcr"):
        list(kcache.generate(lm, [PROMPT] * 5, TOPN, sampling=GREEDY, max_new_tokens=3))
    frame = open_recording(tmp_path / "run.kcr").latest()
    assert frame is not None
    assert (frame.batch, frame.observed) == (5, 2)
    assert frame.layers[2].histogram.sum() == 24


def test_what_would_be_picked_in_a_short_context_on_request(lm: LoadedModel) -> None:
    cache = KCache(lm.model, TOPN.replace(dense_below=2048))
    with publish(lm) as publication:
        here = publication.source()
        here.ask(rate_hz=60)
        plain = answer(lm, cache=cache)
        until(lambda: here.latest() is not None)
        assert all(layer.picks is None for frame in frames_of(here) for layer in frame.layers)
        here.ask(probe=True)
        until(lambda: publication._capture.probe)
        cache.reset()
        assert answer(lm, cache=cache, count=60) == answer(lm, cache=KCache(lm.model, cache.policy), count=60)

        def probed() -> list[Frame]:
            return [frame for frame in frames_of(here) if frame.layers and frame.layers[1].picks is not None]

        until(lambda: bool(probed()))
        for frame in probed():
            assert [layer.mode for layer in frame.layers] == ["dense"] * 3
            assert frame.layers[0].picks is None
            assert frame.layers[2].histogram.sum() == 12
            assert frame.totals.rows_fetched == 0
        assert not cache.shared.probing
    assert plain


def test_what_would_be_picked_is_what_is_picked(lm: LoadedModel) -> None:
    """The reference's own verbs: one step later, in the other mode, the same rows."""
    ids = tokens(4, 1, 40)
    found = []
    for policy in (TOPN, TOPN.replace(dense_below=2048)):
        cache = KCache(lm.model, policy.replace(dense_layers=0))
        with kcache.attach(lm.model), torch.no_grad():
            lm.model(ids, **holding(cache))
            cache.shared.probing = True
            lm.model(torch.tensor([[5]]), **holding(cache))
        layer = cache.tiered_layers[0]
        assert layer.picks is not None and layer.mass is not None
        found.append((layer.picks.sort(-1).values.tolist(), layer.mass))
    assert found[0][0] == found[1][0]
    assert torch.allclose(found[0][1], found[1][1], atol=1e-6)


def test_over_tcp(lm: LoadedModel) -> None:
    with publish(lm, unix=False, port=0) as publication:
        assert publication.path is None and find() == []
        port, token = publication.port, publication.token
        assert port is not None
        live = attach(Place(port=port, token=token))
        assert live.info.model == "tiny"
        live.close()
        with pytest.raises(WatchError, match="token is wrong"):
            attach(Place(port=port, token="guess"))
    with pytest.raises(WatchError, match="cannot reach"):
        attach(Place(port=port, token=token))


def test_a_failure_of_the_publisher_leaves_the_engine_alone(lm: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    from kcache.watch import publication as module

    def broken(*args: object) -> None:
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr(module, "build", broken)
    publication = publish(lm)
    here = publication.source()
    until(lambda: not here.live)
    assert here.closed is not None and "a bug" in here.closed
    assert answer(lm)
    publication.close()
    assert publication.problem is not None and "ZeroDivisionError" in publication.problem


@pytest.fixture
def hooks(lm: LoadedModel) -> Callable[[], int]:
    return lambda: len(lm.model._forward_hooks) + len(lm.model._forward_pre_hooks)


def test_nothing_stays_behind(lm: LoadedModel, hooks: Callable[[], int], tmp_path: Path) -> None:
    before = hooks()
    publication: Publication = publish(lm)
    assert hooks() == before + 2
    publication.close()
    publication.close()
    assert hooks() == before and find() == []
    (tmp_path / "there.kcr").touch()
    with pytest.raises(InputError, match=r"^the recording .*exists"):
        publish(lm, record=tmp_path / "there.kcr")
    with pytest.raises(InputError, match="publish takes"):
        publish("smollm2")  # type: ignore[arg-type]
    alone = KCache(make("llama"))
    gc.collect()
    with pytest.raises(InputError, match="no longer there"):
        publish(alone)
    assert hooks() == before and find() == []

"""The view model: numbers and words from frames, without a screen."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from kcache.errors import InputError
from kcache.watch.frame import HALF_LIFE_STEPS, Frame, Info, Mark, Memory, bucket_tokens
from kcache_cli.tui.layout import PANELS, arrange
from kcache_cli.tui.look import Look
from kcache_cli.tui.model import words
from kcache_cli.tui.model.cell import cell
from kcache_cli.tui.model.detail import detail
from kcache_cli.tui.model.heat import Grid, Mode, Window, grid, rebin, scaled
from kcache_cli.tui.model.layers import SORTS, error_bound, layer_rows, parse_filter, sort_rows
from kcache_cli.tui.model.link import link_view, rates
from kcache_cli.tui.model.memory import Segment, lengths, memory_view
from kcache_cli.tui.model.moment import Moment
from kcache_cli.tui.model.passage import beginning, pieces_of, role_at, weights
from kcache_cli.tui.model.scale import slots, ticks
from kcache_cli.tui.model.speed import speed_view
from kcache_cli.tui.model.trace import Trace
from kcache_cli.tui.palette import DARK
from kcache_cli.tui.widgets.paint import words as painted
from tests.tui.fakes import INFO, KV_HEADS, MIB, NEEDLE, TOPN, conversation, frame


def moment(frames: list[Frame] | None = None, info: Info = INFO) -> Moment:
    trace = Trace()
    frames = conversation() if frames is None else frames
    for each in frames:
        trace.add(each)
    return Moment(info, frames[-1] if frames else None, trace.past())


# -- memory --------------------------------------------------------------------------------------------------------


def test_bars_add_up_and_have_one_scale() -> None:
    now = moment()
    assert now.frame is not None
    view, totals = memory_view(now), now.frame.totals
    assert view.device.used == INFO.weights_bytes + totals.device_bytes
    assert sum(segment.bytes for segment in view.device.segments) == view.device.used
    assert view.host.used == totals.host_bytes
    assert view.ghost.used == INFO.weights_bytes + totals.full_kv_bytes
    assert view.saved == totals.full_kv_bytes - totals.device_bytes > 0
    assert view.scale >= max(view.device.used, view.host.used, view.ghost.used)
    assert view.device.name == "device tier (RAM)"


def test_a_gpu_shows_what_torch_and_others_hold() -> None:
    frames = conversation()
    used = INFO.weights_bytes + frames[-1].totals.device_bytes
    memory = Memory(1 << 30, 300 * MIB, used + 50 * MIB, 900 * MIB, 64 << 30, 32 << 30, 2 << 30)
    frames[-1] = replace(frames[-1], memory=memory)
    view = memory_view(moment(frames, replace(INFO, host_only=False, device="H100")))
    parts = {segment.part: segment.bytes for segment in view.device.segments}
    assert parts["activations"] == 50 * MIB
    assert parts["other"] == (1 << 30) - 300 * MIB - used - 50 * MIB
    assert (view.device.name, view.scale, view.device.cut) == ("device (HBM)", 1 << 30, False)


def test_a_large_card_does_not_make_the_bars_invisible() -> None:
    frames = conversation()
    frames[-1] = replace(frames[-1], memory=Memory(80 << 30, 79 << 30, None, None, 64 << 30, 32 << 30, 2 << 30))
    view = memory_view(moment(frames, replace(INFO, host_only=False)))
    assert view.device.cut and view.scale < 1 << 30


def test_hot_rows_are_a_part_of_their_own_once_there_are_any() -> None:
    frames = conversation()
    totals = frames[-1].totals
    without = {segment.part: segment.bytes for segment in memory_view(moment(frames)).device.segments}
    assert "hot" not in without
    hot = totals.overhead_bytes // 4
    frames[-1] = replace(frames[-1], totals=replace(totals, hot_bytes=hot))
    view = memory_view(moment(frames))
    parts = {segment.part: segment.bytes for segment in view.device.segments}
    assert (parts["hot"], parts["overhead"] + hot) == (hot, without["overhead"])
    assert view.device.used == sum(parts.values())


def test_lengths_end_where_they_should() -> None:
    segments = tuple(Segment("k", "K", size) for size in (100, 1, 299))
    assert lengths(segments, 400, 10) == [20, 1, 59]
    assert sum(lengths(segments, 400, 10)) == 80


# -- link ----------------------------------------------------------------------------------------------------------


def test_link_figures_are_differences_over_the_window() -> None:
    view = link_view(moment(info=replace(INFO, link_gb_s=0.01)))
    rows = 28 * KV_HEADS * TOPN  # per step, of the layers that pick
    assert view.rows == 8 * rows and view.rows_per_step == rows
    assert view.hit_rate == pytest.approx(0.8, abs=0.01)
    assert view.per_token == pytest.approx(rows * 0.2 * 128, rel=0.02)
    assert view.h2d_s == pytest.approx(view.per_token / 0.1, rel=0.02)
    assert view.share == pytest.approx((view.h2d_s or 0) / 1e7)


def test_a_batch_decodes_so_many_tokens_a_step() -> None:
    one, four = link_view(moment()), link_view(moment(conversation(batch=4)))
    assert one.per_token == pytest.approx(4 * (four.per_token or 0))


def test_an_idle_run_moves_nothing_but_keeps_its_figures() -> None:
    frames = conversation()
    idle = replace(frames[-1], phase="idle", time_s=frames[-1].time_s + 60)
    view = link_view(moment([*frames, idle]))
    assert view.h2d_s == view.d2h_s == 0
    assert view.per_token == link_view(moment(frames)).per_token
    assert layer_rows(moment([*frames, idle]))[5].rows == KV_HEADS * TOPN


def test_before_there_is_anything_to_tell() -> None:
    view = link_view(moment(conversation()[:1]))
    assert view.h2d_s is view.per_token is view.hit_rate is None


def test_rates_begin_anew_with_a_run() -> None:
    frames = [*conversation(3), *(replace(each, run=2, time_s=each.time_s + 5) for each in conversation(3))]
    up, down = rates(moment(frames).past, 20)
    assert len(up) == len(down) == 20
    assert (up[:13] == 0).all() and (up[-3:] > 0).all() and up[-4] == 0


# -- heat ----------------------------------------------------------------------------------------------------------


def test_the_needle_is_the_brightest_of_the_middle() -> None:
    now = moment()
    found = grid(now, Mode.LAST, 100, Window(), 0)
    assert found.values.shape == (30, 100)
    assert (found.values[:2] == 0).all()  # these layers attend exactly
    middle = found.values[15, 5:95]
    at = int(middle.argmax()) + 5
    assert set(NEEDLE) & set(found.positions(at))


def test_exact_picks_and_histograms_agree() -> None:
    with_picks, without = moment(), moment(conversation(picks=False))
    assert with_picks.past.heads == KV_HEADS >= without.past.heads > 1  # which can only be guessed
    for window, columns in ((Window(), 30), (Window(3072, 4096), 8)):
        exact, near = (grid(each, Mode.LAST, columns, window, 0).values for each in (with_picks, without))
        assert np.corrcoef(exact[2:].reshape(-1), near[2:].reshape(-1))[0, 1] > 0.9


def test_a_cell_of_every_token_that_was_picked_by_all_is_full() -> None:
    assert scaled(np.array([[48.0, 24.0, 0.0]]), 0, 48, 3).tolist() == [[1.0, pytest.approx(0.5**0.4), 0.0]]


def test_rebin_keeps_what_it_counts() -> None:
    histogram = np.array([[4, 0, 8, 2], [1, 1, 1, 1]])
    for columns in (1, 3, 4, 7, 64):
        assert rebin(histogram, 16, 0, 64, columns).sum(1) == pytest.approx([14, 4])
    assert rebin(histogram, 16, 32, 48, 2).tolist() == [[4, 4], [0.5, 0.5]]


def test_history_decays_and_has_no_bias_at_first() -> None:
    first = frame(1)
    assert moment([first]).past.decayed == pytest.approx(first.heat)
    trace = Trace()
    trace.add(first)
    later = frame(1 + HALF_LIFE_STEPS, prompt=5984)  # as long, looking elsewhere
    trace.add(later)
    seen = trace.past().decayed
    assert seen.sum() == pytest.approx(first.heat.sum())
    once = 1 - 0.5 ** (1 / HALF_LIFE_STEPS)  # what one step weighs; the later frame stands for the steps since
    assert seen == pytest.approx((0.5 * once * first.heat + 0.5 * later.heat) / (0.5 * once + 0.5))
    trace.add(frame(18, prompt=5984, phase="prefill"))
    assert trace.past().decayed == pytest.approx(seen)  # a frame without picks says nothing


def test_ages() -> None:
    now = moment(conversation(12))
    found = grid(now, Mode.AGE, 94, Window(), 0)
    assert found.values[15, found.column(NEEDLE.start)] == 1.0  # picked in this step
    assert (found.values[:2] == 0).all()  # never
    assert set(np.unique(now.past.last_step[2:])) <= {-1, *range(1, 13)}


def test_heads_of_a_layer() -> None:
    found = grid(moment(), Mode.HEADS, 50, Window(), 12)
    assert found.values.shape == (KV_HEADS, 50) and found.note is None
    nothing = grid(moment(), Mode.HEADS, 50, Window(), 0)
    assert nothing.rows == () and "no exact picks" in (nothing.note or "")
    frames = [*conversation(), frame(9, picks=False)]
    assert grid(moment(frames), Mode.HEADS, 50, Window(), 12).note == "picks of step 8"


def test_histories_follow_buckets_that_become_wider() -> None:
    trace = Trace()
    for step in (1, 2, 3, 4):
        trace.add(frame(step, prompt=bucket_tokens(8000) * 128 - 2))
    past = trace.past()
    assert past.decayed.shape == past.last_step.shape == frame(4, prompt=8190).heat.shape
    assert past.decayed.sum() == pytest.approx(28 * KV_HEADS * TOPN)


def test_what_there_is_to_say() -> None:
    dense = grid(moment(conversation(3, prompt=300, mode="dense")), Mode.LAST, 40, Window(), 0)
    assert dense.note is not None and "would be picked" in dense.note and dense.values.any()
    prompt = grid(moment([frame(0, phase="prefill")]), Mode.LAST, 40, Window(), 0)
    assert prompt.note is not None and "reading the prompt" in prompt.note
    frames = conversation(3, prompt=300, mode="dense")
    rest = frames[-1]
    bare = tuple(
        replace(layer, picks=None, mass=None, histogram=np.zeros_like(layer.histogram)) for layer in rest.layers
    )
    rested = moment([*frames, replace(rest, number=9, phase="idle", layers=bare)])
    still = grid(rested, Mode.LAST, 40, Window(), 0)
    assert (still.note, still.values.tolist()) == (dense.note, dense.values.tolist())
    found = cell(rested, 15, range(303))
    assert found is not None and found.count
    assert "layer" not in prompt.note
    reading = frame(0, phase="prefill")
    early = replace(reading.layers[0].stats, tokens=1000)
    layers = (*reading.layers[:12], *(replace(layer, stats=early) for layer in reading.layers[12:]))
    middle = grid(moment([replace(reading, layers=layers)]), Mode.LAST, 40, Window(), 0)
    assert middle.note is not None and "reading the prompt, layer 12 of 30;" in middle.note
    assert grid(moment(), Mode.LAST, 40, Window(), 0).note is None


def test_cells() -> None:
    found = cell(moment(), 15, range(NEEDLE.start, NEEDLE.stop))
    assert found is not None and found.is_exact
    assert found.count >= len(NEEDLE) * KV_HEADS
    assert found.share == pytest.approx(found.count / (KV_HEADS * TOPN))
    head = cell(moment(), 15, range(NEEDLE.start, NEEDLE.stop), 1)
    assert head is not None and head.count >= len(NEEDLE) and head.count < found.count
    near = cell(moment(conversation(picks=False)), 15, range(3264, 3328))
    assert near is not None and not near.is_exact and near.count >= len(NEEDLE) * KV_HEADS
    assert cell(moment(), 99, range(3)) is None


def test_what_a_cell_holds() -> None:
    exact, nearly = moment(), moment(conversation(picks=False))
    layer = exact.frame.layers[15] if exact.frame is not None else None
    assert layer is not None and layer.picks is not None and layer.weights is not None and layer.mass is not None
    found = cell(exact, 15, range(NEEDLE.start, NEEDLE.stop))
    inside = (layer.picks >= NEEDLE.start) & (layer.picks < NEEDLE.stop)
    assert found is not None and found.held is not None and found.held.is_exact
    assert found.held.share == pytest.approx(float(layer.weights[inside].sum()) / KV_HEADS)
    assert found.mass == pytest.approx(float(layer.mass.mean()))
    everything = cell(exact, 15, range(6100))
    assert everything is not None and everything.held is not None
    assert everything.held.share == pytest.approx(everything.mass, abs=1e-5)
    one = cell(exact, 15, range(6100), 1)
    assert one is not None and one.held is not None and one.mass == pytest.approx(float(layer.mass[3:6].mean()))
    assert one.held.share == pytest.approx(one.mass, abs=1e-5)
    empty = next(at for at in range(1000) if not (layer.picks == at).any())
    nothing = cell(exact, 15, range(empty, empty + 1))
    assert nothing is not None and nothing.held is not None
    assert (nothing.count, nothing.held.share, nothing.held.is_exact) == (0, 0.0, True)
    bucket = range(3264, 3328)
    near, same = cell(nearly, 15, bucket), cell(exact, 15, bucket)
    assert near is not None and near.held is not None and not near.held.is_exact and near.held.at_step is None
    assert same is not None and same.held is not None and near.held.share == pytest.approx(same.held.share, rel=1e-4)


def test_what_a_cell_holds_where_a_recording_says_it_now_and_then() -> None:
    frames = conversation(6, picks=False)
    bare = [replace(frame, layers=tuple(replace(layer, held=None) for layer in frame.layers)) for frame in frames]
    bucket = range(3264, 3328)
    seen = cell(moment([*frames[:5], *bare[5:]]), 15, bucket)
    earlier = cell(moment(frames[:5]), 15, bucket)
    assert seen is not None and seen.held is not None and seen.held.at_step == 4
    assert earlier is not None and earlier.held is not None and seen.held.share == earlier.held.share
    unknown = cell(moment(bare), 15, bucket)
    assert unknown is not None and unknown.held is None and unknown.mass is not None


def test_windows() -> None:
    window = Window().zoomed(6000, 3000, 0.5, 16)
    assert window == Window(1500, 4500)
    assert window.zoomed(6000, 3000, 4, 16) == Window()
    assert window.moved(6000, 9999) == Window(3000, 6000)
    assert Window(5990, 6100).within(6000) == (5990, 6000)
    assert Window(7000, 7100).within(6000) == (5999, 6000)
    tiny = Window().zoomed(6000, 0, 0.0001, 16)
    assert tiny == Window(0, 16)


@pytest.mark.parametrize(("start", "end", "columns"), [(0, 6000, 100), (0, 7, 100), (300, 911, 13), (0, 1, 1)])
def test_columns_and_positions_agree(start: int, end: int, columns: int) -> None:
    found = Grid(np.zeros((1, columns)), (0,), start, end)
    for position in range(start, end, max(1, (end - start) // 97)):
        assert position in found.positions(found.column(position))


# -- rows of the map on lines --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "lines"), [(1, 5), (3, 15), (30, 15), (30, 11), (80, 15), (61, 1)])
@pytest.mark.parametrize("per_line", [1, 2])
def test_every_row_has_a_slot(rows: int, lines: int, per_line: int) -> None:
    values = np.arange(rows, dtype=float)[:, None]
    found = slots(Grid(values, tuple(range(rows)), 0, 1), lines, per_line)
    assert found.lines <= lines
    for row in range(rows):
        at = found.slot(row)
        assert found.first[at] <= row < found.stop[at]
        assert found.values[at, 0] == found.stop[at] - 1  # the largest of those in it
    assert found.row(0) == 0


def test_ticks_do_not_overlap() -> None:
    for columns in (10, 40, 100, 200):
        found = ticks(
            Grid(np.zeros((1, columns)), (0,), 0, 6008), columns, (Mark(0, "prompt"), Mark(6000, "answer")), "^"
        )
        for before, after in pairwise(found):
            assert before.column + len(before.text) < after.column
        assert found[-1].column + len(found[-1].text) <= columns
        assert [tick.kind for tick in found if tick.kind != "position"] == ["prompt", "answer"]


# -- layers --------------------------------------------------------------------------------------------------------


def test_rows_sort_and_what_is_unknown_comes_last() -> None:
    rows = layer_rows(moment())
    assert len(rows) == 30
    for name in SORTS:
        for reverse in (False, True):
            values = [getattr(row, name) for row in sort_rows(rows, name, reverse)]
            known = [value for value in values if value is not None]
            assert values[: len(known)] == known
            assert known == sorted(known, reverse=(name != "layer") != reverse)


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("", range(30)),
        ("resident", range(2)),
        ("topn", range(2, 30)),
        ("layer>=28", (28, 29)),
        ("5", (5,)),
        ("tiered layer < 4", (2, 3)),
        ("host>1m layer<4", (2, 3)),
        ("attn>93%", range(26, 30)),
        ("hits=2", ()),
    ],
)
def test_filters(text: str, layers: Sequence[int]) -> None:
    test = parse_filter(text)
    assert [row.layer for row in layer_rows(moment()) if test(row)] == list(layers)


@pytest.mark.parametrize("text", ["nonsense", "weight>3", "attn>1.2.3", "attn>"])
def test_filters_that_make_no_sense(text: str) -> None:
    with pytest.raises(InputError):
        parse_filter(text)


def test_the_error_bound_holds() -> None:
    """Drop, replace or rescale what was not picked: the output errs by no more than the bound says."""
    random = np.random.default_rng(1)
    for _ in range(50):
        p = random.dirichlet(np.full(40, 0.2))
        v = random.normal(size=(40, 8))
        picked = np.argsort(p)[-8:]
        mass = p[picked].sum()
        exact, kept = p @ v, p[picked] @ v[picked]
        largest = np.linalg.norm(v, axis=1).max()
        layer = replace(frame(1).layers[5], mass=np.array([mass], np.float32))
        rest = np.setdiff1d(np.arange(40), picked)
        for tail, out in (
            ("none", kept),
            ("renormalise", kept / mass),
            ("lowrank", kept + p[rest].sum() * v.mean(0)),
        ):
            bound = error_bound(layer, tail)
            assert bound is not None
            assert np.linalg.norm(out - exact) <= bound * largest + 1e-6


def test_exact_layers_err_by_nothing_and_a_prompt_tells_nothing() -> None:
    assert error_bound(frame(1).layers[0], "lowrank") == 0
    assert error_bound(frame(0, phase="prefill").layers[4], "lowrank") is None


def test_detail() -> None:
    found = detail(moment(), 12)
    assert found is not None
    assert [len(group) for group in found.groups] == [3, 3, 3]
    assert found.picked == (TOPN,) * KV_HEADS
    assert found.row.rows == KV_HEADS * TOPN
    assert detail(moment(), 30) is None
    exact = detail(moment(), 0)
    assert exact is not None and exact.groups == () and exact.row.bound == 0


# -- speed, text, words --------------------------------------------------------------------------------------------


def test_speed() -> None:
    view = speed_view(moment())
    assert view.itls == tuple(45.0 + 5 * (step % 4) for step in range(1, 9))
    assert (view.itl_ms, view.slow, view.ttft_s) == (45.0, 60.0, 13.1)
    assert speed_view(moment([frame(0, phase="prefill")])).itls == ()


def test_text_is_printable_and_knows_who_said_it() -> None:
    now = frame(8)
    pieces = pieces_of(now, ["\x1b[31mred", "<|im_end|>", "fine"], 5999)
    assert [piece.text for piece in pieces] == ["[31mred", "<|im_end|>", "fine"]
    assert [piece.special for piece in pieces] == [False, True, False]
    assert [piece.role for piece in pieces] == ["prompt", "answer", "answer"]
    assert role_at(replace(now, marks=()), 3) == "prompt"


def test_the_name_of_a_role_is_no_word_of_the_text() -> None:
    texts = ["<|im_end|>", "\n", "<|im_start|>", "ass", "istant", "\n", "assistant", "<start_of_turn>", "user", " me"]
    special = [piece.text for piece in pieces_of(frame(9), texts, 0) if piece.special]
    assert special == ["<|im_end|>", "<|im_start|>", "ass", "istant", "<start_of_turn>", "user"]


def test_a_special_token_is_lit_where_it_was_picked_and_faint_elsewhere() -> None:
    pieces = pieces_of(frame(9), ["<|im_start|>", "<|im_end|>"], 0, np.array([0.5, 0.0]))
    lit, faint = painted(pieces, Look()).spans
    assert "on #" in str(lit.style) and str(faint.style) == DARK.faint


def test_weights_are_shares_of_heads() -> None:
    found = weights(frame(8), 15, NEEDLE.start - 1, NEEDLE.stop)
    assert found is not None and found[1:].tolist() == [1.0] * len(NEEDLE)
    assert weights(frame(8, picks=False), 15, 0, 10) is None
    everywhere = weights(frame(8), None, 0, 3)
    assert everywhere is not None and everywhere.tolist() == [1.0, 1.0, 1.0]


def test_a_passage_begins_so_that_what_was_picked_most_is_in_it() -> None:
    now = frame(8)
    assert beginning(now, 15, range(NEEDLE.start - 100, NEEDLE.stop), 40) == NEEDLE.start - 20
    assert beginning(now, 15, range(NEEDLE.start - 10, NEEDLE.stop), 40) == NEEDLE.start - 18
    assert beginning(frame(8, picks=False), 15, range(4, 60), 40) == 0


def test_numbers_for_people() -> None:
    assert [words.bytes_short(value) for value in (0, 820, 1024, 71 * MIB, 1.3 * 2**30)] == [
        "0B",
        "820B",
        "1.0K",
        "71M",
        "1.3G",
    ]
    assert [words.rate(value) for value in (None, 2.06e7, 5.2e10)] == ["– MB/s", "20.6 MB/s", "52.00 GB/s"]
    assert [words.seconds(value) for value in (None, 0.024, 13.1, 125)] == ["–", "24 ms", "13.1 s", "2:05"]
    assert words.clock(3723) == "1:02:03"
    assert [words.percent(value) for value in (None, 0, 0.031, 0.82, 1)] == ["–", "0 %", "3.1 %", "82 %", "100 %"]
    assert [words.count(value) for value in (812, 9_270, 57_000, 1.24e6)] == ["812", "9,270", "57k", "1.2M"]
    assert [words.position(value) for value in (512, 4096, 1536)] == ["512", "4k", "1.5k"]


# -- layout --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [40, 80, 100, 120, 250])
@pytest.mark.parametrize("height", [8, 14, 21, 22, 30, 37, 38, 60, 90])
@pytest.mark.parametrize("talking", [False, True])
def test_rows_fill_the_terminal(width: int, height: int, talking: bool) -> None:
    for lines in (1, 15, 40):
        for chosen in PANELS:
            for maximised in (None, chosen):
                plan = arrange(width, height, lines, chosen=chosen, maximised=maximised, talking=talking)
                assert plan.top + plan.middle + plan.low == height
                assert min(plan.top, plan.middle, plan.low) >= 0
                if plan.top == 0:
                    assert not plan.shown & {"memory", "link"}
                assert ("heat" in plan.shown) == (plan.middle > 0)
                if maximised is not None:
                    assert plan.shown == {maximised}

"""The reader: what it delivers, what it keeps, and that nobody waits for it."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from kcache_cli.tui.feed import Feed
from kcache_cli.tui.model.trace import REMEMBERED
from kcache_cli.tui.playhead import SPEEDS, Playhead
from kcache_cli.tui.shelf import Shelf
from kcache_cli.tui.turns import Turns
from tests.tui.fakes import FakeClock, FakeSource, conversation, frame, two_turns


class Reader:
    """A feed on a fake clock, and how often it had something new."""

    def __init__(self, source: FakeSource) -> None:
        self.source, self.clock, self.told = source, FakeClock(), 0
        self.feed = Feed(source, self.clock, self._tell)
        self.feed.start()
        self.settle()

    def _tell(self) -> None:
        self.told += 1

    def settle(self) -> None:
        until = time.monotonic() + 30
        while not self.clock.settled:
            assert time.monotonic() < until
            time.sleep(0.001)

    def tick(self, seconds: float = 1.0) -> None:
        self.clock.advance(seconds)
        self.settle()


@pytest.fixture
def reader() -> object:
    made: list[Reader] = []

    def make(source: FakeSource) -> Reader:
        made.append(Reader(source))
        return made[-1]

    yield make
    for each in made:
        each.feed.stop()


def test_only_the_newest_is_kept_for_a_screen_that_has_no_time(reader) -> None:  # type: ignore[no-untyped-def]
    it = reader(FakeSource(conversation(2)))
    assert it.told == 1
    it.source.add(frame(3))
    it.tick()
    it.source.add(frame(4))
    it.tick()
    assert it.told == 1  # the first has not been taken yet
    moment = it.feed.take()
    assert moment is not None and moment.frame is not None and moment.frame.step == 4
    assert [point.step for point in moment.past.points] == [0, 1, 2, 3, 4]  # what was missed is in the history
    assert it.feed.take() is None
    it.tick()
    assert it.told == 1  # nothing new, nothing said
    it.source.end("the process ended")
    it.tick()
    moment = it.feed.take()
    assert moment is not None and moment.place.closed == "the process ended" and moment.frame is not None


def test_nothing_to_read_yet(reader) -> None:  # type: ignore[no-untyped-def]
    it = reader(FakeSource([]))
    moment = it.feed.take()
    assert moment is not None and moment.frame is None and moment.past.points == ()


def test_stepping_back_shows_the_history_as_it_was(reader) -> None:  # type: ignore[no-untyped-def]
    it = reader(FakeSource(conversation(8)))
    it.feed.order(lambda head: head.seek(3))
    it.settle()
    moment = it.feed.take()
    assert moment is not None and moment.frame is not None
    assert moment.frame.step == 3 and [point.step for point in moment.past.points] == [0, 1, 2, 3]
    assert moment.place.paused


def test_a_long_jump_begins_the_history_anew(reader) -> None:  # type: ignore[no-untyped-def]
    frames = [replace(frame(1 + at % 4), number=at) for at in range(REMEMBERED * 2 + 50)]
    it = reader(FakeSource(frames, live=False))
    it.feed.order(lambda head: head.seek(len(frames) - 1))
    it.settle()
    moment = it.feed.take()
    assert moment is not None and len(moment.past.points) == REMEMBERED


def test_a_frame_that_cannot_be_read_is_survived(reader) -> None:  # type: ignore[no-untyped-def]
    source = FakeSource(conversation(8), live=False)
    it = reader(source)
    del source.frames[5:]
    source.closed = "record 9 is damaged"
    it.feed.order(lambda head: head.seek(7))
    it.settle()
    it.tick()
    moment = it.feed.take()
    assert moment is not None and moment.frame is not None and moment.frame.step == 4
    assert moment.place.closed == "record 9 is damaged"


def test_a_playhead_keeps_within_the_frames() -> None:
    source = FakeSource(conversation(8), live=False)
    head = Playhead(source, replay=True)
    assert head.advance(0) == 0
    head.step(-5)
    assert head.index == 0
    head.step(99)
    assert head.index == 8
    for _ in range(20):
        head.faster(1)
    assert head.speed == SPEEDS[-1]
    for _ in range(20):
        head.faster(-1)
    assert head.speed == SPEEDS[0]
    assert Playhead(FakeSource([]), replay=False).advance(0) == -1


def test_turns_are_found_a_stretch_at_a_time() -> None:
    turns = Turns(FakeSource(two_turns()))
    turns.scan(3)
    assert turns.found == [0, 1]
    turns.scan(99)
    assert turns.found == [0, 1, 6, 7]


def test_a_shelf_remembers_what_a_recording_decoded() -> None:
    source = FakeSource(conversation(3), live=False)
    shelf = Shelf(source)
    first = shelf.frame(1)
    source.frames[1] = frame(9)
    assert shelf.frame(1) is first
    assert shelf.pieces(0, 3, 0, 99) == ["", "", ""]  # that frame is gone
    assert (shelf.info, shelf.live, shelf.closed, shelf.latest()) == (source.info, False, None, source.frames[-1])

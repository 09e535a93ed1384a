"""The link's order of events, on streams that only write down what they are asked: a device is not needed for that."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from kcache.tiers.link import Link

CPU = torch.device("cpu")


class Stream:
    """A stream that notes in ``log`` what it is told to wait for."""

    def __init__(self, name: str, log: list[tuple[str, str, str]]) -> None:
        self.name, self.log = name, log

    def wait_stream(self, other: Stream) -> None:
        self.log.append((self.name, "after", other.name))

    def wait_event(self, event: str) -> None:
        self.log.append((self.name, "after", event))

    def record_event(self) -> str:
        event = f"event {len(self.log)} of {self.name}"
        self.log.append((self.name, "records", event))
        return event


class Streamed(Link):
    """A link between RAM and RAM that goes by streams all the same."""

    log: list[tuple[str, str, str]]

    def _streams(self) -> tuple[Stream, Stream]:  # type: ignore[override]
        self.log = []
        return Stream("out", self.log), Stream("back", self.log)


@pytest.fixture
def link(monkeypatch: pytest.MonkeyPatch) -> Streamed:
    link = Streamed(CPU)

    @contextmanager
    def stream(inside: Stream) -> Iterator[None]:
        link.log.append((inside.name, "begins", ""))
        yield
        link.log.append((inside.name, "ends", ""))

    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("compute", link.log))
    monkeypatch.setattr(torch.cuda, "stream", stream)
    return link


def memory_of(rows: torch.Tensor) -> weakref.ref[torch.UntypedStorage]:
    return weakref.ref(rows.untyped_storage())


def test_rows_that_leave_are_kept_until_their_maker_waits_for_the_copy(link: Streamed) -> None:
    host = torch.empty(1, 2, 8, 4)
    rows = torch.randn(1, 8, 2, 4).transpose(1, 2)
    want, alive = rows.clone(), memory_of(rows)
    event = link.to_host(rows, host)
    del rows
    gc.collect()
    assert torch.equal(host, want)
    assert alive() is not None
    assert link.log[0] == ("out", "after", "compute")
    assert ("compute", "after", event) not in link.log
    link.let_go()
    gc.collect()
    assert link.log[-1] == ("compute", "after", event)
    assert alive() is None
    before = len(link.log)
    link.let_go()
    assert len(link.log) == before


def test_the_next_copy_out_frees_the_one_before(link: Streamed) -> None:
    host = torch.empty(1, 2, 8, 4)
    first = torch.randn(1, 2, 8, 4)
    alive = memory_of(first)
    event = link.to_host(first, host)
    del first
    link.to_host(torch.randn(1, 2, 8, 4), host)
    gc.collect()
    assert alive() is None
    assert link.log.index(("compute", "after", event)) < len(link.log) - 4, "the second copy begins after that"


def test_rows_are_kept_though_a_copy_has_failed(link: Streamed) -> None:
    """The pieces before it may be under way."""
    rows = torch.randn(1, 2, 8, 4)
    alive = memory_of(rows)
    with pytest.raises(ValueError, match="zip"):
        link.to_host(rows, torch.empty(1, 1, 8, 4))
    del rows
    gc.collect()
    assert alive() is not None
    link.let_go()
    assert link.log[-1][:2] == ("compute", "after")
    gc.collect()
    assert alive() is None


def test_rows_that_come_wait_for_readers_and_for_copies_out(link: Streamed) -> None:
    host = torch.randn(1, 2, 8, 4)
    rows, arrived = link.to_device(host[:, :, :5], 7)
    assert rows.shape == (1, 2, 7, 4)
    assert torch.equal(rows[:, :, :5], host[:, :, :5])
    assert link.log[:3] == [("back", "after", "compute"), ("back", "after", "out"), ("back", "begins", "")]
    link.wait(arrived)
    assert link.log[-1] == ("compute", "after", arrived)

"""What a batch job says of itself in a log."""

from __future__ import annotations

import pytest

from kcache_cli.batch.progress import Meter, progress_bar
from tests.cli.fakes import event


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def test_a_line_every_ten_seconds_not_per_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    meter = Meter(total=12, done=4, max_tokens=16, clock=clock)
    with progress_bar(meter) as watch:
        for prompt in range(8):
            for token in range(1, 17):
                clock.now_s += 0.25
                watch.count(event(prompt, "", "length" if token == 16 else None, 3, token))
    assert capsys.readouterr().err.splitlines() == [
        "kcache: 6/12 prompts · job average 4.0 tok/s · about 22 s left",
        "kcache: 9/12 prompts · job average 4.0 tok/s · about 12 s left",
        "kcache: 11/12 prompts · job average 4.0 tok/s · about 2 s left",
    ]


def test_a_long_prompt_says_how_far_it_has_been_read(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with progress_bar(Meter(total=2, done=0, max_tokens=2, prompt_tokens=8000, clock=clock)) as watch:
        for done in range(1, 5):
            clock.now_s += 6
            watch.read(1000 * done, 4000)
        clock.now_s += 12
        watch.count(event(0, "", "stop", 4000, 1))
    assert capsys.readouterr().err.splitlines() == [
        "kcache: 0/2 prompts · read 2,000 of 4,000 tokens",
        "kcache: 0/2 prompts · read 4,000 of 4,000 tokens",
        "kcache: 1/2 prompts · job average 0.0 tok/s · about 36 s left",
    ]


def test_time_left_counts_what_short_answers_leave_out() -> None:
    clock = Clock()
    meter = Meter(total=4, done=0, max_tokens=1000, clock=clock)
    assert meter.left_s is None
    clock.now_s = 60
    meter.count(event(0, "", "stop", 3, 1))
    assert meter.left_s == 180


def test_time_left_after_a_long_read_is_that_of_reading_and_decoding_apart() -> None:
    clock = Clock()
    meter = Meter(total=4, done=0, max_tokens=100, prompt_tokens=10_000, clock=clock)
    clock.now_s = 100.0
    meter.read(4000, 4000)
    assert meter.left_s is None
    for token in range(1, 3):
        clock.now_s += 0.5
        meter.count(event(0, "", None, 4000, token))
        meter.count(event(1, "", None, 4000, token))
    # Two of the 4 x 100 tokens took the half second after the first were there; 6,000 tokens are to be read.
    assert meter.left_s == pytest.approx(0.5 * 396 / 4 + 100.5 * 6000 / 4000)
    clock.now_s += 10.0
    meter.read(1000, 4000)
    assert meter.left_s == pytest.approx(0.5 * 396 / 4 + 110.5 * 5000 / 5000)


def test_time_stands_still_when_all_is_done() -> None:
    """Somebody may look at the dashboard for long afterwards."""
    clock = Clock()
    meter = Meter(total=2, done=0, max_tokens=4, clock=clock)
    for prompt in range(2):
        for token in range(1, 5):
            clock.now_s += 0.5
            meter.count(event(prompt, "", "length" if token == 4 else None, 3, token))
    clock.now_s += 1000
    assert (meter.elapsed_s, meter.tok_s) == (4.0, 2.0)

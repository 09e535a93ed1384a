"""Signals end a command as they should, whoever else wants to hear them."""

from __future__ import annotations

import signal
import sys
from types import FrameType

import pytest

from kcache_cli.ending import Ended, heard, kept


def leave(number: int, frame: FrameType | None) -> None:
    """What Ray does about SIGTERM while it starts."""
    sys.exit(number)


def start_ray_and_end() -> None:
    with kept():
        signal.signal(signal.SIGTERM, leave)
        signal.raise_signal(signal.SIGTERM)


def start_ray() -> None:
    with kept():
        signal.signal(signal.SIGTERM, leave)


def test_a_handler_that_leaves_by_itself_does_not_hide_the_signal() -> None:
    with heard() as came:
        ours = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Ended):
            start_ray_and_end()
        assert came == [signal.SIGTERM]
        assert signal.getsignal(signal.SIGTERM) is ours


def test_other_peoples_handlers_go_with_the_body() -> None:
    with heard() as came:
        start_ray()
        with pytest.raises(Ended):
            signal.raise_signal(signal.SIGTERM)
    assert came == [signal.SIGTERM]

"""The thread between a source and the screen: it waits, decodes, keeps histories, and hands over moments.

The screen never waits for a source, and a source never for the screen: of moments that the screen had no time for only
the newest is left.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from kcache.watch.source import Source
from kcache_cli.tui.clock import Clock
from kcache_cli.tui.model.moment import Moment, Place
from kcache_cli.tui.model.trace import REMEMBERED, Trace
from kcache_cli.tui.playhead import Playhead
from kcache_cli.tui.turns import Turns

RATES_HZ = (1.0, 2.0, 5.0, 10.0, 20.0, 30.0)
USUAL_HZ = 5.0
Order = Callable[[Playhead], None]


class Feed:
    """Reads a source in a thread of its own.

    Parameters
    ----------
    source : Source
        Asked from this thread and the screen's: a :class:`~kcache_cli.tui.shelf.Shelf`.
    clock : Clock
    deliver : callable
        Called in this thread when there is a newer moment to :meth:`take`.

    Attributes
    ----------
    rate_hz : float
        How often it looks.
    turns : int
        How often it has looked.
    """

    def __init__(self, source: Source, clock: Clock, deliver: Callable[[], None]) -> None:
        self.rate_hz = USUAL_HZ
        self.turns = 0
        self.always_probe = False
        self._source, self._clock, self._deliver = source, clock, deliver
        self._head = Playhead(source, replay=not source.live)
        self._trace, self._traced = Trace(), -1
        self._marks = Turns(source)
        self._orders: deque[Order] = deque()
        self._bell = threading.Event()
        self._waiting: Moment | None = None
        self._lock = threading.Lock()
        self._stopped = False
        self._shown: tuple[int, Place] | None = None
        self._probing = False
        self._thread = threading.Thread(target=self._run, name="kcache-dashboard", daemon=True)

    def start(self) -> None:
        """Begin to read."""
        self._source.ask(rate_hz=self.rate_hz, picks=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        self._stopped = True
        self._bell.set()
        if self._thread.is_alive():
            self._thread.join()

    def order(self, order: Order) -> None:
        """Have the thread do something with the playhead, at once."""
        self._orders.append(order)
        self._bell.set()

    def set_rate(self, rate_hz: float) -> None:
        """Look, and have a live process send, so many times a second."""
        self.rate_hz = rate_hz
        self._source.ask(rate_hz=rate_hz)
        self._bell.set()

    def take(self) -> Moment | None:
        """The newest moment, once."""
        with self._lock:
            moment, self._waiting = self._waiting, None
        return moment

    def _run(self) -> None:
        while not self._stopped:
            self._bell.clear()
            self._turn()
            self.turns += 1
            self._clock.wait(self._bell, 1 / self.rate_hz)

    def _turn(self) -> None:
        while self._orders:
            self._orders.popleft()(self._head)
        try:
            index = self._head.advance(self._clock.now())
            self._follow(index)
            self._marks.scan()
            place = self._place(index)
        except IndexError:  # a frame turned out unreadable, or was forgotten: the span is another one now
            return
        if self._shown == (self._traced, place):
            return
        self._shown = self._traced, place
        moment = Moment(self._source.info, None if index < 0 else self._source.frame(index), self._trace.past(), place)
        self._ask_probe(moment)
        with self._lock:
            is_due, self._waiting = self._waiting is None, moment
        if is_due and not self._stopped:
            self._deliver()

    def _follow(self, index: int) -> None:
        """Bring the histories to ``index``."""
        if index == self._traced:
            return
        span = self._source.span()
        first = self._traced + 1
        if index < self._traced or index - first > REMEMBERED or first < span.start:
            self._trace, first = Trace(), max(span.start, index - REMEMBERED + 1)
        for at in range(first, index + 1):
            self._trace.add(self._source.frame(at))
        self._traced = index

    def _place(self, index: int) -> Place:
        source, head = self._source, self._head
        span = source.span()
        times = None
        if span and index >= 0 and (head.replay or head.paused):
            start = source.frame(span[0]).time_s
            times = source.frame(index).time_s - start, source.frame(span[-1]).time_s - start
        turns = tuple(self._marks.found)
        return Place(index, span, source.live, head.paused, head.speed, source.closed, head.replay, turns, times)

    def _ask_probe(self, moment: Moment) -> None:
        """Have short contexts say what would be picked; longer exact layers only when the user wants it."""
        layers = () if moment.frame is None else moment.frame.layers
        wanted = self.always_probe or any(layer.kind == "tiered" and layer.mode == "dense" for layer in layers)
        if wanted != self._probing:
            self._probing = wanted
            self._source.ask(probe=wanted)

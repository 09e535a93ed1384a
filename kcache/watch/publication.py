"""Publishing a model at work: the thread between the engine and those who watch it.

The engine's hooks (:mod:`kcache.watch.capture`) hand over counters and references and ring a bell. This thread makes
frames of them, puts them up for viewers and writes them to a recording. It sleeps while nobody watches, but for a look
once a second at the token ids that have gathered.
"""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from transformers import PreTrainedModel

from kcache.cache import KCache
from kcache.watch.build import build
from kcache.watch.capture import NEVER, Capture, Finish, Kept, Names
from kcache.watch.codec import Message
from kcache.watch.columns import PHASES
from kcache.watch.frame import Info, Phase
from kcache.watch.gauges import Gauges
from kcache.watch.local import LocalSource
from kcache.watch.moment import Captured
from kcache.watch.recorder import Recorder
from kcache.watch.server import Server
from kcache.watch.tokens import Pieces, Tokens
from kcache.watch.viewers import Board, LocalViewer, Viewer
from kcache.watch.wire import MAGIC, VERSION

IDLE_S = 1.0
"""After so long without a forward the phase is idle."""
_LOOK_S = 1.0
_FAREWELL_S = 0.5
_SHARE = 0.015
"""Of one processor's time that frames for viewers may take; where they would take more, there are fewer of them."""


class Publication:
    """A model that can be watched, until :meth:`close`; made by :func:`kcache.publish`.

    Attributes
    ----------
    path : Path or None
        The Unix socket.
    port, token : int, str or None
        Of loopback TCP.
    lost : int
        Frames that were dropped because this thread did not keep up.
    problem : str or None
        Why the recording, or all publishing, ended early.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        info: Info,
        pieces: Pieces,
        ends: frozenset[int],
        only: KCache | None = None,
        record: Path | None = None,
        unix: bool = True,
        port: int | None = None,
    ) -> None:
        self._info = info
        self._tokens = Tokens(pieces, ends)
        self._board = Board(self._tokens)
        self._gauges = Gauges(model.device)
        self._local: list[LocalViewer] = []
        self._coming: deque[LocalViewer] = deque()
        self._job: tuple[int, int] | None = None
        self._number = self._taken = 0
        self._phase: Phase = "idle"
        self._prompt = False
        self._shown_s = 0.0
        self._frame_s = 0.0
        self._seen_viewers = 0
        self._stopping = False
        self._failed: str | None = None
        self._recorder: Recorder | None = None
        self._server = Server(self._hello, unix, port)
        if record is not None:
            try:
                self._recorder = Recorder(record)
            except BaseException:
                self._server.close()
                raise
        self._capture = Capture(model, self._server.wake, only)
        self._say_when()
        self._thread = threading.Thread(target=self._run, name="kcache-watch", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    @property
    def path(self) -> Path | None:
        """See the class."""
        return self._server.path

    @property
    def port(self) -> int | None:
        """See the class."""
        return self._server.port

    @property
    def token(self) -> str | None:
        """See the class."""
        return self._server.token

    @property
    def lost(self) -> int:
        """See the class."""
        return self._capture.lost

    @property
    def problem(self) -> str | None:
        """See the class."""
        return self._failed or (None if self._recorder is None else self._recorder.problem)

    def source(self) -> LocalSource:
        """A viewer in this process."""
        source = LocalSource(self._present_info(), self._server.wake)
        self._coming.append(source.viewer)
        self._server.wake()
        return source

    def job(self, done: int, total: int) -> None:
        """Say how many prompts of a batch job are done; viewers show it."""
        self._job = done, total

    def name(self, names: Sequence[str]) -> None:
        """Say what the sequences are called that are decoded next, by the thread that will; viewers show it."""
        self._capture.name(names)

    def __enter__(self) -> Publication:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()

    def close(self) -> None:
        """Say goodbye to viewers, end the recording, take the hooks off the model; idempotent."""
        atexit.unregister(self.close)
        if os.getpid() != self._info.pid or self._stopping:  # a forked child has no part in this
            return
        self._capture.stop()
        self._stopping = True
        self._server.wake()
        self._thread.join()

    # -- the thread ------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        reason = "the run ended"
        try:
            while not self._stopping:
                self._server.wait(min([_LOOK_S, *(1 / viewer.rate_hz for viewer in self._viewers)]))
                self._turn()
            self._capture.running = False
            self._turn()
            self._serve_out()
        except Exception as error:  # whatever it is, the engine goes on, unwatched
            self._capture.due_s = NEVER
            self._failed = reason = f"publishing failed: {type(error).__name__}: {error}"
        finally:
            self._farewell(reason)

    @property
    def _viewers(self) -> list[Viewer]:
        return [*(viewer for viewer in self._server.viewers if viewer.greeted), *self._local]

    @property
    def _writing(self) -> Recorder | None:
        """The recorder, while it works."""
        return None if self._recorder is None or self._recorder.problem is not None else self._recorder

    def _turn(self) -> None:
        """Take what the engine has left, and serve everybody."""
        coming = [self._coming.popleft() for _ in range(len(self._coming))]
        self._local = [viewer for viewer in [*self._local, *coming] if viewer.history.live]
        self._say_when()
        told = self._capture.told  # before frames are taken: those that come later know of more
        ready = [self._capture.ready.popleft() for _ in range(len(self._capture.ready))]
        began_s = time.thread_time()
        for captured in ready if self._recorder is not None else ready[-1:]:
            self._take_forwards(captured.told)
            self._show(captured)
        self._take_forwards(told)
        self._look_around(bool(ready))
        for viewer in self._viewers:
            viewer.serve(self._board)
        if ready:
            spent_s = time.thread_time() - began_s + self._capture.took_s
            self._frame_s += (spent_s - self._frame_s) / 4

    def _say_when(self) -> None:
        """Tell the engine when the next frame is wanted."""
        capture = self._capture
        capture.probe = any(viewer.probe for viewer in self._viewers)
        if self._writing is not None:
            capture.interval_s, capture.due_s = 0.0, 0.0
        elif self._viewers:
            capture.interval_s = max(self._frame_s / _SHARE, 1 / max(viewer.rate_hz for viewer in self._viewers))
            capture.due_s = min(capture.due_s, time.perf_counter() + capture.interval_s)
        else:
            capture.due_s = NEVER

    def _take_forwards(self, told: int) -> None:
        """Take note of what was said of forwards, up to what had been ``told`` in all by some moment."""
        forwards = self._capture.forwards
        for _ in range(min(len(forwards), told - self._taken)):
            forward = forwards.popleft()
            self._taken += 1
            if isinstance(forward, Names):
                self._tokens.name(forward.names)
                continue
            if isinstance(forward, Finish):
                self._tokens.finish(forward)
                continue
            if isinstance(forward, Kept):
                self._tokens.keep(forward)
                continue
            self._prompt = forward.prompt
            length = self._tokens.take(forward)
            for viewer in self._viewers:
                viewer.text.crop(length)
            if self._recorder is not None:
                self._recorder.text.crop(length)

    def _look_around(self, shown: bool) -> None:
        """Show the present state where no step has: to a new viewer, at a change of phase, in a long forward."""
        count = len(self._viewers)
        is_new, self._seen_viewers = count > self._seen_viewers, count
        phase = self._phase_now()
        stale = self._capture.running and time.monotonic() - self._shown_s >= _LOOK_S
        watched = count > 0 or self._writing is not None
        if watched and not shown and (is_new or phase != self._phase or stale):
            captured = self._capture.take_now()
            if captured is not None:
                if self._capture.ready:  # a frame of a moment before has come meanwhile: the next turn's
                    return
                self._take_forwards(captured.told)
                if captured.run == self._tokens.run:  # else its first forward begins just now
                    self._show(captured)
            elif self._board.frame is not None:  # the cache is gone; its last state stays
                job = None if self._job is None else list(self._job)
                self._put({**self._board.frame, "time": time.time(), "phase": PHASES.index(phase), "job": job})
            else:
                self._show(Captured(self._tokens.run, time.time(), 0, [], b"", b""))
        self._phase = phase

    def _phase_now(self) -> Phase:
        if self._capture.running or (time.perf_counter() - self._capture.ended_s < IDLE_S and not self._stopping):
            return "prefill" if self._prompt else "decode"
        return "idle"

    def _show(self, captured: Captured) -> None:
        phase = captured.phase or self._phase_now()  # it may have waited here, while the engine went on
        self._put(build(captured, self._tokens, self._gauges.read(), phase, 0, self._job))

    def _put(self, frame: Message) -> None:
        if self._board.info is None and self._capture.cache is not None:
            self._board.info = asdict(self._present_info())
        self._number += 1
        frame["number"] = self._number
        self._shown_s = time.monotonic()
        self._board.show(frame)
        if (recorder := self._writing) is not None:
            if self._number == 1:
                recorder.begin(asdict(self._present_info()))
            recorder.write(frame, self._tokens)

    def _hello(self) -> Message:
        return {"kind": "hello", "magic": MAGIC, "version": VERSION, "info": asdict(self._present_info())}

    def _present_info(self) -> Info:
        cache = self._capture.cache
        return self._info if cache is None else replace(self._info, policy=cache.shared.policy.to_dict())

    def _serve_out(self) -> None:
        """Give everybody the last frame, though none is due; who takes nothing for a moment goes without."""
        until = time.monotonic() + _FAREWELL_S
        while True:
            for viewer in self._viewers:
                viewer.serve(self._board, at_once=True)
            if time.monotonic() >= until or not any(guest.waiting for guest in self._server.viewers):
                return
            self._server.wait(0.05)

    def _farewell(self, reason: str) -> None:
        """Tell viewers, wait a moment for them to take it, end the recording."""
        for viewer in self._local:
            viewer.history.end(reason)
        for guest in self._server.viewers:
            if guest.ready:
                guest.give({"kind": "end", "reason": reason})
        until = time.monotonic() + _FAREWELL_S
        while any(guest.waiting and not guest.gone for guest in self._server.viewers) and time.monotonic() < until:
            self._server.wait(0.05)
        self._server.close()
        if self._recorder is not None:
            if not self._number:
                self._recorder.begin(asdict(self._present_info()))
            self._recorder.close(reason)

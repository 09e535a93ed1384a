"""Decoding by a recorded step: when it is recorded, when it is replayed, and when a step is taken without it.

A step goes through two hands. ``launch`` asks the device for it and changes nothing on the host; ``commit`` takes it in
once the caller has seen the token it was made of. A step that was launched and never committed has written one row
past the end of the cache, which nothing reads; whoever changes the cache meanwhile has it taken back first
(``pause``), and the run it was for goes on with a forward.

A new recording is not believed: its first steps are also taken without it, and the logits compared. One with kernels in
place of the model's own small ones that goes wrong is made once more without them. Whatever goes wrong then, decoding
goes on without, for a reason that is logged and kept in :attr:`GraphDecoder.reason`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from kcache.cache import KCache
from kcache.graph.fit import may_begin, never, not_now
from kcache.graph.recorded import RecordedStep, forget_unseen
from kcache.machine.tape import Tape
from kcache.watch.capture import Capture, watchers_of

PROOFS = 2
"""Steps of a recording that are compared with steps taken without it: at its own length, and at another."""
_TOLERANCE = {torch.float32: 1e-3}
_LOOSE = 0.05

_log = logging.getLogger(__name__)


class GraphDecoder:
    """The recorded step of one cache.

    Parameters
    ----------
    make_tape : callable
        Makes what records and replays.

    Attributes
    ----------
    reason : str or None
        Why steps are no more recorded; None while they are.
    replayed, recorded : int
        Steps taken by replaying, and recordings made.
    """

    def __init__(self, make_tape: Callable[[], Tape]) -> None:
        self.reason: str | None = None
        self.replayed = self.recorded = 0
        self._make_tape = make_tape
        self._model: PreTrainedModel | None = None
        self._cache: KCache | None = None
        self._weights = 0
        self._held: list[torch.Tensor] = []  # weights that the recording reads, should another one put them elsewhere
        self._recording: RecordedStep | None = None
        self._watchers: list[Capture] = []
        self._tokens = torch.empty(0)
        self._trial: tuple[torch.Tensor, int] | None = None  # logits, and the rows they are for
        self._at = -1
        self._launched = self._advanced = False
        self._run = 0
        self._not_now: str | None = None
        self._may_fuse = True

    @property
    def fused(self) -> dict[str, int]:
        """How many norms and the like run as one kernel in the present recording."""
        return {} if self._recording is None else self._recording.fused

    def forget(self) -> None:
        """Let go of the recording and of all it holds."""
        self.pause()
        self._recording = None
        self._held = []

    def begin(self, model: PreTrainedModel, cache: KCache) -> int:
        """Serve a run of decode steps until :meth:`leave`, or until another begins; returns its number."""
        self.leave(self._run)
        self._run += 1
        if self.reason is None and may_begin(cache):
            self.reason = never(model, cache)
            if self.reason is None:
                self._model, self._cache = model, cache
                self._hold()
            else:
                _log.info("decoding without a recorded step: %s", self.reason)
        return self._run

    def launch(self, run: int, tokens: torch.Tensor, going: torch.Tensor | None = None) -> torch.Tensor | None:
        """Ask the device for the step of a run that feeds ``tokens`` ``[B]``.

        Returns
        -------
        Tensor ``[B, vocabulary]`` or None
            Its logits, which the next launch overwrites; to be followed by :meth:`commit`. None when the caller has to
            take this step itself, and to tell :meth:`check` what came of it.
        """
        cache = self._cache
        if run != self._run or self.reason is not None or cache is None or self._model is None:
            return None
        end = int(cache.get_seq_length()) + 1
        self._watchers = watchers_of(self._model)
        reason = "a viewer probes" if any(watcher.probe for watcher in self._watchers) else not_now(cache, end)
        if reason is not None:
            if reason != self._not_now:
                _log.debug("no recorded step at %d rows: %s", end, reason)
            self._not_now = reason
            self._withdraw()
            return None
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._launch(cache, tokens, going, end)
        except Exception as error:  # whatever it is, decoding goes on without
            forget_unseen(cache)
            self._give_up(_first_cause(error))
            return None

    def _launch(self, cache: KCache, tokens: torch.Tensor, going: torch.Tensor | None, end: int) -> torch.Tensor | None:
        padded = cache.shared.validity.bitmap is not None or going is not None
        if self._recording is None or self._recording.key != self._recording.fingerprint(cache, padded, self._weights):
            self._record(cache, tokens, going, end, padded)
        recording = self._recording
        assert recording is not None
        if self._at != end - 1:
            recording.step.enter(cache)
            self._at = end - 1
        recording.keep(cache)
        self._tokens = tokens[:, None]
        recording.step.feed(tokens, going, end)
        recording.tape.replay()
        if recording.proofs < PROOFS:
            trial = recording.logits.clone()
            recording.take_back(cache)
            self._withdraw()
            self._trial = trial, end
            return None
        self._launched = True
        return recording.logits

    def commit(self, run: int) -> bool:
        """Take in the step that a run launched: it counts, and the cache is one row longer.

        Returns
        -------
        bool
            False if it has been taken back meanwhile; the caller takes the step itself.
        """
        if run != self._run or not self._launched:
            return False
        assert self._cache is not None and self._recording is not None
        step = self._recording.step
        self._launched, self._advanced = False, True
        self._at += 1
        self.replayed += 1
        for watcher in self._watchers:
            watcher.step_begins(self._cache, self._tokens)
        step.advance(self._cache, self._at, _event(step.inputs.length.device))
        for watcher in self._watchers:
            watcher.step_ends(self._cache)
        return True

    def check(self, run: int, logits: torch.Tensor) -> None:
        """Compare logits ``[B, vocabulary]`` of a run's step with those of the recording, if it is on trial."""
        if run != self._run or self._cache is None or self._recording is None or self._trial is None:
            return
        (trial, end), self._trial = self._trial, None
        if end != self._cache.get_seq_length():
            return
        error = _difference(trial, logits)
        if error <= _TOLERANCE.get(logits.dtype, _LOOSE):
            self._recording.proofs += 1
        else:
            self._give_up(f"the recorded step's logits were off by {error:.1e}")

    def leave(self, run: int) -> None:
        """End a run of steps, if another has not done so."""
        if run == self._run:
            self.pause()
            self._model = self._cache = None
            self._held = []

    @property
    def ahead(self) -> bool:
        """Whether the cache is not yet, or no more, all that its caller knows of: :meth:`pause` makes it so."""
        return self._launched or self._advanced

    def pause(self) -> None:
        """Let others change the cache; a step that was launched and not committed is as if it had not been."""
        if self._launched and self._cache is not None and self._recording is not None:
            self._recording.take_back(self._cache)
        self._launched, self._trial = False, None
        self._withdraw()

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, what is counted leaves out a step that was launched and not committed."""
        if self._launched and self._cache is not None and self._recording is not None:
            with self._recording.set_aside(self._cache):
                yield
        else:
            yield

    def _record(self, cache: KCache, tokens: torch.Tensor, going: torch.Tensor | None, end: int, padded: bool) -> None:
        self.forget()
        assert self._model is not None
        self._recording = recording = RecordedStep(self._model, cache, padded, self._make_tape())
        recording.make(cache, tokens, going, end, self._may_fuse)
        self._hold()
        recording.key = recording.fingerprint(cache, padded, self._weights)
        self.recorded += 1
        _log.debug("recorded a decode step at %d rows; in one kernel each: %s", end, self.fused or "nothing")

    def _hold(self) -> None:
        """Note where the weights are; what a recording reads of them stays until the run ends."""
        assert self._model is not None
        weights = [parameter.detach() for parameter in self._model.parameters()]
        self._weights = hash(tuple(weight.data_ptr() for weight in weights))
        self._held = weights if self._recording is not None else []

    def _withdraw(self) -> None:
        """Leave the cache as if steps had been taken without the recording, so that others can go on."""
        if self._recording is not None and self._advanced:
            self._recording.step.leave()
        self._advanced, self._at = False, -1

    def _give_up(self, reason: str) -> None:
        fused = bool(self.fused)
        self.forget()
        if fused:
            self._may_fuse = False
            _log.warning("recording again with the model's own small kernels: %s", reason)
            return
        self.reason = reason
        _log.warning("decoding goes on without a recorded step: %s", reason)


def _first_cause(error: BaseException) -> str:
    """What went wrong first: ending a recording that has failed fails as well, and says less."""
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _event(device: torch.device) -> torch.cuda.Event | None:
    """An event behind all that was asked of the device."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _difference(got: torch.Tensor, want: torch.Tensor) -> float:
    """The largest relative error of a sequence's logits; NaN where only one of them has a number."""
    got, want = got.float(), want.float()
    known = want.isfinite()
    want = torch.where(known, want, 0.0)
    error = torch.where(known, got, 0.0) - want
    return float((error.norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-6)).max())

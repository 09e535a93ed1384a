"""Decoding by a recorded step: when it is recorded, when it is replayed, and when a step is taken without it.

A step goes through two hands. ``launch`` asks the device for it and changes nothing on the host; ``commit`` takes it in
once the caller has seen the token it was made of. A step that was launched and never committed has written one row
past the end of the cache, which nothing reads.

A new recording is not believed: its first steps are also taken without it, and the logits compared. Whatever goes
wrong, decoding goes on without, for a reason that is logged and kept in :attr:`GraphDecoder.reason`.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from kcache.cache import KCache
from kcache.graph.fit import never, not_now
from kcache.graph.step import GraphStep
from kcache.graph.tape import Tape
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
        self._watchers: list[Capture] = []
        self._tokens = torch.empty(0)
        self._unseen = False  # whether a row was written past the end, of a token that has not been taken in
        self._forget()

    def _forget(self) -> None:
        """Let go of the recording and of all it holds."""
        self._step: GraphStep | None = None
        self._tape: Tape | None = None
        self._logits: torch.Tensor | None = None
        self._key: tuple[object, ...] = ()
        self._scratch: tuple[object, ...] = ()
        self._kept: list[torch.Tensor] = []
        self._trial: torch.Tensor | None = None
        self._proofs = 0
        self._at = -1
        self._launched = False
        self._advanced = False

    def begin(self, model: PreTrainedModel, cache: KCache) -> None:
        """Serve a run of decode steps; ends with :meth:`leave`."""
        self.leave()
        if self.reason is None:
            self._model, self._cache = model, cache
            self._weights = hash(tuple(parameter.data_ptr() for parameter in model.parameters()))
            self.reason = never(model, cache)
            if self.reason is not None:
                _log.info("decoding without a recorded step: %s", self.reason)

    def launch(self, tokens: torch.Tensor, going: torch.Tensor | None = None) -> torch.Tensor | None:
        """Ask the device for the step that feeds ``tokens`` ``[B]``.

        Returns
        -------
        Tensor ``[B, vocabulary]`` or None
            Its logits, which the next launch overwrites; to be followed by :meth:`commit`. None when the caller has to
            take this step itself, and to tell :meth:`check` what came of it.
        """
        cache = self._cache
        if self.reason is not None or cache is None or self._model is None:
            return None
        end = int(cache.get_seq_length()) + 1
        self._watchers = watchers_of(self._model)
        if any(watcher.probe for watcher in self._watchers) or not_now(cache, end) is not None:
            self._withdraw()
            return None
        try:
            with torch.inference_mode(False), torch.no_grad(), _without_collector():
                return self._launch(cache, tokens, going, end)
        except Exception as error:  # whatever it is, decoding goes on without
            self._give_up(_first_cause(error))
            return None

    def _launch(self, cache: KCache, tokens: torch.Tensor, going: torch.Tensor | None, end: int) -> torch.Tensor | None:
        padded = cache.shared.validity.bitmap is not None or going is not None
        self._unseen = True
        if self._step is None or self._key != self._fingerprint(padded):
            self._record(cache, tokens, going, end, padded)
        step, tape = self._step, self._tape
        assert step is not None and tape is not None and self._logits is not None
        if self._at != end - 1:
            step.enter(cache)
            self._at = end - 1
        self._keep(cache)
        self._tokens = tokens[:, None]
        step.feed(tokens, going, end)
        tape.replay()
        if self._proofs < PROOFS:
            self._trial = self._logits.clone()
            self._restore(cache)
            self._withdraw()
            return None
        self._launched = True
        return self._logits

    def commit(self) -> None:
        """Take in the step that was launched: it counts, and the cache is one row longer."""
        assert self._cache is not None and self._step is not None
        self._launched, self._unseen, self._advanced = False, False, True
        self._at += 1
        self.replayed += 1
        for watcher in self._watchers:
            watcher.step_begins(self._cache, self._tokens)
        self._step.advance(self._cache, self._at, _event(self._step.inputs.length.device))
        for watcher in self._watchers:
            watcher.step_ends(self._cache)

    def check(self, logits: torch.Tensor) -> None:
        """Compare a step's logits ``[B, vocabulary]`` with those of the recording, if it is on trial."""
        trial, self._trial, self._unseen = self._trial, None, False
        if trial is None:
            return
        error = _difference(trial, logits)
        if error <= _TOLERANCE.get(logits.dtype, _LOOSE):
            self._proofs += 1
        else:
            self._give_up(f"the recorded step's logits were off by {error:.1e}")

    def leave(self) -> None:
        """End a run of steps; one that was launched and not committed is as if it had not been."""
        if self._cache is not None and self._unseen:
            if self._launched:
                self._restore(self._cache)
            for layer in self._cache.tiered_layers:
                layer.forget_unseen()
        self._launched = self._unseen = False
        self._withdraw()
        self._model = self._cache = None

    def _record(self, cache: KCache, tokens: torch.Tensor, going: torch.Tensor | None, end: int, padded: bool) -> None:
        self._withdraw()
        self._forget()
        assert self._model is not None
        step = GraphStep(self._model, cache, padded)
        step.enter(cache)
        step.feed(tokens, going, end)
        self._step = step
        self._kept = [tensor.clone() for tensor in cache.shared.step_state]
        tape = self._make_tape()
        try:
            self._logits = tape.record(step.run, tokens.device)
        finally:
            self._restore(cache)
        self._tape = tape
        self._scratch = cache.shared.scratch
        self._key = self._fingerprint(padded)
        self.recorded += 1
        _log.debug("recorded a decode step at %d rows", end)

    def _fingerprint(self, padded: bool) -> tuple[object, ...]:
        assert self._step is not None
        return (padded, self._weights, *self._step.fingerprint())

    def _keep(self, cache: KCache) -> None:
        """Note what the next step changes in place, should it turn out not to be wanted."""
        _copy(cache.shared.step_state, self._kept)

    def _restore(self, cache: KCache) -> None:
        _copy(self._kept, cache.shared.step_state)

    def _withdraw(self) -> None:
        """Leave the cache as if steps had been taken without the recording, so that others can go on."""
        if self._step is not None and self._advanced:
            self._step.leave()
        self._advanced, self._at = False, -1

    def _give_up(self, reason: str) -> None:
        self._withdraw()
        self._forget()
        self.reason = reason
        _log.warning("decoding goes on without a recorded step: %s", reason)


def _copy(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    """Copy many small tensors, in one launch for each dtype."""
    pairs = list(zip(sources, targets, strict=True))
    for dtype in {source.dtype for source in sources}:
        group = [pair for pair in pairs if pair[0].dtype == dtype]
        torch._foreach_copy_([target for _, target in group], [source for source, _ in group])


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


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keep the garbage collector from running: what it frees may wait for the device, which no recording survives."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()

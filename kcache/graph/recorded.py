"""One recorded step: how it is made, which memory it is for, and how what a replay changes in place is undone."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from transformers import PreTrainedModel

from kcache.cache import KCache
from kcache.graph.fuse import Fusion
from kcache.graph.step import GraphStep
from kcache.machine.tape import Tape

_RECORDING = threading.Lock()


class RecordedStep:
    """A step of a model with a cache, to be recorded by :meth:`make`.

    Parameters
    ----------
    model, cache, padded
        See :class:`~kcache.graph.step.GraphStep`.
    tape : Tape

    Attributes
    ----------
    logits : Tensor ``[B, vocabulary]``
        Where a replay leaves them.
    key : tuple
        The :meth:`fingerprint` it was made at.
    proofs : int
        Steps so far that agreed with steps taken without it.
    fused : dict
        How many norms and the like run as one kernel.
    """

    logits: torch.Tensor

    def __init__(self, model: PreTrainedModel, cache: KCache, padded: bool, tape: Tape) -> None:
        self.step, self.tape = GraphStep(model, cache, padded), tape
        self.key: tuple[object, ...] = ()
        self.proofs = 0
        self.fused: dict[str, int] = {}
        self._model = model
        self._kept: list[torch.Tensor] = []  # as they were before the latest step: what that changes in place
        self._scratch: tuple[object, ...] = ()  # what the kernels write into, which has to stay

    def make(self, cache: KCache, tokens: torch.Tensor, going: torch.Tensor | None, end: int, fuse: bool) -> None:
        """Record the step that comes to ``end`` rows, with small kernels taken together or not; it is then undone."""
        self.step.enter(cache)
        self.step.feed(tokens, going, end)
        self._kept = [tensor.clone() for tensor in cache.shared.step_state]
        fusion, spread = Fusion(self._model), cache.shared.spread
        place = None if spread is None else spread.place
        try:
            with _without_collector(), fusion.applied() if fuse else nullcontext():
                self.logits = self.tape.record(self.step.run, tokens.device)
        finally:
            self.fused = fusion.used
            self.take_back(cache)
            if spread is not None and place is not None:
                spread.go_back(place)
        self._scratch = cache.shared.scratch

    def fingerprint(self, cache: KCache, padded: bool, weights: int) -> tuple[object, ...]:
        """What a recording depends on now; ``weights`` tells where the model's are."""
        counters = tuple(tensor.data_ptr() for tensor in cache.shared.step_state)
        return (padded, weights, counters, *self.step.fingerprint())

    def keep(self, cache: KCache) -> None:
        """Note what the next step changes in place, should it turn out not to be wanted."""
        _copy(cache.shared.step_state, self._kept)

    def take_back(self, cache: KCache) -> None:
        """Undo what a step has changed in place, and what is kept of the row it wrote past the end."""
        _copy(self._kept, cache.shared.step_state)
        forget_unseen(cache)

    @contextmanager
    def set_aside(self, cache: KCache) -> Iterator[None]:
        """Inside, what is counted leaves out the latest step."""
        state = cache.shared.step_state
        counted = [tensor.clone() for tensor in state]
        _copy(self._kept, state)
        try:
            yield
        finally:
            _copy(counted, state)


def forget_unseen(cache: KCache) -> None:
    """Forget what tiered layers keep of a row past the end."""
    for layer in cache.tiered_layers:
        layer.forget_unseen()


def _copy(sources: list[torch.Tensor], targets: list[torch.Tensor]) -> None:
    """Copy many small tensors, in one launch for each dtype."""
    pairs = list(zip(sources, targets, strict=True))
    for dtype in {source.dtype for source in sources}:
        group = [pair for pair in pairs if pair[0].dtype == dtype]
        torch._foreach_copy_([target for _, target in group], [source for source, _ in group])


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keep the garbage collector from running: what it frees may wait for the device, which no recording survives.

    It is the whole process's, so one thread records at a time.
    """
    with _RECORDING:
        enabled = gc.isenabled()
        gc.disable()
        try:
            yield
        finally:
            if enabled:
                gc.enable()

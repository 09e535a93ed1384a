"""The decode loop: one token per sequence and step, by replaying a recorded step where there is one.

Reading a token waits for the device to have chosen it, and no more: where nobody may end a sequence in between, the
next step is already under way by then, so the device does not wait for the host to look.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TYPE_CHECKING

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from kcache.cache import KCache
from kcache.decoding.forward import step_logits
from kcache.decoding.sampling import Sampler
from kcache.machine.arriving import Arriving
from kcache.machine.devices import has_triton
from kcache.machine.parallel import ranks_of
from kcache.watch.capture import watchers_of

if TYPE_CHECKING:
    from kcache.graph.decoder import GraphDecoder


def decode(
    model: PreTrainedModel,
    cache: Cache,
    logits: torch.Tensor,
    sampler: Sampler,
    history: torch.Tensor,
    mask: torch.Tensor | None = None,
    ended: Sequence[bool] = (),
    pad_id: int = 0,
) -> Generator[list[int], Sequence[int] | None, None]:
    """Decode without end: yields the token of each sequence, and runs the model on them when asked for more.

    Sent the places of some sequences, in ascending order, it goes on with those alone, and the cache holds no others.

    This is the loop that chat and generate run and that the benchmark times: the time between two tokens is the
    inter-token latency.

    Parameters
    ----------
    model : PreTrainedModel
        Attached, if the cache is a :class:`~kcache.KCache`.
    cache : Cache
        Any transformers cache that holds the past.
    logits : Tensor ``[B, vocabulary]``
        Of the past's last position.
    sampler : Sampler
    history : Tensor ``[B, T]``
        The tokens so far, for samplers that read them.
    mask : Tensor ``[B, T]`` or None
        Which positions of the past are real.
    ended : sequence of bool, optional
        Sequences to feed padding from now on; the caller keeps it up to date. Empty where that will not happen.
    pad_id : int
    """
    ranks = ranks_of(model)
    steps = _Steps(model, cache, mask)
    try:
        while True:
            tokens = ranks.first(sampler.pick(logits, history))
            arriving = Arriving(tokens)
            if not ended:
                steps.launch(tokens)
            kept = yield arriving.numpy().tolist()
            if sampler.needs_history:
                history = torch.cat([history, tokens[:, None]], 1)
            logits = steps.take(tokens, ended, pad_id)
            if kept is not None:
                index = torch.tensor(kept, device=logits.device)
                logits, history = logits[index], history[index]
                steps.keep(index)
    finally:
        steps.leave()


def graph_of(cache: KCache) -> GraphDecoder | None:
    """Who decodes by replaying recorded steps; None where nothing records them, or the policy does without."""
    shared = cache.shared
    if shared.make_tape is None or (shared.recording is None and not has_triton()):  # asked for each token
        return None
    from kcache.graph.decoder import GraphDecoder

    if not isinstance(shared.recording, GraphDecoder):
        shared.recording = GraphDecoder(shared.make_tape)
    return shared.recording


class _Steps:
    """The steps of one run, each by the recording or by a forward, and the mask that forwards want."""

    def __init__(self, model: PreTrainedModel, cache: Cache, mask: torch.Tensor | None) -> None:
        self.model, self.cache, self.mask = model, cache, mask
        self.graph: GraphDecoder | None = None
        self._run = 0
        self._logits: torch.Tensor | None = None
        self._outdated = False
        if isinstance(cache, KCache) and (graph := graph_of(cache)) is not None:
            self.graph = graph
            self._run = self.graph.begin(model, cache)

    def launch(self, tokens: torch.Tensor, going: torch.Tensor | None = None) -> None:
        """Have the recording take the step, if it can; nothing changes yet on the host."""
        if self.graph is not None:
            self._logits = self.graph.launch(self._run, tokens, going)

    def take(self, tokens: torch.Tensor, ended: Sequence[bool], pad_id: int) -> torch.Tensor:
        """The logits of the step that feeds ``tokens`` ``[B]``, or padding to those that have ended."""
        going = None
        if any(ended):
            going = ~torch.tensor(ended, device=tokens.device)
            tokens = torch.where(going, tokens, pad_id)
        if ended:
            self.launch(tokens, going)
        logits, self._logits = self._logits, None
        if logits is not None and self.graph is not None and self.graph.commit(self._run):
            self._outdated = True
            return logits
        self._extend(going, len(tokens))
        logits = step_logits(self.model, self.cache, tokens[:, None], self.mask)
        if self.graph is not None:
            self.graph.check(self._run, logits)
        return logits

    def _extend(self, going: torch.Tensor | None, batch: int) -> None:
        """Let the mask cover the step that comes."""
        if self._outdated:
            assert isinstance(self.cache, KCache)
            length = int(self.cache.get_seq_length())
            rows = self.cache.shared.validity.rows(0, length, self.model.device)
            self.mask, self._outdated = None if rows is None else rows.long(), False
        if going is not None:
            if self.mask is None:
                self.mask = going.new_ones(batch, int(self.cache.get_seq_length()), dtype=torch.long)
            self.mask = torch.cat([self.mask, going[:, None].to(self.mask.dtype)], 1)
        elif self.mask is not None:
            self.mask = torch.cat([self.mask, self.mask.new_ones(self.mask.shape[0], 1)], 1)

    def keep(self, index: torch.Tensor) -> None:
        """Go on with the sequences ``index`` ``[B']`` alone."""
        assert isinstance(self.cache, KCache)
        self.cache.reorder_cache(index)  # which layers with a recurrent state know, too
        if self.mask is not None:
            self.mask = self.mask[index]
        for watcher in watchers_of(self.model):
            watcher.keep(self.cache, index.tolist())

    def leave(self) -> None:
        """End the run."""
        if self.graph is not None:
            self.graph.leave(self._run)

"""What TopN costs in predictions: a text forced through full attention and through each policy, step beside step.

A place of the text is prefilled once, exactly, and every policy's cache begins with those rows. The steps after it
run blockwise (:mod:`kcache.layers.stepwise`): one forward over a block of tokens, in which each offloaded layer still
decodes token by token, by the engine's own code. A policy under which layers depend on each other from step to step
gets its tokens one by one, which takes a few times as long.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from kcache.attaching import attach
from kcache.cache import KCache
from kcache.decoding.forward import step_logits
from kcache.evaluate.figures import Figures
from kcache.evaluate.forks import FULL, Prefix
from kcache.evaluate.layers import LayerLook
from kcache.evaluate.places import Place
from kcache.layers.snapshots import total
from kcache.layers.stepwise import Look, no_look
from kcache.models.arguments import with_cache
from kcache.policy import Policy
from kcache.telemetry import Stats

if TYPE_CHECKING:
    from kcache.models.loaded import LoadedModel

_BLOCK = 64
"""Steps in one forward: more saves little and takes room for their logits."""


@dataclass(frozen=True)
class Case:
    """A policy, and what it is called."""

    name: str
    policy: Policy

    @property
    def label(self) -> str:
        """The case in words."""
        return f"{self.name} N={self.policy.topn}"


def measure(
    lm: LoadedModel,
    place: Place,
    steps: int,
    cases: Sequence[Case],
    watch: Callable[[str], None] = lambda label: None,
) -> Iterator[tuple[Case, Figures]]:
    """Measure each case at a place, yielding its figures as soon as they are known.

    Parameters
    ----------
    lm : LoadedModel
    place : Place
        Its last ``steps + 1`` tokens are the steps and what the last of them should predict.
    steps : int
    cases : sequence of Case
    watch : callable
        Told what begins: ``prefill``, ``full attention``, then the label of each case.
    """
    held = HeldPlace(lm, place, steps, watch)
    for case in cases:
        watch(case.label)
        yield case, held.beside(case.policy)


class HeldPlace:
    """A place that has been prefilled, and what full attention says of its steps; policies can be measured at it.

    Parameters
    ----------
    lm, place, steps, watch
        See :func:`measure`.
    """

    def __init__(
        self, lm: LoadedModel, place: Place, steps: int, watch: Callable[[str], None] = lambda label: None
    ) -> None:
        self._lm, self._steps, self._prompt = lm, steps, place.ids[:, : -steps - 1]
        watch("prefill")
        self._prefix = Prefix(lm, self._prompt[0, :-1].tolist())
        watch("full attention")
        ids, following = place.ids[:, -steps - 1 : -1], place.ids[0, -steps:, None]
        self._start, self._ids, self._following = place.start, ids, following.split(_BLOCK)
        self._full = [*_forced(lm, self._begin(FULL), ids)]

    def beside(self, policy: Policy) -> Figures:
        """Measure a policy: force the tokens through a cache under it, and compare block by block."""
        cache = self._begin(policy)
        look, before = LayerLook(), _tiered(cache)
        rows = {layer.index: layer.rows_fetched for layer in cache.tiered_layers}
        kl, same, nll_full, nll = [], [], [], []
        found = _forced(self._lm, cache, self._ids, look)
        for full, got, tokens in zip(self._full, found, self._following, strict=True):
            kl.append((full.exp() * (full - got)).sum(-1))
            same.append(full.argmax(-1) == got.argmax(-1))
            nll_full.append(-full.gather(1, tokens))
            nll.append(-got.gather(1, tokens))
        after = _tiered(cache)
        return Figures(
            start=self._start,
            nll_full=float(torch.cat(nll_full).mean()),
            nll=float(torch.cat(nll).mean()),
            kl=[float(f"{value:.4g}") for value in torch.cat(kl).tolist()],
            top1=float(torch.cat(same).float().mean()),
            mass=look.mass(),
            rows_per_kv_head=_rows(cache, rows, look),
            bytes_h2d_per_token=(after.bytes_h2d - before.bytes_h2d) / self._steps,
            device_overhead=(after.device_bytes - after.k_bytes) / max(1, after.full_kv_bytes),
            layer_error=look.errors(len(cache.layers)),
        )

    def _begin(self, policy: Policy) -> KCache:
        """A cache under ``policy`` that holds the prompt, whose last token it attends exactly, as the others were.

        After that token a cache filled by copying is as its own prefill would have left it: the tail has seen all rows,
        and no step will be charged for showing them to it.
        """
        (cache,) = self._prefix.fork((), [policy], self._steps + 1).caches
        with attach(self._lm.model), cache.exact():
            step_logits(self._lm.model, cache, self._prompt[:, -1:])
        return cache


@torch.no_grad()
def _forced(lm: LoadedModel, cache: KCache, ids: torch.Tensor, look: Look = no_look) -> Iterator[torch.Tensor]:
    """Log-probabilities ``[block, vocabulary]`` fp32 after each of the tokens ``[1, T]``, block by block."""
    with attach(lm.model), cache.stepwise(look):
        for block in ids.split(_BLOCK, 1):
            pieces = block.split(_BLOCK if cache.shared.layers_apart else 1, 1)
            logits = [lm.model(input_ids=piece, **with_cache(lm.model, cache)).logits[0] for piece in pieces]
            yield torch.cat(logits).float().log_softmax(-1)


def _tiered(cache: KCache) -> Stats:
    """Totals of the layers whose V may leave; what others hold no policy can change."""
    return total(layer.stats() for layer in cache.tiered_layers)


def _rows(cache: KCache, before: dict[int, int], look: LayerLook) -> float:
    """Rows fetched per KV head and step, averaged over the layers that picked; 0 if none did."""
    found = []
    for layer in cache.tiered_layers:
        if look.steps[layer.index] and layer.keys is not None:
            fetched = layer.rows_fetched - before[layer.index]
            found.append(fetched / look.steps[layer.index] / layer.keys.shape[1])
    return sum(found) / len(found) if found else 0.0

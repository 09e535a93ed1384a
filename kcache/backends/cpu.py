"""The CPU backend: compiled kernels where they apply, and the reference's arithmetic with the copies taken out.

From a few hundred rows on, steps in bf16 and fp32 go to :mod:`kcache.backends.jit`, if Numba is there. What remains is
torch: short contexts, fp16, soft-capped scores, picks per query head.

A product over a slice of a larger buffer copies K first; over the whole buffer, or per head, the product reads the
rows in place. Scores and probabilities live in scratch memory that layers and steps share. In 16-bit types the scores
are rounded to K's dtype, which moves the logits of a whole model no more than stock bf16 attention does
(docs/log.md).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from kcache.backends.base import MOST, DecodeResult, DecodeStep, count_picks
from kcache.backends.jit import has_numba
from kcache.backends.reference import ReferenceBackend, probabilities

if TYPE_CHECKING:
    from kcache.backends.jit.steps import Kernels

_WORTH = 128
"""Rows from which a compiled TopN step beats torch's operators."""
_LONG = 1024
"""Rows from which a compiled exact step, or else two batched products, beats SDPA."""
_LINE = 64
"""Rows are padded to whole multiples of this."""
_CLASS = 16
"""Rows in a class of the first stage of ``select``."""


class CpuBackend(ReferenceBackend):
    """The four verbs with products that read K and V where they are."""

    name = "cpu"

    def __init__(self) -> None:
        self._scores = _Scratch()
        self._probs = _Scratch()
        self._kernels: Kernels | None = None

    def decode(self, step: DecodeStep) -> DecodeResult:
        """Run the four verbs for one layer."""
        if step.narrow is not None or step.value_scales is not None:
            return ReferenceBackend().decode(step)
        kernels = self._compiled(step)
        result = kernels.decode(step) if kernels is not None and kernels.serves_decode(step) else None
        if result is None:
            return super().decode(step)
        count_picks(result.picks, step)
        return result

    def _compiled(self, step: DecodeStep) -> Kernels | None:
        """The kernels, if they are worth calling."""
        if step.length < _WORTH or not has_numba():
            return None
        if self._kernels is None:
            from kcache.backends.jit.steps import Kernels

            self._kernels = Kernels()
        # One thread of ours against all of torch's pays where torch has no product for the type.
        alone = self._kernels.alone and torch.get_num_threads() > 1
        return None if alone and step.keys.dtype == torch.float32 else self._kernels

    def dense(self, step: DecodeStep) -> torch.Tensor:
        """Exact attention over K and V on the device, ``[B, Hq, Dv]``.

        In torch, two batched products are up to 2.5 times as fast as SDPA for long contexts in 16-bit types.
        """
        kernels = None if step.length < _LONG else self._compiled(step)
        if kernels is not None and kernels.serves_dense(step):
            return kernels.dense(step)
        short = step.length < _LONG or step.query.dtype.itemsize != 2
        if short or not _is_plain(step) or not _is_full(step.values, step.length):
            return super().dense(step)
        batch, _, capacity, dim = step.values.shape
        probs = self.score(step).flatten(0, 1)
        weights = torch.zeros(*probs.shape[:2], capacity, dtype=step.values.dtype)
        weights[..., : probs.shape[2]] = probs
        return torch.bmm(weights, step.values.view(-1, capacity, dim)).view(batch, -1, dim)

    def score(self, step: DecodeStep) -> torch.Tensor:
        """Attention probabilities of every row, ``[B, Hkv, G, at least L]`` fp32, in scratch memory.

        Rows are padded to whole cache lines: what follows is faster on aligned rows.
        """
        batch, heads = step.keys.shape[:2]
        query = (step.query * step.scaling).view(batch, heads, -1, step.query.shape[2])
        scores = self._products(query, step.keys, step.length)
        if not _is_plain(step):
            return probabilities(scores[..., : step.length].float(), step)
        width = -(-step.length // _LINE) * _LINE
        scores = scores[..., :width]
        scores[..., step.length :] = float("-inf")
        return torch.softmax(scores, -1, dtype=torch.float32, out=self._probs.take(scores.shape, torch.float32))

    def _products(self, query: torch.Tensor, keys: torch.Tensor, length: int) -> torch.Tensor:
        """Products of ``query`` ``[B, Hkv, G, D]`` with the first ``length`` keys or more, ``[B, Hkv, G, ...]``.

        One batched product over whole buffers, the rows not yet filled included, is faster than one per head, as long
        as few rows are wasted on it.
        """
        batch, heads, group, dim = query.shape
        capacity = keys.shape[2]
        if _is_full(keys, length):
            scores = self._scores.take((batch * heads, group, capacity), keys.dtype)
            torch.bmm(query.flatten(0, 1), keys.view(-1, capacity, dim).transpose(1, 2), out=scores)
            return scores.view(batch, heads, group, capacity)
        scores = self._scores.take((batch, heads, group, length), keys.dtype)
        for sequence in range(batch):
            for head in range(heads):
                torch.mm(query[sequence, head], keys[sequence, head, :length].T, out=scores[sequence, head])
        return scores

    def select(self, probs: torch.Tensor, step: DecodeStep) -> torch.Tensor:
        """Positions of the largest probabilities, ``[B, Hkv, N]`` or ``[B, Hkv, G, N]``.

        Those above a threshold take one look at each row. The N largest are found in two stages: every one of them
        lies in one of the N classes of rows, ``i mod (W / 16)``, with the largest maxima; were it in another, N
        classes would each hold one at least as large. A class's rows are far apart, so the maxima of all classes are
        taken by whole vectors.
        """
        count, width = step.policy.topn, probs.shape[3]
        if step.threshold is not None:
            return self._above(probs, step, step.threshold)
        classes = width // _CLASS
        if width % _CLASS or classes < 4 * count:
            return super().select(probs, step)
        weight = probs.amax(2) if step.policy.select == "group" else probs.clone()
        weight[..., step.length :] = -1.0
        rows = weight.view(-1, width)
        best = rows.view(-1, _CLASS, classes).amax(1).topk(count, -1, sorted=False).indices
        members = torch.arange(0, width, classes).view(1, -1, 1)
        positions = (best.unsqueeze(1) + members).flatten(1)
        picks = rows.gather(1, positions).topk(count, -1, sorted=False).indices
        return positions.gather(1, picks).view(*weight.shape[:-1], count)

    def _above(self, probs: torch.Tensor, step: DecodeStep, threshold: torch.Tensor) -> torch.Tensor:
        """The rows above the threshold; the padding of ``probs`` is 0 and never is."""
        weight = probs.amax(2) if step.policy.select == "group" else probs
        least = threshold.view(-1, *[1] * (weight.dim() - 1))
        head, row = (weight > least).flatten(0, -2).nonzero(as_tuple=True)
        counts = torch.bincount(head, minlength=weight[..., 0].numel())
        most = int(counts.max())
        if most > MOST * step.policy.topn:
            return super().select(probs, step)
        picks = row.new_full((len(counts), max(1, most)), -1)
        picks[head, torch.arange(len(head)) - (counts.cumsum(0) - counts)[head]] = row
        return picks.view(*weight.shape[:-1], -1)

    def fetch(self, picks: torch.Tensor, step: DecodeStep) -> torch.Tensor:
        """The picked V rows, ``[B, Hkv, N, Dv]`` or ``[B, Hkv, G, N, Dv]``: whole rows, by their place in memory."""
        if not step.values.is_contiguous():
            return super().fetch(picks, step)
        batch, heads, capacity, dim = step.values.shape
        first = torch.arange(0, batch * heads * capacity, capacity).view(batch, heads, *[1] * (picks.dim() - 2))
        rows = step.values.view(-1, dim).index_select(0, (picks.clamp(min=0) + first).view(-1))
        return rows.view(*picks.shape, dim)


def compile_ahead(device: torch.device, dtype: torch.dtype, rows: int = _LONG) -> None:
    """Compile what a prompt of ``rows`` rows and the steps after it will call, so that none waits; seconds, once."""
    if device.type == "cpu" and rows >= _LONG and has_numba():
        from kcache.backends.jit.prefill import compile_prompt
        from kcache.backends.jit.steps import compile_steps

        compile_prompt(dtype)
        compile_steps(dtype)


def _is_plain(step: DecodeStep) -> bool:
    """Whether scores go into the softmax as they are."""
    return step.softcap is None and step.mask is None and step.sinks is None


def _is_full(rows: torch.Tensor, length: int) -> bool:
    """Whether a product over the whole buffer wastes at most a quarter on rows not yet filled."""
    return rows.is_contiguous() and rows.shape[2] * 4 <= length * 5


class _Scratch:
    """Memory that is taken anew for each use and grows as needed."""

    def __init__(self) -> None:
        self._data: torch.Tensor | None = None

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory of this shape; whatever was taken before is overwritten."""
        count = torch.Size(shape).numel()
        if self._data is None or self._data.numel() < count or self._data.dtype != dtype:
            with torch.inference_mode(False):  # memory made in inference mode could not be written to outside of it
                self._data = torch.empty(count + count // 8, dtype=dtype)
        return self._data[:count].view(shape)

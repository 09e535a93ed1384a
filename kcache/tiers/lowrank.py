"""The low-rank tail: what each row that was not picked still contributes, by its place in a few directions of V.

The unpicked rows hold 10-25 % of the attention mass, and each of them little. A row of V is approximated as
``v ~ base + U c`` with ``c = U^T v``: U holds the directions of one KV head in which its rows differ most, ``base`` is
the mean of what they leave out. Only ``c``, a sixteenth of V by default, stays on the device. The part of a row that
is lost is nearly independent from row to row, so over many rows of little weight it averages out; a mean over
neighbouring rows loses fifteen sixteenths of a row's variance, the directions lose much less (docs/log.md).

U and base are fitted per sequence and KV head on the first rows that a layer offloads, and again whenever a sequence
may have twice as many real rows, until there are 2,048. The directions are the leading principal components, found by
subspace iteration (Halko, Martinsson & Tropp, 2011): batched products, no full eigendecomposition. On CUDA one kernel
does all of it (:mod:`kcache.backends.triton.directions`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from kcache.backends.base import LowRank
from kcache.machine.devices import runs_kernels
from kcache.planning.sizes import rank_of
from kcache.tiers.rows import RowBuffer

_ENOUGH = 2048
"""Rows after which directions are fitted no more, and the most that a fit reads."""
_SPARE = 4
"""Further directions the iteration carries, for speed of convergence."""
_ROUNDS = 6


class LowRankTail:
    """Coefficients of V's rows of one layer, ``[B, H, r, T]``.

    Parameters
    ----------
    rank : int or None
        Directions per KV head; None for a sixteenth of its size.
    device : torch.device
    room : callable, optional
        Tells how many rows to make room for when the coefficients have to grow.

    Attributes
    ----------
    length, fitted : int
        Rows taken in, and how many real ones base and basis were fitted on in the sequence that has fewest.
    """

    def __init__(self, rank: int | None, device: torch.device, room: Callable[[], int] | None = None) -> None:
        self.length = 0
        self.fitted = 0
        self._due = 0
        self._rank = rank
        self._coefficients = RowBuffer(device, room, axis=3)
        self._base: torch.Tensor | None = None
        self._basis: torch.Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes held on the device."""
        fitted = [tensor for tensor in (self._base, self._basis) if tensor is not None]
        return self._coefficients.nbytes + sum(tensor.nbytes for tensor in fitted)

    def state(self) -> LowRank:
        """What a decode step reads."""
        assert self._base is not None and self._basis is not None and self._coefficients.data is not None
        return LowRank(self._base, self._basis, self._coefficients.data)

    def begins_at(self, end: int) -> int:
        """The first row that :meth:`append` must be given to come to ``end`` rows: 0 when a fit is due."""
        return 0 if self.fitted < _ENOUGH and end >= self._due else self.length

    def append(self, rows: torch.Tensor, valid: torch.Tensor | None, start: int) -> None:
        """Take in rows; from the first one on, they are fitted.

        Parameters
        ----------
        rows : Tensor ``[B, H, T, D]``
            V, on the device.
        valid : Tensor ``[B, T]`` bool, or None when all are valid
        start : int
            The number of the first of them, from :meth:`begins_at`.
        """
        if valid is not None:
            rows = torch.where(valid[:, None, :, None], rows, 0)
        if start == 0:
            self._fit(rows, valid)
        assert self._basis is not None
        end = start + rows.shape[2]
        self._coefficients.reserve(rows.transpose(2, 3)[:, :, : self._basis.shape[2]], end)
        fresh = torch.matmul(self._basis.to(rows.dtype), rows.transpose(2, 3))
        self._coefficients.view(end)[..., start:].copy_(fresh)
        self.length = end

    def _fit(self, rows: torch.Tensor, valid: torch.Tensor | None) -> None:
        """Find base and basis of ``rows``, whose invalid ones are 0."""
        count = rows.shape[2]
        self.fitted = count if valid is None else int(valid.sum(1).min())
        self._due = count + max(1, self.fitted)
        with torch.autocast(rows.device.type, enabled=False):
            self._fit_sample(rows, valid, -(-count // _ENOUGH))

    def _fit_sample(self, rows: torch.Tensor, valid: torch.Tensor | None, step: int) -> None:
        """Find base and basis of every ``step``-th row."""
        sample = rows[:, :, ::step].float().nan_to_num(0.0, 0.0, 0.0)
        kept = None if valid is None else valid[:, None, ::step, None].to(sample.dtype)
        count = float(sample.shape[2]) if kept is None else kept.sum(2, keepdim=True).clamp(min=1)
        mean = sample.sum(2, keepdim=True) / count
        centred = sample - mean if kept is None else (sample - mean) * kept
        basis = _leading(torch.matmul(centred.transpose(2, 3), centred), rank_of(self._rank, rows.shape[3]))
        mean = mean.squeeze(2)
        along = torch.matmul(basis, mean.unsqueeze(3))
        base = mean - torch.matmul(along.transpose(2, 3), basis).squeeze(2)
        if self._basis is None or self._base is None or self._basis.shape != basis.shape:
            self._basis, self._base = basis, base
        else:  # where they were, so that a step recorded before goes on
            self._basis.copy_(basis)
            self._base.copy_(base)

    def crop(self, length: int) -> None:
        """Cut back to ``length`` rows; base and basis stay until more rows follow than they would be right for."""
        if length < self.length:
            self._coefficients.wipe(length, self.length)
            self.length = length
            self.fitted = min(self.fitted, length)
            self._due = min(self._due, length + max(1, self.fitted))

    def select(self, index: torch.Tensor) -> None:
        """Keep the batch rows ``index`` ``[B']``."""
        self._coefficients.select(index)
        if self._base is not None and self._basis is not None:
            index = index.to(self._base.device)
            self._base, self._basis = self._base.index_select(0, index), self._basis.index_select(0, index)


def _leading(covariance: torch.Tensor, rank: int) -> torch.Tensor:
    """Orthonormal rows ``[..., rank, D]`` that span the leading eigenvectors of ``[..., D, D]``."""
    dim = covariance.shape[-1]
    carried = min(dim, rank + _SPARE)
    if runs_kernels(covariance.device):
        from kcache.backends.triton.directions import leading_directions, takes

        if takes(dim, carried):
            return leading_directions(covariance, rank, carried, _ROUNDS)
    at = covariance.diagonal(dim1=-2, dim2=-1).topk(carried).indices
    span = torch.zeros(*at.shape[:-1], dim, carried, dtype=torch.float32, device=at.device).scatter_(
        -2, at.unsqueeze(-2), 1.0
    )
    for _ in range(_ROUNDS):
        span = torch.linalg.qr(torch.matmul(covariance, span)).Q
    small = torch.matmul(span.transpose(-2, -1), torch.matmul(covariance, span))
    turned = torch.linalg.eigh(small).eigenvectors[..., -rank:]
    return torch.matmul(span, turned).transpose(-2, -1).contiguous()

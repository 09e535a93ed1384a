"""What the CPU backend calls: a decode step's tensors in, a region run on them, the result out.

Shapes: B sequences, Hq query heads, Hkv KV heads, G = Hq / Hkv, D and Dv head sizes, r directions of the tail.
"""

from __future__ import annotations

import numpy as np
import torch

from kcache.backends.base import DecodeResult, DecodeStep
from kcache.backends.jit.regions import AT, COMBINE, FIELDS, SCORE, compiled
from kcache.backends.jit.team import find_team
from kcache.spread import MOST

_PIECE = 1024
"""Rows of a head that a thread takes at a time."""
_TYPES = (torch.bfloat16, torch.float32)


class Kernels:
    """The compiled decode steps, with scratch memory that layers and steps share."""

    def __init__(self) -> None:
        self._team = find_team()
        self._scratch: dict[str, torch.Tensor] = {}
        self._at = np.zeros(len(FIELDS), np.int64)

    @staticmethod
    def serves_dense(step: DecodeStep) -> bool:
        """Whether :meth:`dense` can attend this step."""
        keys, values = step.keys, step.values
        whole = keys.is_contiguous() and values.is_contiguous() and keys.dtype == values.dtype == step.query.dtype
        even = keys.shape[3] % 2 == 0 and values.shape[3] % 2 == 0
        return whole and even and keys.dtype in _TYPES and step.softcap is None

    @classmethod
    def serves_decode(cls, step: DecodeStep) -> bool:
        """Whether :meth:`decode` can answer this step."""
        return cls.serves_dense(step) and step.policy.select == "group" and step.policy.tail != "block"

    def decode(self, step: DecodeStep) -> DecodeResult | None:
        """Run the four verbs; None if a head wants more rows than it may have, for somebody else to sort out."""
        at, items, group, keep = self._begin(step)
        batch, kv_heads = step.keys.shape[:2]
        dim_v, pieces = step.values.shape[3], -(-step.length // _PIECE)
        policy, tail = step.policy, step.lowrank
        rank = 0 if tail is None else tail.basis.shape[2]
        count = min(policy.topn, step.length)
        most = count if step.threshold is None else min(MOST * count, step.length)
        picks = torch.empty(items, most, dtype=torch.int64)
        found = torch.full((items,), count, dtype=torch.int64)
        mass = torch.empty(items, group)
        self._set(at, rank=rank, most=most, renormalises=int(policy.tail == "renormalise"))
        self._point(at, picks=picks, found=found, mass=mass)
        self._point(at, along=self._take("along", items * pieces * group * (rank + 1)))
        if tail is not None:
            base, basis = (_split(part, step.values.dtype).contiguous() for part in (tail.base, tail.basis))
            keep += (base, basis)
            self._point(at, base=base, basis=basis, coefficients=tail.coefficients)
            self._set(at, c_capacity=tail.coefficients.shape[3])
        out = torch.empty(items, group, 2, dim_v // 2)
        self._point(at, out=out)
        region = compiled("decode", step.keys.dtype)
        if step.threshold is not None:
            least = step.threshold.float().contiguous()
            self._point(at, threshold=least, lists=self._take("lists", items * pieces * _PIECE, torch.int32))
            self._point(at, counts=self._take("counts", items * pieces, torch.int64))
            self._run(region, SCORE | COMBINE)
            longest = int(found.max())
            if longest > most:
                return None
            picks = picks[:, : max(1, longest)]
        else:
            self._run(region, SCORE)
            weights = self._scratch["weights"][: items * pieces * _PIECE].view(items, -1)[:, : step.length]
            torch.topk(weights, count, sorted=False, out=(torch.empty(items, count), picks))
            self._run(region, COMBINE)
        joined = _joined(out, step.values.dtype).reshape(batch, kv_heads * group, dim_v).to(step.query.dtype)
        return DecodeResult(joined, picks.view(batch, kv_heads, -1), mass.view(batch, kv_heads, group))

    def dense(self, step: DecodeStep) -> torch.Tensor:
        """Exact attention, ``[B, Hq, Dv]``."""
        at, items, group, keep = self._begin(step)
        batch, kv_heads = step.keys.shape[:2]
        dim_v, pieces = step.values.shape[3], -(-step.length // _PIECE)
        out = torch.empty(items, group, 2, dim_v // 2)
        self._point(at, out=out, along=self._take("along", items * pieces * group * dim_v))
        self._run(compiled("dense", step.keys.dtype), 0)
        del keep
        return _joined(out, step.values.dtype).reshape(batch, kv_heads * group, dim_v).to(step.query.dtype)

    def _begin(self, step: DecodeStep) -> tuple[np.ndarray, int, int, tuple[torch.Tensor, ...]]:
        """Write down what both steps share; returns the places, items, G, and tensors that must outlive the region."""
        batch, kv_heads, capacity, dim = step.keys.shape
        items, group = batch * kv_heads, step.query.shape[1] // kv_heads
        at = self._at
        at[:] = 0
        pieces = -(-step.length // _PIECE)
        query = _split((step.query.float() * step.scaling).view(items, group, dim), step.keys.dtype).contiguous()
        keep: tuple[torch.Tensor, ...] = (query,)
        self._set(
            at,
            threads=self._team.threads,
            number=self._team.number,
            barrier=self._team.barrier,
            items=items,
            kv_heads=kv_heads,
            length=step.length,
            piece=_PIECE,
            group=group,
            k_words=dim * step.keys.element_size() // 4,
            v_words=step.values.shape[3] * step.values.element_size() // 4,
            half=dim // 2,
            half_v=step.values.shape[3] // 2,
            k_capacity=capacity,
            v_capacity=step.values.shape[2],
        )
        self._point(
            at,
            query=query,
            keys=step.keys,
            values=step.values,
            scores=self._take("scores", items * group * pieces * _PIECE),
            weights=self._take("weights", items * pieces * _PIECE),
            peaks=self._take("peaks", items * group * pieces),
            totals=self._take("totals", items * group * pieces),
        )
        if step.mask is not None:
            mask = step.mask.contiguous().view(torch.uint8)
            keep += (mask,)
            self._set(at, mask_stride=mask.shape[1])
            self._point(at, mask=mask)
        if step.sinks is not None:
            sinks = step.sinks.float().contiguous()
            keep += (sinks,)
            self._point(at, sinks=sinks)
        return at, items, group, keep

    def _run(self, region: int, passes: int) -> None:
        self._set(self._at, passes=passes)
        self._team.run(region, self._at.ctypes.data, int(self._at[AT["threads"]]))

    def _take(self, name: str, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Scratch memory under a name, grown as needed; what it held before is lost."""
        held = self._scratch.get(name)
        if held is None or held.numel() < count:
            with torch.inference_mode(False):
                held = self._scratch[name] = torch.empty(count + count // 8, dtype=dtype)
        return held

    @staticmethod
    def _set(at: np.ndarray, **numbers: int) -> None:
        for name, number in numbers.items():
            at[AT[name]] = number

    @staticmethod
    def _point(at: np.ndarray, **tensors: torch.Tensor) -> None:
        for name, tensor in tensors.items():
            at[AT[name]] = tensor.data_ptr()


def _split(rows: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``[..., D]`` in the halves that a reader of ``dtype`` has in registers, ``[..., 2, D / 2]``."""
    if dtype == torch.bfloat16:
        return rows.unflatten(-1, (-1, 2)).transpose(-1, -2)
    return rows.unflatten(-1, (2, -1))


def _joined(halves: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The opposite of :func:`_split`."""
    if dtype == torch.bfloat16:
        halves = halves.transpose(-1, -2)
    return halves.flatten(-2)

"""What the CPU backend calls: a decode step's tensors in, a region run on them, the result out.

Shapes: B sequences, Hq query heads, Hkv KV heads, G = Hq / Hkv, D and Dv head sizes, r directions of the tail.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from kcache.backends.base import MOST, DecodeResult, DecodeStep
from kcache.backends.jit.entries import compiled
from kcache.backends.jit.regions import COMBINE, FIELDS, SCORE
from kcache.backends.jit.team import find_team

_PIECES = (4096, 2048, 1024, 512, 256)
"""Rows of a head that a thread may take at a time."""
_SHARES = 8
"""Pieces for each thread, at least, so that none waits long for another."""
_TYPES = (torch.bfloat16, torch.float32)


def compile_steps(dtype: torch.dtype) -> None:
    """Compile the regions for rows of ``dtype``, or read them from disk."""
    if dtype in _TYPES:
        for name in ("decode", "dense"):
            compiled(name, dtype)


class Kernels:
    """The compiled decode steps, with scratch memory that layers and steps share."""

    def __init__(self) -> None:
        self._team = find_team()
        self._scratch: dict[str, torch.Tensor] = {}

    @property
    def alone(self) -> bool:
        """Whether they run on one thread, for want of a runtime to share."""
        return self._team.parallel is None

    @staticmethod
    def serves_dense(step: DecodeStep) -> bool:
        """Whether :meth:`dense` can attend this step."""
        keys, values = step.keys, step.values
        whole = keys.is_contiguous() and values.is_contiguous() and keys.dtype == values.dtype == step.query.dtype
        even = keys.shape[3] % 2 == 0 and values.shape[3] % 2 == 0
        fits = step.mask is None or (step.mask.dtype == torch.bool and step.mask.shape[1] >= step.length)
        return whole and even and fits and keys.dtype in _TYPES and step.softcap is None

    @classmethod
    def serves_decode(cls, step: DecodeStep) -> bool:
        """Whether :meth:`decode` can answer this step."""
        tail = step.lowrank
        if tail is not None:
            rows = tail.coefficients
            if not rows.is_contiguous() or rows.dtype != step.values.dtype or rows.shape[3] < step.length:
                return False
        return cls.serves_dense(step) and step.policy.select == "group"

    def decode(self, step: DecodeStep) -> DecodeResult | None:
        """Run the four verbs; None if a head wants more rows than it may have, for somebody else to sort out."""
        batch, kv_heads = step.keys.shape[:2]
        items, group, dim_v = batch * kv_heads, step.query.shape[1] // kv_heads, step.values.shape[3]
        piece = self._piece(items, step.length)
        pieces = -(-step.length // piece)
        rows = pieces * piece
        policy, tail = step.policy, step.lowrank
        count = min(policy.topn, step.length)
        most = count if step.threshold is None else min(MOST * count, step.length)
        picks = torch.empty(items, most, dtype=torch.int64, device="cpu")
        mass, each, out = floats(items, group), floats(items, most), floats(items, group, dim_v)
        rank = 0 if tail is None else tail.basis.shape[2]
        call = self._begin(step, out, piece)
        call.set(rank=rank, most=most, renormalises=int(policy.tail == "renormalise"))
        weights = self._take("weights", items * rows)
        along = self._take("along", items * pieces * group * (rank + 1))
        call.point(picks=picks, mass=mass, each=each, weights=weights, along=along)
        if tail is not None:
            call.point(
                base=tail.base.float().contiguous(),
                basis=tail.basis.float().contiguous(),
                coefficients=tail.coefficients,
            )
            call.set(c_capacity=tail.coefficients.shape[3])
        region = compiled("decode", step.keys.dtype)
        if step.threshold is None:
            call.point(found=torch.full((items,), count, dtype=torch.int64, device="cpu"))
            self._run(call, region, SCORE)
            candidates = weights[: items * rows].view(items, rows)[:, : step.length]
            torch.topk(candidates, count, sorted=False, out=(floats(items, count), picks))
            self._run(call, region, COMBINE)
        else:
            found = torch.empty(items, dtype=torch.int64, device="cpu")
            call.point(found=found, threshold=step.threshold.float().contiguous())
            call.point(lists=self._take("lists", items * rows, torch.int32))
            call.point(counts=self._take("counts", items * pieces, torch.int64))
            self._run(call, region, SCORE | COMBINE)
            longest = int(found.max())
            if longest > most:
                return None
            picks, each = picks[:, : max(1, longest)], each[:, : max(1, longest)]
        joined = out.view(batch, kv_heads * group, dim_v).to(step.query.dtype)
        shape = (batch, kv_heads, -1)
        return DecodeResult(joined, picks.view(shape), mass.view(batch, kv_heads, group), each.view(shape))

    def dense(self, step: DecodeStep) -> torch.Tensor:
        """Exact attention, ``[B, Hq, Dv]``."""
        batch, heads, dim_v = step.query.shape[0], step.query.shape[1], step.values.shape[3]
        out = floats(batch, heads, dim_v)
        piece = self._piece(batch * step.keys.shape[1], step.length)
        call = self._begin(step, out, piece)
        call.point(along=self._take("along", batch * heads * -(-step.length // piece) * dim_v))
        self._run(call, compiled("dense", step.keys.dtype), 0)
        return out.to(step.query.dtype)

    def _piece(self, items: int, length: int) -> int:
        """Rows to a piece: as many as leave all threads enough pieces."""
        wanted = _SHARES * self._team.threads
        return next((piece for piece in _PIECES if items * -(-length // piece) >= wanted), _PIECES[-1])

    def _begin(self, step: DecodeStep, out: torch.Tensor, piece: int) -> Call:
        """Write down what both steps share."""
        batch, kv_heads, capacity, dim = step.keys.shape
        items, group, dim_v = batch * kv_heads, step.query.shape[1] // kv_heads, step.values.shape[3]
        pieces = -(-step.length // piece)
        words = step.keys.element_size() / 4
        call = Call(
            number=self._team.number,
            size=self._team.size,
            barrier=self._team.barrier,
            items=items,
            kv_heads=kv_heads,
            length=step.length,
            piece=piece,
            group=group,
            k_words=int(dim * words),
            v_words=int(dim_v * words),
            half=dim // 2,
            half_v=dim_v // 2,
            k_capacity=capacity,
            v_capacity=step.values.shape[2],
        )
        call.point(
            query=(step.query.float() * step.scaling).contiguous(),
            keys=step.keys,
            values=step.values,
            out=out,
            scores=self._take("scores", items * group * pieces * piece),
            peaks=self._take("peaks", items * group * pieces),
            totals=self._take("totals", items * group * pieces),
        )
        if step.mask is not None:
            mask = step.mask.contiguous().view(torch.uint8)
            call.set(mask_stride=mask.shape[1])
            call.point(mask=mask)
        if step.sinks is not None:
            call.point(sinks=step.sinks.float().contiguous())
        return call

    def _run(self, call: Call, region: int, passes: int) -> None:
        threads = self._team.threads
        call.set(passes=passes, threads=threads)
        numbers = call.numbers(FIELDS)
        self._team.run(region, numbers.ctypes.data, threads)

    def _take(self, name: str, count: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Scratch memory under a name, grown as needed; what it held before is lost."""
        held = self._scratch.get(name)
        if held is None or held.numel() < count:
            with torch.inference_mode(False):
                held = self._scratch[name] = torch.empty(count + count // 8, dtype=dtype, device="cpu")
        return held


class Call:
    """Sizes and addresses for a region, by name, and the tensors there, which must outlive it."""

    def __init__(self, **sizes: int) -> None:
        self._values = sizes
        self._tensors: list[torch.Tensor] = []

    def set(self, **sizes: int) -> None:
        """Write down sizes."""
        self._values.update(sizes)

    def point(self, **tensors: torch.Tensor) -> None:
        """Write down where tensors are."""
        self._tensors += tensors.values()
        for name, tensor in tensors.items():
            self._values[name] = tensor.data_ptr()

    def numbers(self, fields: Sequence[str]) -> np.ndarray:
        """What the region reads: 0 where nothing was written."""
        return np.array([self._values.get(name, 0) for name in fields], np.int64)


def floats(*shape: int) -> torch.Tensor:
    """What a region writes fp32 to, whatever torch's default dtype and device are."""
    return torch.empty(shape, dtype=torch.float32, device="cpu")

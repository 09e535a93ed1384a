"""The Triton backend as the cache sees it: one decode step in, one result out, scratch kept between steps.

Sizes the kernels do not cover (see :func:`~kcache.backends.triton.workspace.unsupported`), or for which the card turns
out to be too small, go to the reference.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from triton import OutOfResources

from kcache.backends.base import DecodeResult, DecodeStep
from kcache.backends.reference import ReferenceBackend
from kcache.backends.triton.common import interpreted, power_of_two
from kcache.backends.triton.decode import DenseWorkspace, dense_decode
from kcache.backends.triton.hot import HotRows
from kcache.backends.triton.step import triton_decode
from kcache.backends.triton.tuning import Tuning
from kcache.backends.triton.workspace import Workspace, unsupported
from kcache.errors import GraphError, PolicyError
from kcache.planning.sizes import hot_rows_of
from kcache.policy import Spread

_log = logging.getLogger(__name__)


class TritonBackend:
    """Decode steps by the Triton kernels, on a CUDA device or in Triton's interpreter.

    Parameters
    ----------
    device : torch.device
    tuning : Tuning or None
        Launch parameters; results do not depend on them.

    Raises
    ------
    PolicyError
        If there is neither a CUDA device nor the interpreter.
    """

    name = "triton"
    reads_host_by_kernel = True

    def __init__(self, device: torch.device, tuning: Tuning | None = None) -> None:
        if device.type != "cuda" and not interpreted():
            raise PolicyError(
                f"backend 'triton' needs a CUDA device, the layer is on {device}; use backend='auto', or set "
                "TRITON_INTERPRET=1 before starting to run the kernels in Triton's interpreter"
            )
        self.tuning = tuning
        self._reference = ReferenceBackend()
        self._workspaces: dict[tuple[object, ...], Workspace] = {}
        self._dense: dict[tuple[object, ...], DenseWorkspace] = {}
        self._too_large: set[tuple[object, ...]] = set()

    def decode(self, step: DecodeStep) -> DecodeResult:
        """Run score, select, fetch and combine for one layer."""
        workspace = self.workspace(step)
        if workspace is not None:
            with self._small_enough(_step_shape(step), step):
                return self._decode(step, workspace)
        return self._reference.decode(_on_host(step))

    @contextmanager
    def _small_enough(self, shape: tuple[object, ...], step: DecodeStep) -> Iterator[None]:
        """End quietly where the card has not got what a launch needs: steps of this shape are none of ours then."""
        try:
            yield
        except OutOfResources as error:
            self._too_large.add(shape)
            self._workspaces.pop(shape, None)
            self._dense.pop(shape, None)
            _log.warning(
                "a kernel wants %d bytes of %s and %s has %d: such steps run in torch operators",
                error.required, error.name, step.query.device, error.limit,
            )  # fmt: skip
            if step.query.device.type == "cuda":
                torch.cuda.synchronize(step.query.device)  # V may be on its way to the host, which reads it now

    def _decode(self, step: DecodeStep, workspace: Workspace) -> DecodeResult:
        weights = step.query.new_empty(workspace.batch * workspace.heads, workspace.width, dtype=torch.float32)
        out, picks, mass = triton_decode(
            step.query, step.keys, step.values, _length(step), scaling=step.scaling, workspace=workspace,
            lowrank=step.lowrank, mask=step.mask, softcap=step.softcap, sinks=step.sinks, threshold=step.threshold,
            tally=step.tally, hot=step.hot if isinstance(step.hot, HotRows) else None,
            narrow=step.narrow, value_scales=step.value_scales, weights=weights,
        )  # fmt: skip
        return DecodeResult(out, picks[..., : step.length], mass, weights.view(picks.shape)[..., : step.length])

    def keep_hot(self, step: DecodeStep) -> HotRows | None:
        """A store of as many rows as the policy asks for, for the layer of this step."""
        wanted, (batch, heads, capacity, dim_v) = hot_rows_of(step.policy), step.values.shape
        if not wanted or self.workspace(step) is None:
            return None
        rows = min(wanted, capacity)
        return HotRows(batch, heads, rows, dim_v, step.values.dtype, step.query.device)

    def dense(self, step: DecodeStep) -> torch.Tensor:
        """Exact attention over K and V on the device, ``[B, Hq, Dv]``."""
        batch, kv_heads, capacity, dim = step.keys.shape
        group, dim_v, device = step.query.shape[1] // kv_heads, step.values.shape[-1], step.query.device
        shape = (batch, kv_heads, group, dim, dim_v, device, step.keys.element_size())
        if shape in self._too_large or unsupported(64, group, dim, dim_v, 1) is not None:
            return self._reference.dense(_on_host(step))
        workspace = self._dense.get(shape)
        if workspace is None or workspace.capacity < capacity:
            with torch.inference_mode(False):
                workspace = DenseWorkspace(
                    batch, kv_heads, group, dim, dim_v, capacity, device, itemsize=step.keys.element_size(),
                    tuning=self.tuning,
                )  # fmt: skip
            self._dense = {key: kept for key, kept in self._dense.items() if key[0] == batch} | {shape: workspace}
        with self._small_enough(shape, step):
            return dense_decode(
                step.query, step.keys, step.values, _length(step), scaling=step.scaling, workspace=workspace,
                mask=step.mask, softcap=step.softcap, sinks=step.sinks,
            )  # fmt: skip
        return self._reference.dense(_on_host(step))

    @property
    def scratch(self) -> tuple[Workspace | DenseWorkspace, ...]:
        """The scratch memory there is now; a recorded step holds on to what it was recorded with."""
        return (*self._workspaces.values(), *self._dense.values())

    def workspace(self, step: DecodeStep) -> Workspace | None:
        """The scratch memory for a step's shape, made on first use; None where the kernels do not apply."""
        shape, capacity = _step_shape(step), step.keys.shape[2]
        batch, kv_heads, group, dim, dim_v, topn, device, _, _, rank, spread, itemsize = shape
        if shape in self._too_large:
            return None
        found = self._workspaces.get(shape)
        if found is not None and found.capacity >= capacity:
            return found
        if unsupported(capacity, group, dim, dim_v, topn, spread) is not None:
            return None
        with torch.inference_mode(False):  # memory made in inference mode could not be written to outside of it
            made = Workspace(
                batch, kv_heads, group, dim, dim_v, capacity, topn, device,
                select=step.policy.select, tail=step.policy.tail, tail_rank=rank, spread=spread, itemsize=itemsize,
                tuning=self.tuning,
            )  # fmt: skip
        self._workspaces = {key: kept for key, kept in self._workspaces.items() if key[0] == batch} | {shape: made}
        return made


def _step_shape(
    step: DecodeStep,
) -> tuple[int, int, int, int, int, int, torch.device, str, str, int | None, Spread, int]:
    """What a workspace is made for."""
    batch, kv_heads, capacity, dim = step.keys.shape
    policy = step.policy
    topn = min(policy.topn, power_of_two(capacity))  # not each capacity is worth kernels of its own
    return (
        batch, kv_heads, step.query.shape[1] // kv_heads, dim, step.values.shape[-1], topn, step.query.device,
        policy.select, policy.tail, None if step.lowrank is None else step.lowrank.basis.shape[2],
        "even" if step.threshold is None else "need", step.keys.element_size(),
    )  # fmt: skip


def _on_host(step: DecodeStep) -> DecodeStep:
    """A step for torch operators, which need to know its length."""
    if step.device_length is not None:
        raise GraphError("the kernels do not take these sizes, and torch operators need the length on the host")
    return step


def _length(step: DecodeStep) -> int | torch.Tensor:
    return step.length if step.device_length is None else step.device_length

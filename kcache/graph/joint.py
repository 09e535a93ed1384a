"""Projections that read the same input, as one product: queries, keys and values, or a gate and what it gates.

A product of a few rows costs one read of its weights, and a small one never comes to the memory's speed. So the weights
of a group are put one under the other in one piece of memory, of which each module's own parameter is a part from then
on. That outlasts the recording: nothing of the model is held twice, and what its modules compute, save and copy is what
it was. (Each part is a storage of its own: what saves models takes parameters that share one for tied.) Their use does
not: only in a recorded step does the first of a group that is called make the product for all, and the others find
their part of it waiting.

Shapes: I inputs, N outputs of a group.
"""

from __future__ import annotations

import ctypes
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.dlpack import from_dlpack

from kcache.graph.parts import DTYPES, Part, Tensors, Trial, noise, only

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

_MOST_ROWS = 64
"""With more of them a product has work enough for its time."""
_ALIGNED_BYTES = 16
_AS_NEAR = 2.0
"""How much further off the exact result the joint product may be than the ones apart, in the root mean square."""
_PIECE = 2048
"""Outputs that the exact result is worked out for at a time: their weights are in fp64 meanwhile."""

_log = logging.getLogger(__name__)

Merged = tuple[torch.Tensor, torch.Tensor | None]
"""The weight ``[N, I]`` and the bias ``[N]`` of a group."""


class Joint(Part):
    """For plain projections of one module, called one after another with the same tensor.

    Parameters
    ----------
    modules : sequence of nn.Linear
        A group that :func:`joints_of` lets through.
    """

    kind, variants = "joint", ("merged",)

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        super().__init__(partial(_apart, modules))
        self._modules = modules
        self._sizes = [module.out_features for module in modules]
        self._merged: Merged | None = None
        self._tried: Merged | None = None
        self._entering: tuple[torch.Tensor, int] | None = None
        self._waiting: dict[int, torch.Tensor] = {}

    def forwards(self) -> Iterator[tuple[nn.Module, Callable[..., torch.Tensor]]]:
        """What stands in for each module's forward."""
        for index, module in enumerate(self._modules):
            yield module, partial(self, index)

    def read(self, args: Any, kwargs: Any) -> Tensors | None:
        """See :class:`~kcache.graph.parts.Part`; the first argument is the module's place in the group."""
        entering, weight = only(args[1:], kwargs), self._modules[0].weight
        if entering is None or entering[0].is_inference():
            return None
        (rows,) = entering
        fits = rows.dtype == weight.dtype and rows.shape[-1:] == weight.shape[1:]
        return entering if fits and rows.numel() <= _MOST_ROWS * weight.shape[1] else None

    def trial(self, tensors: Tensors, args: Any, kwargs: Any, random: torch.Generator) -> Trial:
        """See :class:`~kcache.graph.parts.Part`."""
        sample = noise(tensors[0].shape, tensors[0], random)
        apart = [_apart(self._modules, index, sample) for index in range(len(self._modules))]
        exact = [_exactly(sample, module) for module in self._modules]
        weight, bias = self._tried = self._merged or _merged(self._modules)
        return (apart, exact), lambda variant: functional.linear(sample, weight, bias)

    def agree(self, got: Any, want: Any) -> bool:
        """Whether each part of the joint product is about as near to the exact result as the product apart."""
        summed = 0.5 * torch.finfo(torch.float32).eps * self._modules[0].in_features ** 0.5  # in fp32, in any order
        for part, apart, exact in zip(got.split(self._sizes, -1), *want, strict=True):
            bound = max(_AS_NEAR * _mean_size(apart - exact), summed * _mean_size(exact))
            if part.dtype != apart.dtype or not _mean_size(part - exact) <= bound:
                return False
        return True

    def _prove(self, tensors: Tensors, args: Any, kwargs: Any) -> Any:
        variant = super()._prove(tensors, args, kwargs)
        if variant is not None and self._merged is None and self._tried is not None:
            self._merged = self._tried
            weight, bias = self._merged
            _put(weight, [module.weight for module in self._modules])
            if bias is not None:
                _put(bias, [module.bias for module in self._modules])
        self._tried = None
        return variant

    def run(self, variant: Any, tensors: Tensors, args: Any, kwargs: Any) -> Any:
        """See :class:`~kcache.graph.parts.Part`; each part of a product is handed out once."""
        assert self._merged is not None
        index, entering = args[0], tensors[0]
        if not self._waiting:
            self._entering = entering, entering._version
            self._waiting = dict(enumerate(functional.linear(entering, *self._merged).split(self._sizes, -1)))
        elif self._entering is None or self._entering[0] is not entering or self._entering[1] != entering._version:
            self.proven = dict.fromkeys(self.proven)  # what waits was made in vain, and would be again
            self._waiting = {}
        result = self._waiting.pop(index, None)
        if not self._waiting:
            self._entering = None
        return _apart(self._modules, *args, **kwargs) if result is None else result


def joints_of(model: nn.Module) -> list[Joint]:
    """The groups of a model whose projections could be one product.

    They are plain, of one type and width, in memory of their own that no other module uses, and nobody listens to them
    or trains them.
    """
    holders = Counter(
        tensor.untyped_storage().data_ptr()
        for module in model.modules()
        for tensor in (*module._parameters.values(), *module._buffers.values())
        if tensor is not None and type(tensor) in (nn.Parameter, torch.Tensor)
    )
    groups = [[module._modules.get(name) for name in names] for module in model.modules() for names in GROUPS]
    members = Counter(module for group in groups for module in group)
    return [
        Joint(group)  # type: ignore[arg-type]
        for group in groups
        if all(members[module] == 1 for module in group) and _joinable(group, holders)
    ]


def _joinable(group: Sequence[nn.Module | None], holders: Counter[int]) -> bool:
    if len({*group}) < len(group) or not all(type(module) is nn.Linear and _untouched(module) for module in group):
        return False
    weights, biases = ([module._parameters[name] for module in group] for name in ("weight", "bias"))  # type: ignore[union-attr]
    return _mergeable(weights, holders) and (all(bias is None for bias in biases) or _mergeable(biases, holders))


def _untouched(module: nn.Module) -> bool:
    listeners = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return not any(listeners) and "forward" not in vars(module) and not hasattr(module, "_hf_hook")


def _mergeable(parameters: Sequence[nn.Parameter | None], holders: Counter[int]) -> bool:
    """Whether parameters can become parts of one, or are already."""
    tensors = [parameter for parameter in parameters if parameter is not None and _plain(parameter)]
    kinds = {(tensor.dtype, tensor.device, tensor.shape[1:]) for tensor in tensors}
    if len(tensors) < len(parameters) or len(kinds) > 1:
        return False
    stores = [tensor.untyped_storage() for tensor in tensors]
    if len({store.data_ptr() for store in stores}) == 1:
        return _whole(tensors) is not None and holders[stores[0].data_ptr()] == len(tensors)
    alone = all(holders[store.data_ptr()] == 1 for store in stores)
    return alone and all(store.nbytes() == tensor.nbytes for store, tensor in zip(stores, tensors, strict=True))


def _plain(parameter: nn.Parameter) -> bool:
    """Whether a parameter is an ordinary tensor that is not trained, in a place that products like."""
    if type(parameter) is not nn.Parameter or parameter.requires_grad or parameter.is_inference():
        return False
    row_bytes = len(parameter) * parameter.element_size()  # of the product's result, and of a bias
    return parameter.dtype in DTYPES and parameter.is_contiguous() and row_bytes % _ALIGNED_BYTES == 0


def _whole(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The tensor that others, contiguous, make up where one begins where the other ends; it owns nothing."""
    first, end = tensors[0], tensors[0].data_ptr()
    for tensor in tensors:
        if tensor.data_ptr() != end:
            return None
        end += tensor.nbytes
    shape, nbytes = (sum(map(len, tensors)), *first.shape[1:]), end - first.data_ptr()
    if first.untyped_storage().nbytes() - first.storage_offset() * first.element_size() >= nbytes:
        return first.detach().as_strided(shape, first.stride())
    if first.device.type == "cuda":
        bytes_there = torch.as_tensor(_Memory(first.data_ptr(), nbytes), device=first.device)
    else:
        bytes_there = torch.frombuffer((ctypes.c_uint8 * nbytes).from_address(first.data_ptr()), dtype=torch.uint8)
    return bytes_there.view(first.dtype).view(shape)


class _Memory:
    """Memory on a device, for whoever asks by the interface that NumPy's arrays have."""

    def __init__(self, pointer: int, nbytes: int) -> None:
        self.__cuda_array_interface__ = {
            "data": (pointer, False), "shape": (nbytes,), "typestr": "|u1", "version": 2,
        }  # fmt: skip


def _put(whole: torch.Tensor, parameters: Sequence[torch.Tensor]) -> None:
    """Make parameters parts of a tensor, unless it is what they made up already, and owns nothing."""
    if parameters[0].data_ptr() != whole.data_ptr():
        for parameter, part in zip(parameters, _parts(whole, list(map(len, parameters))), strict=True):
            parameter.data = part


def _parts(whole: torch.Tensor, sizes: list[int]) -> Sequence[torch.Tensor]:
    """The pieces of a tensor, each a storage of its own in the same memory, which stays as long as one of them does.

    Where it is not found again by their places, they are views that share its storage.
    """
    views = whole.split(sizes)
    try:
        parts = [from_dlpack(view) for view in views]
        again = _whole(parts)
    except Exception as error:  # whatever it is, views do as well
        _log.debug("parts of %s share a storage: %s", tuple(whole.shape), error)
        return views
    same = again is not None and again.data_ptr() == whole.data_ptr() and again.shape == whole.shape
    return parts if same else views


def _merged(modules: Sequence[nn.Linear]) -> Merged:
    biases = [module.bias for module in modules if module.bias is not None]
    return _together([module.weight for module in modules]), _together(biases) if biases else None


def _together(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """One tensor of several, one under the other; the one they are views of already, or a new one.

    A new one is made on the default stream: its memory, and what the old ones leave, is then of the kind that weights
    are in, and serves the next group. Nothing on the device still reads the old ones afterwards.
    """
    whole, device = _whole(tensors), tensors[0].device
    if whole is not None:
        return whole
    if device.type != "cuda":
        return torch.cat([tensor.detach() for tensor in tensors])
    stream = torch.cuda.default_stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        whole = torch.cat([tensor.detach() for tensor in tensors])
    torch.cuda.synchronize(device)
    return whole


def _apart(modules: Sequence[nn.Linear], index: int, *args: Any, **kwargs: Any) -> torch.Tensor:
    return nn.Linear.forward(modules[index], *args, **kwargs)


def _exactly(rows: torch.Tensor, module: nn.Linear) -> torch.Tensor:
    wide = rows.double()
    result = torch.cat([functional.linear(wide, piece.double()) for piece in module.weight.split(_PIECE)], -1)
    return result if module.bias is None else result + module.bias.double()


def _mean_size(numbers: torch.Tensor) -> float:
    return float(numbers.double().square().mean().sqrt())

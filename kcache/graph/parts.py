"""Parts of a model that one kernel can stand in for, each proven by a trial before it does.

What a module computes is not known from its name. In its first call a part runs the original on random numbers of the
call's own shapes and types, with random weights in a copy, and a kernel takes its place only where results agree to a
rounding. Whatever does something else (a bias, interleaved halves, clamps) goes on as it was. A trial waits for the
device, so it has to fall into a run of the step that is not recorded.
"""

from __future__ import annotations

import copy
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from kcache.backends.triton import pointwise

Tensors = tuple[torch.Tensor, ...]
Trial = tuple[Any, Callable[[Any], Any]]
"""What the original makes of random numbers, and what makes the same of them with a variant."""

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NOISE = 4e-6
_FLIPS = 0.02
"""Share of 16-bit results that may round the other way; where another formula rounds it is a fifth and more."""

_log = logging.getLogger(__name__)


class Part(ABC):
    """Stands in for a callable, once a trial has shown which variant of a kernel equals it."""

    kind: str
    variants: tuple[Any, ...]

    def __init__(self, original: Callable[..., Any]) -> None:
        self.proven: dict[object, Any] = {}
        self._original, self._thread = original, threading.get_ident()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer a call: by a kernel in the thread that made this and where a trial allows it, or as ever."""
        tensors = self.read(args, kwargs) if threading.get_ident() == self._thread else None
        if tensors is None or any(tensor.stride(-1) != 1 or tensor.dtype not in DTYPES for tensor in tensors):
            return self._original(*args, **kwargs)
        key = (*((tensor.shape, tensor.stride(), tensor.dtype) for tensor in tensors), *self.choices(args, kwargs))
        if key not in self.proven:
            self.proven[key] = self._prove(tensors, args, kwargs)
        variant = self.proven[key]
        return self._original(*args, **kwargs) if variant is None else self.run(variant, tensors, args, kwargs)

    def _prove(self, tensors: Tensors, args: Any, kwargs: Any) -> Any:
        """The variant whose results are the original's; None if there is none, for whatever reason."""
        random = torch.Generator(tensors[0].device).manual_seed(1)
        try:
            want, run = self.trial(tensors, args, kwargs, random)
            return next((variant for variant in self.variants if self.agree(run(variant), want)), None)
        except Exception as error:  # whatever it is, the original does it
            _log.debug("no kernel for %s: %s: %s", self.kind, type(error).__name__, error)
            return None

    def choices(self, args: Any, kwargs: Any) -> tuple[object, ...]:
        """What a result depends on beside the tensors."""
        return ()

    def agree(self, got: Any, want: Any) -> bool:
        """Whether what a variant makes of a trial is what the original does."""
        return _equal(got, want)

    @abstractmethod
    def read(self, args: Any, kwargs: Any) -> Tensors | None:
        """The tensors of a call, or None if it is not of the kind that a kernel serves."""

    @abstractmethod
    def trial(self, tensors: Tensors, args: Any, kwargs: Any, random: torch.Generator) -> Trial:
        """Make a trial for calls like this one."""

    @abstractmethod
    def run(self, variant: Any, tensors: Tensors, args: Any, kwargs: Any) -> Any:
        """The result of a call, by a kernel."""


class Norm(Part):
    """For modules with a weight and an epsilon."""

    kind, variants = "norm", ("rounded", "plain", "one plus")

    def __init__(self, module: nn.Module, eps: float) -> None:
        super().__init__(module.forward)
        self._module, self._eps = module, eps

    def read(self, args: Any, kwargs: Any) -> Tensors | None:
        """See :class:`Part`."""
        entering = only(args, kwargs)
        fits = entering is not None and entering[0].shape[-1:] == self._module.weight.shape
        return entering if fits else None

    def trial(self, tensors: Tensors, args: Any, kwargs: Any, random: torch.Generator) -> Trial:
        """See :class:`Part`."""
        weight: torch.Tensor = self._module.weight  # type: ignore[assignment]
        changed = nn.Parameter(noise(weight.shape, weight, random), requires_grad=False)
        twin = _twin(self._module, _parameters={**self._module._parameters, "weight": changed})
        sizes = (1.0, 2 * self._eps**0.5, 10.0, 0.1)  # one at which epsilon counts
        sample = torch.cat([(noise(tensors[0].shape, tensors[0], random) + 0.5) * size for size in sizes])
        return _forward(twin, sample), lambda variant: pointwise.rms_norm(sample, changed, self._eps, variant)

    def run(self, variant: Any, tensors: Tensors, args: Any, kwargs: Any) -> Any:
        """See :class:`Part`."""
        weight: torch.Tensor = self._module.weight  # type: ignore[assignment]
        return pointwise.rms_norm(tensors[0], weight, self._eps, variant)


class Gated(Part):
    """For modules of a gate, an input projection, apart or ``joint``, and an output projection."""

    kind, variants = "gated", ("silu", "gelu_tanh")

    def __init__(self, module: nn.Module, joint: bool) -> None:
        super().__init__(module.forward)
        self._module, self._names = module, ("gate_up_proj",) if joint else ("gate_proj", "up_proj")

    def read(self, args: Any, kwargs: Any) -> Tensors | None:
        """See :class:`Part`."""
        return only(args, kwargs)

    def trial(self, tensors: Tensors, args: Any, kwargs: Any, random: torch.Generator) -> Trial:
        """See :class:`Part`."""
        entering = tensors[0]
        inner = [self._module.get_submodule(name)(entering) for name in self._names]
        inner = [noise(tensor.shape, tensor, random) * 2 for tensor in inner]
        stand_ins = {name: _Given(entering, tensor) for name, tensor in zip(self._names, inner, strict=True)}
        twin = _twin(self._module, _modules={**self._module._modules, **stand_ins, "down_proj": nn.Identity()})
        return _forward(twin, entering), lambda variant: pointwise.gated(*_gate_and_up(inner), variant)

    def run(self, variant: Any, tensors: Tensors, args: Any, kwargs: Any) -> Any:
        """See :class:`Part`."""
        inner = [self._module.get_submodule(name)(tensors[0]) for name in self._names]
        return self._module.get_submodule("down_proj")(pointwise.gated(*_gate_and_up(inner), variant))


class Rotary(Part):
    """For the function that turns queries and keys, or one of them at a call."""

    kind, variants = "rotary", ("rounded", "plain")

    def read(self, args: Any, kwargs: Any) -> Tensors | None:
        """See :class:`Part`."""
        tensors = tuple(arg for arg in args if isinstance(arg, torch.Tensor))
        heads = self._heads(args, kwargs)
        if (
            len(tensors) not in (3, 4)
            or heads not in (1, 2)
            or any(tensor is not arg for tensor, arg in zip(tensors, args, strict=False))
        ):
            return None
        *turned, cos, sin = tensors
        batch, width = turned[0].shape[0], turned[0].shape[-1]
        fits = cos.ndim == 3 and cos.shape == sin.shape and cos.shape[0] in (1, batch) and cos.shape[1] == 1
        fits = fits and width % 2 == 0 and cos.shape[2] in (width, width // 2)
        for tensor in turned:
            fits = fits and tensor.ndim == 4 and tensor.dtype == turned[0].dtype
            fits = fits and (len(tensor), tensor.shape[3 - heads], tensor.shape[3]) == (batch, 1, width)
        return tensors if fits else None

    @staticmethod
    def _heads(args: Any, kwargs: Any) -> int:
        """Which dimension the heads have, the one that angles lack; 0 for calls that say more than that."""
        rest = [arg for arg in args if not isinstance(arg, torch.Tensor)] + list(kwargs.values())
        known = len(rest) <= 1 and kwargs.keys() <= {"unsqueeze_dim"} and all(isinstance(value, int) for value in rest)
        return (rest or [1])[0] if known else 0

    def choices(self, args: Any, kwargs: Any) -> tuple[object, ...]:
        """See :class:`Part`."""
        return (self._heads(args, kwargs),)

    def trial(self, tensors: Tensors, args: Any, kwargs: Any, random: torch.Generator) -> Trial:
        """See :class:`Part`."""
        sample = tuple(noise(tensor.shape, tensor, random) for tensor in tensors)
        want = self._original(*sample, *args[len(tensors) :], **kwargs)
        return want, lambda variant: self.run(variant, sample, args, kwargs)

    def run(self, variant: Any, tensors: Tensors, args: Any, kwargs: Any) -> Any:
        """See :class:`Part`."""
        *turned, cos, sin = tensors
        position = 3 - self._heads(args, kwargs)
        query, *keys = (tensor.select(position, 0) for tensor in turned)
        key = keys[0] if keys else None
        rotated = pointwise.rotate(query, key, cos[:, 0], sin[:, 0], rounded=variant == "rounded")
        results = tuple(result.unsqueeze(position) for result in rotated if result is not None)
        return results if keys else results[0]


class _Given(nn.Module):
    """Answers a projection's input with what was given, if it comes untouched."""

    def __init__(self, entering: torch.Tensor, result: torch.Tensor) -> None:
        super().__init__()
        self._entering, self._result = entering, result

    def forward(self, entering: torch.Tensor) -> torch.Tensor:
        """See the class."""
        if entering is not self._entering:
            raise ValueError("the module changes what its projections are given")
        return self._result


def only(args: Any, kwargs: Any) -> Tensors | None:
    """The tensor of a call that has no other argument."""
    return tuple(args) if len(args) == 1 and not kwargs and isinstance(args[0], torch.Tensor) else None


def _gate_and_up(inner: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    gate, up = inner if len(inner) == 2 else inner[0].chunk(2, -1)
    return gate, up


def _twin(module: nn.Module, **changes: Any) -> nn.Module:
    """A copy that shares all with the module but ``changes``."""
    twin = copy.copy(module)
    vars(twin).update(changes)
    return twin


def _forward(module: nn.Module, entering: torch.Tensor) -> Any:
    return type(module).forward(module, entering)


def noise(shape: Any, like: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Normal random numbers of another tensor's type, where it is."""
    return torch.randn(tuple(shape), generator=random, dtype=like.dtype, device=like.device)


def _equal(got: Any, want: Any) -> bool:
    """Whether results are the same but for a rounding here and there."""
    if isinstance(want, tuple):
        return isinstance(got, tuple) and len(got) == len(want) and all(map(_equal, got, want))
    if not isinstance(want, torch.Tensor) or got.shape != want.shape or got.dtype != want.dtype:
        return False
    eps, whole = torch.finfo(want.dtype).eps, want.dtype == torch.float32
    off, size = (got.float() - want.float()).abs(), want.float().abs()
    flips = int((off > _NOISE).sum())
    return bool((off <= (16 if whole else 2) * eps * size + _NOISE).all()) and (
        whole or flips <= max(2, _FLIPS * want.numel())
    )

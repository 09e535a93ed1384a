"""A tape for the CPU that keeps to a CUDA graph's rules, so that what a graph would get wrong goes wrong here too.

While a step runs it notes every operator with the very tensors it was given, and every Triton launch. A replay runs
those again, in order, into the memory of the recording: no Python of the step, no length, no shape is worked out anew.
Memory that an operator left unwritten is poisoned before each replay, and an operator that tells the host a value
cannot be recorded at all.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

aten = torch.ops.aten
_ASKS_THE_HOST = (
    aten._local_scalar_dense.default,
    aten.equal.default,
    aten.nonzero.default,
    aten.is_nonzero.default,
    aten.unique_consecutive.default,
    aten._unique2.default,
    aten.masked_select.default,
)
_EMPTY = (aten.empty.memory_format, aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default)


class HostAskedError(RuntimeError):
    """An operator that a CUDA graph cannot hold."""


class RecordedTape:
    """One recorded step; ``log`` counts what is in it."""

    def __init__(self) -> None:
        self.operators: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []

    def record(self, step: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
        """Warm up, then run and note."""
        step()
        with _launches_noted(self.operators), _Notes(self.operators):
            return step()

    @torch.no_grad()
    def replay(self) -> None:
        """Run all of it again."""
        for function, arguments, keywords, result in self.operators:
            if function in _EMPTY:
                if result.is_floating_point():
                    result.fill_(float("nan"))
                continue
            fresh = function(*arguments, **keywords)
            if result is not None:
                _keep(function, fresh, result)


def _keep(function: Any, fresh: Any, result: Any) -> None:
    """Put a result where the recording had it; what an operator wrote in place, or only looked at, is there already."""
    returns = function._schema.returns
    news, olds = (fresh, result) if isinstance(fresh, (tuple, list)) else ((fresh,), (result,))
    for number, (new, old) in enumerate(zip(news, olds, strict=True)):
        aliases = returns[min(number, len(returns) - 1)].alias_info is not None
        if isinstance(old, torch.Tensor) and not aliases:
            assert new.shape == old.shape, "a shape depends on data"
            old.copy_(new)


class _Notes(TorchDispatchMode):
    def __init__(self, operators: list[Any]) -> None:
        super().__init__()
        self._operators = operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _ASKS_THE_HOST:
            raise HostAskedError(f"{func} asks the device for a value")
        if any(isinstance(leaf, torch.Tensor) and leaf.dtype == torch.bool for leaf in _indices(func, args)):
            raise HostAskedError(f"{func} with a mask has a shape that depends on data")
        result = func(*args, **(kwargs or {}))
        self._operators.append((func, args, kwargs or {}, result))
        return result


def _indices(func: Any, args: Any) -> list[Any]:
    if func in (aten.index.Tensor, aten.index_put_.default, aten.index_put.default):
        return tree_leaves(args[1])
    return []


@contextmanager
def _launches_noted(operators: list[Any]) -> Any:
    """Note kernel launches as a whole: what the interpreter does inside is the device's business."""
    launch = InterpretedFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        def again(*arguments: Any, **keywords: Any) -> None:
            launch(self, *arguments, grid=grid, warmup=False, **keywords)

        if not warmup:
            with torch.utils._python_dispatch._disable_current_modes():
                again(*args, **kwargs)
            operators.append((again, args, kwargs, None))

    InterpretedFunction.run = run  # type: ignore[method-assign]
    try:
        yield
    finally:
        InterpretedFunction.run = launch  # type: ignore[method-assign]

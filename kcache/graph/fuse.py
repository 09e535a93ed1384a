"""A model's small kernels, taken together while a step is recorded: norms, rotary embeddings, gates, projections.

A replayed graph costs what its kernels take, and a norm written in torch operators is six of them. Here is where such
parts are looked for and put in; ``parts`` and ``joint`` try them and run them. Afterwards the model is as it was, but
for the places of some weights: those of projections that were one product stay in one piece of memory.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from kcache.backends.triton.common import interpreted
from kcache.graph.joint import joints_of
from kcache.graph.parts import Gated, Norm, Part, Rotary

_ROTARY = "apply_rotary_pos_emb"


class Fusion:
    """Kernels in place of a model's small ones, inside :meth:`applied` and in that thread.

    Parameters
    ----------
    model : PreTrainedModel
        On one device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._parts: list[Part] = []

    @property
    def used(self) -> dict[str, int]:
        """How many modules and functions of each kind a kernel has stood in for."""
        return dict(Counter(part.kind for part in self._parts if any(part.proven.values())))

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the model runs kernels where they have been seen to do the same."""
        with ExitStack() as undo:
            if _possible(self._model):
                for module in self._model.modules():
                    part = part_of(module)
                    if part is not None:
                        self._parts.append(part)
                        _stand_in(module, part, undo)
                for joint in joints_of(self._model):
                    self._parts.append(joint)
                    for module, forward in joint.forwards():
                        _stand_in(module, forward, undo)
                for namespace in {type(module).__module__ for module in self._model.modules()}:
                    original = getattr(sys.modules.get(namespace), _ROTARY, None)
                    if original is not None:
                        self._parts.append(Rotary(original))
                        setattr(sys.modules[namespace], _ROTARY, self._parts[-1])
                        undo.callback(setattr, sys.modules[namespace], _ROTARY, original)
            yield


def _stand_in(module: nn.Module, forward: Callable[..., Any], undo: ExitStack) -> None:
    vars(module)["forward"] = forward
    undo.callback(vars(module).pop, "forward", None)


def _possible(model: nn.Module) -> bool:
    places = {parameter.device for parameter in model.parameters()}
    compiled = any(getattr(module, "_compiled_call_impl", None) is not None for module in model.modules())
    return len(places) == 1 and not compiled and (places.pop().type == "cuda" or interpreted())


def part_of(module: nn.Module) -> Part | None:
    """What could stand in for a module's forward; None for one that somebody else has changed already."""
    if "forward" in vars(module) or hasattr(module, "_hf_hook") or isinstance(module, torch.jit.ScriptModule):
        return None
    weight, below = module._parameters.get("weight"), module._modules
    eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if weight is not None and weight.ndim == 1 and isinstance(eps, float) and getattr(module, "bias", None) is None:
        return Norm(module, eps)
    if all(below.get(name) is not None for name in ("gate_proj", "up_proj", "down_proj")):
        return Gated(module, joint=False)
    if all(below.get(name) is not None for name in ("gate_up_proj", "down_proj")):
        return Gated(module, joint=True)
    return None

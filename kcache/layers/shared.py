"""Shared: what the tiered layers of one cache have in common.

The policy, the backends and links of each device, which rows are valid, which layers stay resident, and who replays
recorded steps.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from kcache.attention.switching import is_ours, text_config
from kcache.backends import Backend, choose_backend
from kcache.errors import CacheStateError, UnsupportedModelError
from kcache.layers.protocol import Layer
from kcache.layers.residency import Residency
from kcache.layers.spread import spread_of
from kcache.machine.devices import input_device
from kcache.machine.parallel import Ranks, ranks_of
from kcache.machine.tape import tape_for
from kcache.models.support import context_length
from kcache.planning.need import ModelShape
from kcache.policy import Policy
from kcache.tiers.link import Link
from kcache.tiers.spare import spare_of
from kcache.tiers.validity import Validity


class Recording(Protocol):
    """Who decodes by replaying recorded steps (:class:`~kcache.graph.decoder.GraphDecoder`), as a cache knows it."""

    @property
    def ahead(self) -> bool:
        """Whether a step is under way, or rows are where only the recording looks for them."""

    def pause(self) -> None:
        """Take back the step that is under way."""

    def forget(self) -> None:
        """Let go of the recording and of all it holds."""

    def set_aside(self) -> AbstractContextManager[None]:
        """Inside, what is counted leaves out the step that is under way."""


class Shared:
    """What the tiered layers of one cache have in common."""

    def __init__(self, model: PreTrainedModel, policy: Policy, max_length: int | None) -> None:
        self.policy = policy
        self.max_length = max_length
        self.validity = Validity()
        self.force_exact = False
        self.ranks = ranks_of(model)
        self.spread = spread_of(policy, self.ranks)
        self.probing = False
        self.look: Callable[..., None] | None = None  # a Look of kcache.layers.stepwise
        self.reached: Callable[[int], None] | None = None
        self.spare = spare_of(model)
        self.residency = Residency(
            policy, max_length, context_length(model.config), self.ranks, self.spare, _shape_of(model, self.ranks)
        )
        self.model = weakref.ref(model)
        self._config = weakref.ref(text_config(model))
        self._modules = frozenset(id(module) for module in model.modules())
        self._backends: dict[torch.device, Backend] = {}
        self._links: dict[torch.device, Link] = {}
        self.make_tape = tape_for(input_device(model)) if policy.graph == "auto" else None
        self.recording: Recording | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        """The copied cache makes backends and recordings of its own: theirs are scratch memory."""
        self.about_to_change()
        memo[id(self)] = twin = object.__new__(Shared)
        state = {**vars(self), "_backends": {}, "recording": None}
        memo[id(self.spare)] = self.spare  # the model's, which is the same
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in state.items()})
        return twin

    def __reduce__(self) -> str | tuple[Any, ...]:
        """Refuse to be pickled; :meth:`__deepcopy__` does without."""
        raise CacheStateError(
            "a KCache cannot be pickled or saved: it belongs to its model in this process. copy.deepcopy(cache) makes "
            "another here; elsewhere, give a new cache the same tokens"
        )

    @property
    def attached(self) -> bool:
        """Whether the cache's model now runs kcache's attention function."""
        config = self._config()
        return config is not None and is_ours(config)

    @contextmanager
    def telling(self, reached: Callable[[int], None] | None) -> Iterator[None]:
        """Inside, tell which layer has been given its new rows; None is nobody to tell."""
        self.reached = reached
        try:
            yield
        finally:
            self.reached = None

    def check_whole(self, layer: Layer, past: int) -> None:
        """Raise :class:`CacheStateError` if a forward begins on layers of different lengths.

        That is what an interrupt in the middle of a forward leaves.
        """
        layers = self.residency.layers
        if layer is layers[0] and any(other.length != past for other in layers[1:]):
            raise CacheStateError(
                "an earlier forward with this cache ended in the middle of the model, so its layers hold different "
                "numbers of tokens; reset it, or make a new one"
            )

    def check_answered(self, layer: Layer) -> None:
        """Raise :class:`CacheStateError` if a forward went through all layers and a layer's attention never came here.

        It was given new rows alone then, for others, and would go on with them as if they were all.
        """
        if layer.waits_for_attention and layer.length and self.residency.layers[-1].length == layer.length:
            raise CacheStateError(
                f"the attention of layer {layer.index} did not come to kcache for its latest rows: it was replaced "
                "since the model was loaded or attached, or a forward was cut short there; make a new cache, and where "
                "attention is in code of its own use the model's own cache"
            )

    def check_owner(self, module: torch.nn.Module) -> None:
        """Raise :class:`CacheStateError` unless ``module`` belongs to the model the cache was made for."""
        if id(module) not in self._modules:
            raise CacheStateError("this cache was made for another model; make a KCache for each model")

    def replays(self, layer: Layer, keys: torch.Tensor) -> bool:
        """Whether a layer takes the new rows ``[B, Hkv, T, D]`` one by one; one whose V stays need not."""
        if self.look is None or self.force_exact or not self.attached:
            return False
        return layer.offloaded or self.residency.leaves(layer, layer.length + keys.shape[2])

    @property
    def layers_apart(self) -> bool:
        """Whether what a layer fetches depends on that layer alone, so that it can run ahead of the others."""
        return self.spread is None or self.policy.offload == "none"

    def select(self, index: torch.Tensor) -> None:
        """Keep the sequences ``index`` ``[B']``, in that order, of what is known about them."""
        self.forget_recording()
        self.validity.select(index)
        if self.spread is not None:
            self.spread.select(index)

    def backend(self, device: torch.device) -> Backend:
        """The backend that serves layers on ``device``."""
        if device not in self._backends:
            self._backends[device] = choose_backend(self.policy.backend, device)
        return self._backends[device]

    def link(self, device: torch.device) -> Link:
        """What moves rows between a device and the host tier."""
        if device not in self._links:
            self._links[device] = Link(device, self.spare if device.type == "cuda" else None)
        return self._links[device]

    @property
    def runs_ahead(self) -> bool:
        """Whether a recorded step is under way, or rows are where only the recording looks for them."""
        return self.recording is not None and self.recording.ahead

    def about_to_change(self) -> None:
        """Take back a recorded step that is under way: somebody else is about to change the cache."""
        if self.recording is not None:
            self.recording.pause()

    def forget_recording(self) -> None:
        """Let go of a recorded step, which is for tensors that are about to make way for others."""
        if self.recording is not None:
            self.recording.forget()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Inside, what is counted leaves out a recorded step that is under way."""
        with self.recording.set_aside() if self.recording is not None else nullcontext():
            yield

    @property
    def step_state(self) -> list[torch.Tensor]:
        """What a decode step changes in place, beside the rows it adds: taken twice, it would count twice."""
        hits = [layer.hot.hits for layer in self.residency.layers if layer.hot is not None]
        return hits if self.spread is None else [*hits, *self.spread.state]

    @property
    def scratch(self) -> tuple[object, ...]:
        """Scratch memory that decode steps now run in."""
        return tuple(item for backend in self._backends.values() for item in getattr(backend, "scratch", ()))

    def is_resident(self, layer: Layer) -> bool:
        """Whether the layer's V stays on the device."""
        return self.residency.is_resident(layer)

    def plan_residency(self, layer: Layer, keys: torch.Tensor, values: torch.Tensor, end: int) -> None:
        """Make sure ``end`` rows will fit, moving V of the last resident layers out if they have to make room."""
        before = self.residency.planned
        self.residency.plan(layer, keys, values, end)
        if self.residency.planned != before and self.residency.leaves_at(end):
            for device, sizes in self.residency.host_bytes.items():
                if device.type == "cuda":
                    self.link(device).arena.prepare(sizes)

    def let_go(self) -> None:
        """Give back memory that the links keep for copies under way and for rows to come."""
        for link in self._links.values():
            link.let_go()
            link.arena.drop()


def _shape_of(model: PreTrainedModel, ranks: Ranks) -> ModelShape | None:
    """What of a model decides on memory; None for one whose config does not say."""
    try:
        return ModelShape.of(model.config, model.dtype.itemsize).shared(ranks.size)
    except (UnsupportedModelError, AttributeError, TypeError):
        return None

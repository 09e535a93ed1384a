"""KCache: a transformers ``Cache`` whose full-attention layers keep K on the device and V in a tier.

Layers the probe does not clear (sliding windows, linear attention, latents) are the stock ones. All tiered layers
share one :class:`Shared`: the policy, the backends, which rows are valid, and which layers stay resident.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionAndFullAttentionLayer

from kcache.attention import is_ours, text_config
from kcache.backends import Backend, choose_backend, has_triton
from kcache.devices import input_device
from kcache.errors import CacheStateError, InputError
from kcache.graph.tape import tape_for
from kcache.hybrid import HybridTieredLayer
from kcache.layer import TieredLayer
from kcache.parallel import ranks_of
from kcache.policy import Policy
from kcache.probe import probe, stock_layers
from kcache.residency import Residency
from kcache.snapshots import layer_snapshot, total
from kcache.spread import spread_of
from kcache.stepwise import Look, no_look
from kcache.support import context_length
from kcache.telemetry import Stats, StepSnapshot
from kcache.tiers.link import Link
from kcache.tiers.validity import Validity

if TYPE_CHECKING:
    from kcache.graph.decoder import GraphDecoder


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
        self.look: Look | None = None
        self.residency = Residency(policy, max_length, context_length(model.config), self.ranks)
        self.model = weakref.ref(model)
        self._config = weakref.ref(text_config(model))
        self._modules = frozenset(id(module) for module in model.modules())
        self._backends: dict[torch.device, Backend] = {}
        self._links: dict[torch.device, Link] = {}
        self.make_tape = tape_for(input_device(model)) if policy.graph == "auto" else None
        self._graph: GraphDecoder | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        """The copied cache makes backends and recordings of its own: theirs are scratch memory."""
        self.about_to_change()
        memo[id(self)] = twin = object.__new__(Shared)
        state = {**vars(self), "_backends": {}, "_graph": None}
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in state.items()})
        return twin

    @property
    def attached(self) -> bool:
        """Whether the cache's model now runs kcache's attention function."""
        config = self._config()
        return config is not None and is_ours(config)

    def check_whole(self, layer: TieredLayer, past: int) -> None:
        """Raise :class:`CacheStateError` if a forward begins on layers of different lengths.

        That is what an interrupt in the middle of a forward leaves.
        """
        layers = self.residency.layers
        if layer is layers[0] and any(other.length != past for other in layers[1:]):
            raise CacheStateError(
                "an earlier forward with this cache ended in the middle of the model, so its layers hold different "
                "numbers of tokens; reset it, or make a new one"
            )

    def check_owner(self, module: torch.nn.Module) -> None:
        """Raise :class:`CacheStateError` unless ``module`` belongs to the model the cache was made for."""
        if id(module) not in self._modules:
            raise CacheStateError("this cache was made for another model; make a KCache for each model")

    def replays(self, layer: TieredLayer, keys: torch.Tensor) -> bool:
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
            self._links[device] = Link(device)
        return self._links[device]

    @property
    def graph(self) -> GraphDecoder | None:
        """Who decodes by replaying recorded steps; None where nothing records them, or the policy does without."""
        if self._graph is None and self.make_tape is not None and has_triton():
            from kcache.graph.decoder import GraphDecoder

            self._graph = GraphDecoder(self.make_tape)
        return self._graph

    @property
    def runs_ahead(self) -> bool:
        """Whether a recorded step is under way, or rows are where only the recording looks for them."""
        return self._graph is not None and self._graph.ahead

    def about_to_change(self) -> None:
        """Take back a recorded step that is under way: somebody else is about to change the cache."""
        if self._graph is not None:
            self._graph.pause()

    def forget_recording(self) -> None:
        """Let go of a recorded step, which is for tensors that are about to make way for others."""
        if self._graph is not None:
            self._graph.forget()

    @contextmanager
    def settled(self) -> Iterator[None]:
        """Inside, what is counted leaves out a recorded step that is under way."""
        with self._graph.set_aside() if self._graph is not None else nullcontext():
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

    def is_resident(self, layer: TieredLayer) -> bool:
        """Whether the layer's V stays on the device."""
        return self.residency.is_resident(layer)

    def plan_residency(self, layer: TieredLayer, keys: torch.Tensor, values: torch.Tensor, end: int) -> None:
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


class KCache(Cache):
    """The cache to pass as ``past_key_values`` to an attached model.

    Parameters
    ----------
    model : PreTrainedModel
        The model it will serve, and no other.
    policy : Policy, optional
        What is kept where, and what a decode step reads.
    max_length : int, optional
        Tokens it will hold at most, when that is known: memory is then allocated once, at exactly that size. The
        cache still grows past it if it must.

    Raises
    ------
    UnsupportedModelError
        If the model has no layer with a K and V cache that kcache understands.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy | None = None, *, max_length: int | None = None) -> None:
        if not isinstance(model, PreTrainedModel):
            raise InputError(f"KCache needs a transformers model, got {type(model).__name__}; pass lm.model")
        if max_length is not None and max_length < 1:
            raise InputError(f"max_length must be at least 1 token, got {max_length}")
        self.policy = policy or Policy()
        self.shared = Shared(model, self.policy, max_length)
        self.shared.backend(input_device(model))
        verdict = probe(model)
        layers: list[Any] = stock_layers(model)
        for index in verdict.tiered:
            stock = layers[index]
            if isinstance(stock, LinearAttentionAndFullAttentionLayer):
                layers[index] = HybridTieredLayer(index, self.shared, stock.number_of_states)
            else:
                layers[index] = TieredLayer(index, self.shared)
        super().__init__(layers=layers)
        tiered = self.tiered_layers
        self.shared.residency.layers = tiered
        self.shared.residency.devices = dict(verdict.devices)
        for layer, following in pairwise(tiered):
            layer.following = following
        self._latest: TieredLayer | None = None

    @property
    def tiered_layers(self) -> list[TieredLayer]:
        """The layers whose V may leave the device, first to last."""
        return [layer for layer in self.layers if isinstance(layer, TieredLayer)]

    def __iter__(self) -> Iterator[tuple[torch.Tensor | None, torch.Tensor | None]]:
        for layer in self.layers:
            yield getattr(layer, "keys", None), getattr(layer, "values", None)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store K and V ``[B, Hkv, T, D]`` of new tokens for a layer.

        Called by the model in a forward. Called alone it fills the cache as a prefill would.

        Raises
        ------
        CacheStateError
            If another model's attention calls it.
        """
        # Only the call stack tells whose forward this is: a model that is not attached never comes to our attention
        # function, and would go on with this chunk's rows as if they were all.
        caller = sys._getframe(1).f_locals.get("self")
        if isinstance(caller, torch.nn.Module):
            self.shared.check_owner(caller)
        if self.shared.runs_ahead:
            self.shared.about_to_change()
        layer = self.layers[layer_idx]
        if self._latest is not None and self._latest is not layer:
            self._latest.release()
        self._latest = layer if isinstance(layer, TieredLayer) else None
        result: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        return result

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Attend exactly inside this block, also where a forward brings a single token (the end of a prompt)."""
        before, self.shared.force_exact = self.shared.force_exact, True
        try:
            yield
        finally:
            self.shared.force_exact = before

    @contextmanager
    def expecting(self, length: int) -> Iterator[None]:
        """Plan for ``length`` tokens inside this block, however few come at a time."""
        self.shared.residency.expected = length
        try:
            yield
        finally:
            self.shared.residency.expected = 0

    @contextmanager
    def stepwise(self, look: Look = no_look) -> Iterator[None]:
        """Inside this block, take several new tokens of a forward as that many decode steps (:mod:`kcache.stepwise`).

        For one sequence without padding, on an attached model, and a cache made with the ``max_length`` it comes to.
        A block of several needs a policy under which layers step apart (:attr:`Shared.layers_apart`). ``look`` is
        shown each step of each layer that replays.
        """
        before, self.shared.look = self.shared.look, look
        try:
            yield
        finally:
            self.shared.look = before

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens; the argument is negative, as transformers has it (``crop(-3)`` removes three)."""
        self.shared.about_to_change()
        super().crop(tokens_to_remove)

    def reset(self) -> None:
        """Empty the cache, give its memory back and start the counters anew."""
        self.shared.forget_recording()
        super().reset()
        self._renew_stock_layers()
        self.shared.validity = Validity()
        self.shared.spread = spread_of(self.policy, self.shared.ranks)
        self.shared.residency.forget()
        self.shared.let_go()
        self._latest = None

    def _renew_stock_layers(self) -> None:
        """Put new layers in place of stock's own: in older transformers theirs keep zeroed rows, and attend to them."""
        model = self.shared.model()
        for index, fresh in enumerate(stock_layers(model) if model is not None else ()):
            if not isinstance(self.layers[index], TieredLayer):
                self.layers[index] = fresh

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence ``repeats`` times."""
        self.shared.select(torch.arange(self.batch_size).repeat_interleave(repeats))
        super().batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the sequences ``indices`` ``[B']``, in that order; a bool mask ``[B]`` works too."""
        indices = indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices % max(1, self.batch_size)
        self.shared.select(indices)
        super().batch_select_indices(indices)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the sequences for beam search; nothing moves when the order stays."""
        if beam_idx.tolist() == list(range(self.batch_size)):
            return
        self.shared.select(beam_idx)
        super().reorder_cache(cast(torch.LongTensor, beam_idx))

    @property
    def batch_size(self) -> int:
        """Sequences held; 0 while empty."""
        sizes = [layer.batch_size for layer in self.tiered_layers]
        stock = [getattr(layer, "keys", None) for layer in self.layers if not isinstance(layer, TieredLayer)]
        sizes += [keys.shape[0] for keys in stock if keys is not None and keys.dim() == 4]
        return max([0, *sizes])

    @property
    def stats(self) -> Stats:
        """Totals over all layers since the cache was made or reset."""
        with self.shared.settled():
            return total([snapshot.stats for snapshot in self._layer_snapshots(picks=False)])

    def snapshot(self) -> StepSnapshot:
        """The state after the latest forward, with the picked positions; copies those to the host."""
        with self.shared.settled():
            layers = self._layer_snapshots(picks=True)
        stats = total([layer.stats for layer in layers])
        return StepSnapshot(step=stats.steps, tokens=stats.tokens, batch=self.batch_size, stats=stats, layers=layers)

    def _layer_snapshots(self, picks: bool) -> tuple[Any, ...]:
        return tuple(layer_snapshot(index, layer, picks) for index, layer in enumerate(self.layers))

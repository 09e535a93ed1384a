"""KCache: a transformers ``Cache`` whose full-attention layers keep K on the device and V in a tier.

Layers the probe does not clear (sliding windows, linear attention, latents) are the stock ones. All tiered layers
share one :class:`~kcache.layers.shared.Shared`.
"""

from __future__ import annotations

import operator
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from numbers import Integral
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, LinearAttentionAndFullAttentionLayer

from kcache.attention.probe import probe, stock_layers
from kcache.errors import InputError, PolicyError, expect
from kcache.layers.hybrid import HybridTieredLayer
from kcache.layers.shared import Shared
from kcache.layers.snapshots import layer_snapshot, total
from kcache.layers.spread import spread_of
from kcache.layers.stepwise import Look, no_look
from kcache.layers.tiered import TieredLayer
from kcache.machine.devices import decodes_by_kernels, input_device
from kcache.planning.sizes import beyond_kernels
from kcache.policy import Policy
from kcache.telemetry import Stats, StepSnapshot
from kcache.tiers.validity import Validity


def settled(policy: Policy, model: PreTrainedModel) -> Policy:
    """The policy as a cache of the model has it: K in two planes, if it leaves that open and kernels decode all layers.

    Raises
    ------
    UnsupportedModelError
        If the model has no layer with a K and V cache that kcache understands.
    """
    verdict = probe(model)
    kernels = bool(verdict.tiered)
    kernels = kernels and all(decodes_by_kernels(device, policy) for device in set(verdict.devices.values()))
    kernels = kernels and all(beyond_kernels(*heads) is None for heads in set(verdict.heads.values()))
    return policy.settled(kernels, model.dtype.itemsize)


class KCache(Cache):
    """The cache to pass to an attached model, as ``cache`` (``past_key_values`` before transformers 5.24).

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
    InputError, PolicyError
        If an argument is something else.
    UnsupportedModelError
        If the model has no layer with a K and V cache that kcache understands.
    """

    def __init__(self, model: PreTrainedModel, policy: Policy | None = None, *, max_length: int | None = None) -> None:
        expect(PreTrainedModel, "model", model, "a transformers model, such as lm.model")
        if max_length is not None and (not isinstance(max_length, Integral) or max_length < 1):
            raise InputError(f"max_length must be a whole number of tokens, at least 1; got {max_length!r}")
        self.policy = Policy() if policy is None else policy
        expect(Policy, "policy", self.policy, "a kcache.Policy, such as Policy(topn=64)", PolicyError)
        verdict = probe(model)
        self.shared = Shared(model, settled(self.policy, model), max_length)
        self.shared.backend(input_device(model))
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
        self._warned = False

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
        if torch.compiler.is_compiling():
            return _update_uncompiled(self, key_states, value_states, layer_idx, *args, **kwargs)
        # Only the call stack tells whose forward this is: a model that is not attached never comes to our attention
        # function, and would go on with this chunk's rows as if they were all.
        caller = sys._getframe(1).f_locals.get("self")
        layer = self.layers[layer_idx]
        if isinstance(caller, torch.nn.Module):
            self.shared.check_owner(caller)
            self._warn_unattached()
            if isinstance(layer, TieredLayer):
                self.shared.check_answered(layer)
                layer.waits_for_attention = self.shared.attached
        if self.shared.runs_ahead:
            self.shared.about_to_change()
        if self._latest is not None and self._latest is not layer:
            self._latest.release()
        self._latest = layer if isinstance(layer, TieredLayer) else None
        result: tuple[torch.Tensor, torch.Tensor] = super().update(key_states, value_states, layer_idx, *args, **kwargs)
        if self.shared.reached is not None:
            self.shared.reached(layer_idx)
        return result

    def _warn_unattached(self) -> None:
        if self._warned or self.shared.attached or not self.tiered_layers:
            return
        self._warned = True
        warnings.warn(
            "this KCache is used by a model that is not attached: attention is exact, and V that has left comes back "
            "whole for every token; wrap what calls the model in `with kcache.attach(model):`",
            stacklevel=3,
        )

    @contextmanager
    def exact(self) -> Iterator[None]:
        """Attend exactly inside this block, also where a forward brings a single token (the end of a prompt)."""
        before, self.shared.force_exact = self.shared.force_exact, True
        try:
            yield
        finally:
            self.shared.force_exact = before

    @contextmanager
    def expecting(self, length: int = 0, sequences: int = 0) -> Iterator[None]:
        """Plan for so many tokens and sequences inside this block, however few come at a time."""
        plan = self.shared.residency
        before = plan.expected, plan.sequences
        plan.expected, plan.sequences = max(plan.expected, length), max(plan.sequences, sequences)
        try:
            yield
        finally:
            plan.expected, plan.sequences = before

    @contextmanager
    def stepwise(self, look: Look = no_look) -> Iterator[None]:
        """Inside, take several new tokens of a forward as that many decode steps (:mod:`kcache.layers.stepwise`).

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
        """Remove the last tokens; the argument is negative, as transformers has it (``crop(-3)`` removes three).

        Raises
        ------
        InputError
            If it is positive, or not a whole number.
        """
        try:
            tokens_to_remove = operator.index(tokens_to_remove)  # which a tensor of one whole number has, too
        except TypeError:
            raise InputError(f"crop takes a whole number of tokens to remove, got {tokens_to_remove!r}") from None
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
        """Keep the sequences ``indices`` ``[B']``, in that order; a bool mask ``[B]`` works too.

        Raises
        ------
        InputError
            If there is no such sequence.
        """
        held = self.batch_size
        if indices.dtype == torch.bool:
            if held and len(indices) != held:
                raise InputError(f"this cache holds {held} sequences, and the mask is of {len(indices)}")
            indices = indices.nonzero()[:, 0]
        self._check_held([index + held if index < 0 else index for index in indices.tolist()])
        indices = indices % max(1, held)
        self.shared.select(indices)
        super().batch_select_indices(indices)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Reorder the sequences for beam search; nothing moves when the order stays.

        Raises
        ------
        InputError
            If there is no such sequence.
        """
        order = beam_idx.tolist()
        if order == list(range(self.batch_size)):
            return
        self._check_held(order)
        self.shared.select(beam_idx)
        super().reorder_cache(cast(torch.LongTensor, beam_idx))

    def _check_held(self, order: list[int]) -> None:
        """Raise unless these are sequences the cache holds, before anything moves; an empty cache takes any."""
        held = self.batch_size
        if held and not all(0 <= index < held for index in order):
            raise InputError(f"this cache holds {held} sequences, 0 to {held - 1}, and was asked for {order}")

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


@torch.compiler.disable
def _update_uncompiled(cache: KCache, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Store rows between the graphs of a compiled model: where they go is decided in Python, anew for each forward."""
    return cache.update(*args, **kwargs)

"""From the flags of ``kcache plan`` to its answer."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from kcache.errors import InputError, ModelNotFoundError, PolicyError
from kcache.policy import Policy, parse_bytes
from kcache_cli.engine import UNKNOWN_CONTEXT
from kcache_cli.options import ModelOptions
from kcache_cli.placing import planning_device, spread_of

if TYPE_CHECKING:
    import torch

    from kcache.planning.fitting import Pools
    from kcache.planning.plan import Method, Planner
    from kcache.speed.cards import Card

_FIRST_CTX = 1024
_LEAST_MEMORY = 2**20
_HITS_OF_TEXT = 0.8
"""Part of the picks that hot rows spare the link at least; of a trace of prose it was 0.89 (docs/benchmarks.md)."""
_SEEN = 0.05
"""The part of a step that waiting for the link must be to be worth a word."""


@dataclass(frozen=True)
class Question:
    """What was asked; None is for kcache to choose."""

    model: ModelOptions
    policy: Policy
    ctx: int | None
    batch: int | None
    """None for the fastest that fits."""
    card: Card | None
    """None for this machine."""
    hbm: int | None
    host: int | None
    hit_rate: float


@dataclass(frozen=True)
class Answer:
    """What there is to show.

    Attributes
    ----------
    question : Question
    planner : Planner
    ctx : int
    context : int or None
        The model's context.
    methods : dict of str to Method
        ``full`` and ``kcache``.
    machine : str
        Whose speeds the predictions are made of.
    source : str
        Where those come from.
    ctxs : list of int
        Contexts of the curves.
    curves : dict of str to list of float or None
        Predicted tokens per second.
    notes : list of str
    """

    question: Question
    planner: Planner
    ctx: int
    context: int | None
    methods: dict[str, Method]
    machine: str
    source: str
    ctxs: list[int]
    curves: dict[str, list[float | None]]
    notes: list[str]

    def refusal(self) -> str | None:
        """Why KCache does not fit, and what would; None if it does."""
        method = self.methods["kcache"]
        if method.fit.short is None:
            return None
        told = self.planner.fitter("kcache").refusal(method.fit, self.ctx, method.batch)
        elsewhere = self.question.card is not None and self.question.host is None and method.fit.short == "host"
        return f"{told}. Host memory is what is free here now; --host is for another machine's" if elsewhere else told


def read_batch(text: str | None, on_cpu: Callable[[], bool]) -> int | None:
    """Read ``auto`` or a number of sequences; without either, it is 1 on a CPU, where large batches are not run.

    Raises
    ------
    InputError
    """
    if text is None:
        return 1 if on_cpu() else None
    if text.strip().lower() == "auto":
        return None
    if not (text.strip().isascii() and text.strip().isdigit()) or int(text) < 1:
        raise InputError(f"--batch {text}: not a number of sequences; write 8, or auto for the fastest that fits")
    return int(text)


def read_card(name: str | None) -> Card | None:
    """The card that ``--gpu`` names.

    Raises
    ------
    InputError
    """
    from kcache.speed.cards import find_card

    if name is None:
        return None
    try:
        return find_card(name)
    except InputError as error:
        raise InputError(f"--gpu {name}: {error}; without it this machine is measured") from None


def read_size(flag: str, text: str | None) -> int | None:
    """Read a size such as ``80GiB``.

    Raises
    ------
    InputError
    """
    if text is None:
        return None
    try:
        size = parse_bytes(text)
    except PolicyError as error:
        raise InputError(f"{flag} {text}: {error}") from None
    if size == 0:
        raise InputError(f"{flag} {text}: there must be some; write it as 80GiB")
    if size < _LEAST_MEMORY:
        raise InputError(f"{flag} {text}: that is {size:,} bytes; with a unit it is read as meant: {text}GiB")
    return size


def answer(question: Question) -> Answer:
    """Read the config, take or measure the speeds, and plan."""
    import kcache
    from kcache.models.support import context_length
    from kcache.models.weights import Weights
    from kcache.planning.need import ModelShape
    from kcache.planning.plan import METHODS, Planner

    card, model = question.card, question.model
    try:
        config = kcache.load_config(
            model.name, revision=model.revision, gguf_file=model.gguf_file, trust_remote_code=model.trust_remote_code
        )
    except ModelNotFoundError as error:
        raise ModelNotFoundError(f"{error}. A plan needs only a config: kcache plan PATH/config.json") from error
    dtype = _dtype(model, config)
    weights = Weights.of(config, dtype, trust_remote_code=model.trust_remote_code)
    if card is None:
        speeds, machine, source = _measured(model)
    else:
        speeds, machine, source = card, card.product, "datasheet figures times what software usually achieves of them"
    pools = _pools(question, None if card is None else card.device_bytes)
    shape = ModelShape.of(config, dtype.itemsize)
    planner = Planner(shape, weights, question.policy, pools, speeds, question.hit_rate)
    context = context_length(config)
    ctx = question.ctx or context or UNKNOWN_CONTEXT
    ctxs = _contexts(max(ctx, context or 0), ctx)
    methods = {name: planner.method(name, ctx, question.batch) for name in METHODS}
    return Answer(
        question=question,
        planner=planner,
        ctx=ctx,
        context=context,
        methods=methods,
        machine=machine,
        source=source,
        ctxs=ctxs,
        curves={name: planner.curve(name, ctxs, question.batch) for name in METHODS},
        notes=[
            *_notes(question, planner, config, ctx, context),
            *_stays(planner, methods["kcache"], ctx),
            *_warm(planner, methods["kcache"], ctx),
        ],
    )


def _stays(planner: Planner, method: Method, ctx: int) -> list[str]:
    """Why KCache is no faster than full attention where nothing has to leave the device, or less than it could be."""
    policy, need = planner.policy, method.need
    if policy.offload != "auto" or ctx < policy.dense_below or not need.layers:
        return []
    batch = f" in a batch of {method.batch}" if method.batch > 1 else ""
    if not need.host_bytes:
        return [
            f"all of V has room on the device at {ctx:,} tokens{batch}, so it stays there and attention is exact; "
            "KCache pays with more tokens or sequences, --offload all shows what it does at these"
        ]
    leaving = replace(planner, policy=policy.replace(offload="all"))
    fit = leaving.fitter("kcache").fit(ctx, method.batch)
    if method.predicted is None or fit.short is not None:
        return []
    faster = leaving.predict(fit.need, ctx, method.batch)
    if faster.step_ms > (1 - _SEEN) * method.predicted.step_ms:
        return []
    return [
        f"V of {need.resident_layers} of {need.layers} layers has room on the device, so these attend exactly and read "
        f"all of it; with --offload all a step would take {faster.step_ms:,.2f} ms ({faster.tok_s:,.1f} tok/s)"
    ]


def _warm(planner: Planner, method: Method, ctx: int) -> list[str]:
    """What hot rows would make of a step that waits for the link, if nothing was said of them."""
    from kcache.planning.sizes import hot_rows_of

    cold, kept = method.predicted, planner.pools.kernels and hot_rows_of(planner.policy) > 0
    if cold is None or planner.hit_rate or not kept or cold.link_ms < _SEEN * cold.step_ms:
        return []
    warm = replace(planner, hit_rate=_HITS_OF_TEXT).predict(method.need, ctx, method.batch)
    return [
        f"KCache's prediction has every picked row cross the link. Of text, {_HITS_OF_TEXT:.0%} and more were picked a "
        f"moment before and are on the device still: with --hit-rate {_HITS_OF_TEXT} a step would take "
        f"{warm.step_ms:,.2f} ms ({warm.tok_s:,.1f} tok/s)"
    ]


def _dtype(model: ModelOptions, config: Any) -> torch.dtype:
    import torch

    from kcache.loading import parse_dtype

    asked = parse_dtype(model.dtype or "auto")
    wanted = config.dtype if asked == "auto" else asked
    return wanted if isinstance(wanted, torch.dtype) else torch.bfloat16


def _measured(model: ModelOptions) -> tuple[Any, str, str]:
    from kcache.machine.devices import SPREADS
    from kcache.speed.findings import how_busy
    from kcache_cli.exits import warn
    from kcache_cli.measured import measure

    device = model.device or "auto"
    if (busy := how_busy(os.cpu_count() or 1)) is not None:
        warn(f"{busy}: speeds measured now are those of a slower one")
    machine = measure("auto" if device in SPREADS else device)
    kind = "this machine's RAM" if machine.host_only else "this machine"
    return machine, f"{machine.name} ({machine.device})", f"measured just now on {kind}"


def _pools(question: Question, card_bytes: int | None) -> Pools:
    """Memory as asked for, else the card's, else what is free here."""
    import torch

    from kcache.planning.fitting import Pools

    device_bytes = question.hbm or card_bytes
    device = torch.device("cpu") if device_bytes else planning_device(question.model.device or "auto")
    here = Pools.of(device, spread_of(question.model, device))
    return Pools(device_bytes or here.device_bytes, question.host or here.host_bytes, kernels=here.kernels)


def _contexts(longest: int, ctx: int) -> list[int]:
    """Powers of two up to the longest context of interest, and the one that was asked about."""
    ctxs, length = {ctx}, _FIRST_CTX
    while length <= longest:
        ctxs.add(length)
        length *= 2
    return sorted(ctxs)


def _notes(question: Question, planner: Planner, config: Any, ctx: int, context: int | None) -> list[str]:
    notes = []
    policy = question.policy
    if context is not None and ctx > context:
        notes.append(f"the model was made for {context:,} tokens: beyond that the figures are of memory and speed only")
    if policy.offload != "none" and ctx < policy.dense_below:
        notes.append(f"below {policy.dense_below:,} tokens V stays on the device and attention is exact")
    if not planner.shape.layers:
        why = "latent attention" if planner.shape.untiered else "each attends a sliding window, whose rows are few"
        notes.append(f"this model's layers cannot be tiered ({why}): it keeps an exact cache on the device")
    if getattr(config, "quantization_config", None):
        notes.append("the checkpoint is quantised; weights are counted unquantised, so there is more room than shown")
    if planner.speeds.host_only:
        notes.append(
            "this is a CPU: both tiers are the same RAM, so KCache saves no memory here and is about as fast as exact "
            f"attention; to plan for a card:\n  kcache plan {shlex.quote(question.model.name)} --gpu h100"
        )
        if policy.key_planes or policy.v_bits == 8:
            notes.append("rows in 8 bits are slow on a CPU, many times slower than predicted: they are made for CUDA")
    return notes

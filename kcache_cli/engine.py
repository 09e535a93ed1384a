"""What the commands need of kcache, as one object they are given.

Commands take it from typer's context (``ctx.obj``), so tests run them on an engine of their own; the real one imports
torch when it is first asked for something.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import typer

from kcache.errors import InputError
from kcache.policy import Policy
from kcache_cli.exits import note
from kcache_cli.options import ModelOptions, SamplingOptions
from kcache_cli.placing import device_map, map_device, planning_device, spread_of

if TYPE_CHECKING:
    from kcache import Sampling, TokenEvent
    from kcache.bench.cases import Case
    from kcache.bench.rows import Row
    from kcache.bench.run import Watch
    from kcache.bench.spec import Spec
    from kcache.decoding.prompts import Prompt
    from kcache.evaluate.fidelity import Case as FidelityCase
    from kcache.evaluate.figures import Figures
    from kcache.evaluate.places import Place
    from kcache.evaluate.sweep import Known
    from kcache.evaluate.sweep import Spec as FidelitySpec
    from kcache.models.progress import Progress
    from kcache.planning.fitting import Split
    from kcache.watch.publication import Publication

UNKNOWN_CONTEXT = 4096
_LEAST_CONTEXT = 512
_SOON_S = 3.0


@dataclass(frozen=True)
class Plan:
    """What is known before a model is loaded.

    Attributes
    ----------
    context : int or None
        The model's context in tokens.
    ctx : int
        The context memory was planned for.
    batch_sizes : tuple of (int, int)
        Contexts in rising order, the last of them ``ctx``, each with how many prompts can be decoded together there.
    host_only : bool
        Whether both tiers are RAM.
    """

    context: int | None
    ctx: int
    batch_sizes: tuple[tuple[int, int], ...]
    host_only: bool


class Engine(Protocol):
    """The part of kcache that chat and generate use."""

    def plan(
        self,
        model: ModelOptions,
        policy: Policy,
        *,
        ctx: int | None = None,
        need: int | None = None,
        batch_size: int | None = None,
        allow_overflow: bool = False,
    ) -> Plan:
        """Check that the model exists and its cache fits, before anything is loaded.

        ``ctx`` is what the user asked to plan for; ``need`` is the longest that will occur, and goes first where it is
        known; ``batch_size`` is the largest that is wanted, None for what is sensible.
        """

    def sampling(self, options: SamplingOptions) -> Sampling:
        """Turn flags into kcache's sampling settings."""

    def reader(self, model: ModelOptions, progress: Progress) -> Any:
        """Load what turns prompts into tokens (:class:`kcache.models.loaded.Reader`), without the weights."""

    def load(self, model: ModelOptions, progress: Progress) -> Any:
        """Load the model."""

    def remarks(self, lm: Any, asked: SamplingOptions, sampling: Sampling) -> list[str]:
        """What a user should know of a loaded model: what was ``asked`` for in vain, and that nothing is tiered."""

    def session(self, lm: Any, policy: Policy, **options: Any) -> Any:
        """Begin a conversation (:class:`kcache.Session`)."""

    def encode(self, lm: Any, prompt: Prompt) -> list[int]:
        """Turn a prompt into token ids."""

    def generate(self, lm: Any, prompts: list[list[int]], policy: Policy, **options: Any) -> Iterator[TokenEvent]:
        """Decode a batch (:func:`kcache.generate`)."""

    def bench(self, lm: Any, spec: Spec, cases: Sequence[Case], watch: Watch) -> Iterator[list[Row]]:
        """Measure the machine, then the cases, yielding the rows of each (:func:`kcache.bench.run.run`)."""

    def publish(self, lm: Any, **options: Any) -> Publication | None:
        """Let others watch the model (:func:`kcache.publish`); None where there is nothing to watch."""

    def fidelity(
        self, lm: Any, spec: FidelitySpec, places: Sequence[Place], known: Known, watch: Callable[[str], None]
    ) -> Iterator[tuple[FidelityCase, Figures]]:
        """Compare policies with full attention at places of a text (:func:`kcache.evaluate.sweep.run`)."""


class KCacheEngine:
    """The real one.

    Parameters
    ----------
    split : Split, optional
        What part of a model and of this machine is this process's own; by default all.
    """

    split: Split | None = None

    def __init__(self, split: Split | None = None) -> None:
        self.split = split

    def plan(
        self,
        model: ModelOptions,
        policy: Policy,
        *,
        ctx: int | None = None,
        need: int | None = None,
        batch_size: int | None = None,
        allow_overflow: bool = False,
    ) -> Plan:
        """See :class:`Engine`."""
        import torch

        import kcache
        from kcache import memory
        from kcache.loading import parse_dtype
        from kcache.machine.parallel import check_heads
        from kcache.models.support import context_length

        config = kcache.load_config(
            model.name, revision=model.revision, gguf_file=model.gguf_file, trust_remote_code=model.trust_remote_code
        )
        device = map_device(model) if model.device_map else planning_device(model.device or "auto")
        split = self.split or spread_of(model, device)
        context = context_length(config)
        asked = ctx or context or UNKNOWN_CONTEXT
        if context is not None and asked > context and not allow_overflow:
            raise InputError(
                f"--ctx {asked}: the context of {model.name} is {context} tokens; ask for at most that, or use "
                "--allow-overflow"
            )
        planned = asked if need is None else need
        if context is not None and not allow_overflow:
            planned = min(planned, context)
        asked_dtype = parse_dtype(model.dtype or "auto")
        wanted = config.dtype if asked_dtype == "auto" else asked_dtype
        dtype = wanted if isinstance(wanted, torch.dtype) else None
        if split.ranks > 1:
            check_heads(config, model.name, split.ranks)
        # An explicit map says itself which weights are on a device, and what is left there is seen when they are.
        mapped = model.device_map is not None
        weights = 0 if mapped else memory.weight_bytes(config, dtype, trust_remote_code=model.trust_remote_code)
        sizes: dict[str, Any] = {
            "dtype_bytes": 2 if dtype is None else dtype.itemsize,
            "split": split,
        }
        memory.check_fits(config, planned, 1, policy, device=device, weights_bytes=weights, **sizes)
        ctxs = _rising(planned)
        found = memory.batch_sizes(
            config, ctxs, policy, device, most=batch_size, weights_bytes=None if mapped else weights, **sizes
        )
        return Plan(context, planned, tuple(zip(ctxs, found, strict=True)), device.type == "cpu")

    def sampling(self, options: SamplingOptions) -> Sampling:
        """See :class:`Engine`."""
        from kcache import Sampling

        return Sampling(temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, seed=options.seed)

    def remarks(self, lm: Any, asked: SamplingOptions, sampling: Sampling) -> list[str]:
        """See :class:`Engine`."""
        from kcache.attention.probe import probe
        from kcache.decoding.sampling import is_greedy

        remarks, found = [], probe(lm.model)
        if not found.tiered:
            why = f": {', '.join(found.reasons)}" if found.reasons else ""
            remarks.append(f"this model's layers cannot be tiered{why}; it runs exactly, with transformers' own cache")
        if asked.seed is not None and is_greedy(sampling, lm.model.generation_config):
            remarks.append(
                f"--seed {asked.seed} changes nothing: the likeliest token is always taken; --temperature 0.7 draws one"
            )
        return remarks

    def reader(self, model: ModelOptions, progress: Progress) -> Any:
        """See :class:`Engine`."""
        from kcache.loading import load_reader

        return load_reader(
            model.name,
            revision=model.revision,
            gguf_file=model.gguf_file,
            trust_remote_code=model.trust_remote_code,
            progress=progress,
        )

    def load(self, model: ModelOptions, progress: Progress) -> Any:
        """See :class:`Engine`."""
        import kcache
        from kcache.backends.cpu import compile_ahead

        lm = kcache.load(
            model.name,
            device_map=device_map(model),
            tensor_parallel=1 if self.split is None else self.split.ranks,
            dtype=model.dtype or "auto",
            revision=model.revision,
            gguf_file=model.gguf_file,
            trust_remote_code=model.trust_remote_code,
            progress=progress,
        )
        # Read from disk in a second, but for the first time on a machine.
        timer = threading.Timer(_SOON_S, progress, (0, 0, "compiling decode steps, once for this type of numbers"))
        timer.start()
        try:
            compile_ahead(lm.device, lm.model.dtype)
        finally:
            timer.cancel()
        return lm

    def session(self, lm: Any, policy: Policy, **options: Any) -> Any:
        """See :class:`Engine`."""
        from kcache import Session

        return Session(lm, policy, **options)

    def encode(self, lm: Any, prompt: Prompt) -> list[int]:
        """See :class:`Engine`."""
        from kcache.decoding.prompts import encode

        return encode(lm, [prompt])[0]

    def generate(self, lm: Any, prompts: list[list[int]], policy: Policy, **options: Any) -> Iterator[TokenEvent]:
        """See :class:`Engine`."""
        import kcache

        return kcache.generate(lm, prompts, policy, **options)

    def bench(self, lm: Any, spec: Spec, cases: Sequence[Case], watch: Watch) -> Iterator[list[Row]]:
        """See :class:`Engine`."""
        from kcache.bench.env import environment
        from kcache.bench.run import run
        from kcache_cli.measured import measure

        watch("measuring this machine", 0)
        machine = measure(str(lm.device))
        return run(lm, spec, cases, machine, environment(machine), watch)

    def publish(self, lm: Any, **options: Any) -> Publication | None:
        """See :class:`Engine`."""
        from kcache import publish
        from kcache_cli.measured import link_gb_s

        return publish(lm, link_gb_s=link_gb_s(lm.device), **options)

    def fidelity(
        self, lm: Any, spec: FidelitySpec, places: Sequence[Place], known: Known, watch: Callable[[str], None]
    ) -> Iterator[tuple[FidelityCase, Figures]]:
        """See :class:`Engine`."""
        from kcache.evaluate.sweep import run

        return run(lm, spec, places, known, watch)


def _rising(ctx: int) -> list[int]:
    """Contexts up to ``ctx``, each a quarter longer than the one before."""
    ctxs, length = [], _LEAST_CONTEXT
    while length < ctx:
        ctxs.append(length)
        length += length // 4
    return [*ctxs, ctx]


def engine_of(ctx: typer.Context) -> Engine:
    """The engine a command was started with; the real one unless a test gave another."""
    engine: Engine = ctx.obj if ctx.obj is not None else KCacheEngine()
    return engine


def make_way() -> None:
    """Let torch's threads, of which there are none yet, make way for other programs; say so where these are busy."""
    from kcache.machine.threads import make_way_for_others

    used = make_way_for_others()
    if used is not None:
        note(f"other programs keep {used:.1f} cores of this machine busy: decoding on its CPU will be slower")


def load_with_bar(engine: Engine, model: ModelOptions) -> Any:
    """Load a model, and show on standard error how far that is."""
    from kcache_cli.console import download_bar

    with download_bar(f"loading {model.name}") as progress:
        return engine.load(model, progress)

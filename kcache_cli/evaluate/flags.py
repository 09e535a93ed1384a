"""Flags that several of ``kcache eval`` and ``kcache tune`` share, and the policy and files they mean."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kcache.errors import InputError
from kcache.policy import Offload, Policy
from kcache_cli.options import PolicyOptions, number_list, token_count
from kcache_cli.policies import build_policy
from kcache_cli.rows.formats import Format, Row

if TYPE_CHECKING:
    from kcache_cli.engine import Engine
    from kcache_cli.options import ModelOptions
    from kcache_cli.settings import Settings

TOPNS = (64, 128)


_policy = functools.partial(typer.Option, rich_help_panel="Cache policy")
measure_option = functools.partial(typer.Option, rich_help_panel="What to measure")
result_option = functools.partial(typer.Option, rich_help_panel="Results", show_default=False)


def in_float32(options: ModelOptions, settings: Settings) -> ModelOptions:
    """The model that flags and settings describe, in float32 unless a flag says otherwise."""
    from kcache_cli.settings import fill

    return fill(replace(options, dtype=options.dtype or "float32"), settings)


def check_context(engine: Engine, model: ModelOptions, policy: Policy, ctx: int, then: str, least: int) -> None:
    """See before a model is loaded that ``ctx`` tokens, and the ``least`` that follow, are not beyond its context.

    Full attention is measured too, so memory has to hold all of K and V.

    Raises
    ------
    InputError, DoesNotFitError
    """
    full = policy.replace(offload="none", resident_layers=None, kv_budget=None)
    context = engine.plan(model, full, need=ctx, batch_size=1).context
    if context is not None and ctx + least > context:
        raise InputError(
            f"--ctx {ctx}: the context of {model.name} is {context} tokens, and {then} come on top; ask for less"
        )


@dataclass(frozen=True)
class PlacesOptions:
    """Which text, and how much of it is read at how many places."""

    text: Annotated[
        list[str] | None,
        measure_option(
            "--text",
            help="Text to read, UTF-8; may be repeated.",
            metavar="FILE",
            show_default="the reference of Python",
        ),
    ] = None
    ctx: Annotated[
        int,
        measure_option(
            "--ctx",
            help="Tokens prefilled before the steps: 7680, 8k, ...",
            metavar="TOKENS",
            show_default="7680",
            parser=token_count,
        ),
    ] = 7680
    steps: Annotated[
        int, measure_option("--steps", help="Decode steps after them.", metavar="INTEGER", show_default="256", min=1)
    ] = 256
    places: Annotated[
        int,
        measure_option(
            "--places", help="Places in the text, spread over it.", metavar="INTEGER", show_default="4", min=1
        ),
    ] = 4


@dataclass(frozen=True)
class TopnOptions:
    """Which N to compare, and when TopN decoding begins."""

    topn: Annotated[
        str | None,
        _policy(
            "--topn",
            help="V rows fetched per KV head and step, comma-separated.",
            metavar="LIST",
            show_default="64,128",
        ),
    ] = None
    offload: Annotated[
        Offload | None,
        _policy(
            "--offload",
            help="V leaves the device: all, so that TopN is what is measured; auto = what does not fit the budget; "
            "none.",
            show_default="all",
        ),
    ] = None
    dense_below: Annotated[
        int,
        _policy(
            "--dense-below",
            min=0,
            metavar="TOKENS",
            help="Shorter contexts attend exactly. A policy's own value, usually 2,048, would leave most prompts here "
            "to full attention and measure nothing.",
        ),
    ] = 0

    def policy(self, options: PolicyOptions, settings: Settings) -> tuple[Policy, tuple[int, ...]]:
        """The policy that these and other flags describe, and each N it is to be tried with."""
        policy = build_policy(replace(options, offload=self.offload), settings).replace(dense_below=self.dense_below)
        if self.offload is None and policy.offload == "auto":
            policy = policy.replace(offload="all")
        return policy, number_list(self.topn, "--topn", TOPNS)


@dataclass(frozen=True)
class ResultOptions:
    """Where the rows go."""

    form: Annotated[
        Format | None, result_option("-o", "--format", help="Format of the rows. Default: md, a summary.")
    ] = None
    output: Annotated[
        str | None,
        result_option(
            "--output", help="Write rows here as they come; the name's ending tells the format.", metavar="FILE"
        ),
    ] = None
    resume: Annotated[
        bool, result_option("--resume", help="Keep the rows --output already holds and run only the rest.")
    ] = False

    def destination(self, command: str, names: set[str]) -> tuple[Path | None, str, list[Row]]:
        """See :func:`kcache_cli.rows.store.destination`."""
        from kcache_cli.rows.store import destination

        return destination(self.form, self.output, self.resume, command, names)

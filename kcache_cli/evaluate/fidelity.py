"""``kcache eval fidelity``: how far decoding with N rows is from full attention on a text."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kcache_cli.completion import complete_policy
from kcache_cli.evaluate.flags import (
    PlacesOptions,
    ResultOptions,
    check_context,
    in_float32,
    measure_option,
    result_option,
)
from kcache_cli.options import ModelOptions, PolicyOptions, Without, number_list, with_options
from kcache_cli.watching import WatchOptions, watching

if TYPE_CHECKING:
    from kcache.evaluate.fidelity import Case
    from kcache.evaluate.figures import Figures
    from kcache.evaluate.haystack import Prose
    from kcache.evaluate.places import Place
    from kcache.evaluate.sweep import Spec
    from kcache_cli.engine import Engine
    from kcache_cli.rows.store import Store


@with_options
def fidelity(
    context: typer.Context,
    model_options: ModelOptions,
    sample: PlacesOptions,
    topn: Annotated[
        str | None,
        measure_option(
            "--topn", help="V rows fetched per KV head and step.", metavar="LIST", show_default="the policy's"
        ),
    ] = None,
    policy: Annotated[
        list[str] | None,
        measure_option(
            "--policy",
            help="default, paper (the scheme as published), smollm2 (what kcache tune found), or a TOML file of policy "
            "fields; may be repeated. Single policy flags change each of them further.",
            metavar="NAME|FILE",
            show_default="default",
            autocompletion=complete_policy,
        ),
    ] = None,
    dense_below: Annotated[
        int | None,
        measure_option(
            "--dense-below",
            help="Shorter contexts attend exactly.",
            metavar="TOKENS",
            show_default="the policy's",
            min=0,
        ),
    ] = None,
    plot: Annotated[
        str | None,
        result_option("--plot", help="Draw KL against bytes over the link here: .png, .svg, .pdf.", metavar="FILE"),
    ] = None,
    *,
    results: ResultOptions,
    watch_options: WatchOptions,
    policy_options: Annotated[PolicyOptions, Without(("policy", "topn", "offload", "ctx", "allow_overflow"))],
) -> None:
    r"""Compare decoding with N rows with full attention, on a text.

    At each of several places the text is prefilled exactly, once; then its next tokens are fed to full attention and to
    every policy with every N, and their predictions compared at each step: KL divergence, perplexity, share of steps
    with the same likeliest token. V of all layers but the dense ones is offloaded, in float32 unless --dtype is given.

    Rows go to standard output, progress to standard error. A file is written whenever a policy is done with a place,
    so a run that was stopped goes on with --resume.

    Examples
    --------
      kcache eval fidelity --topn 64,128,256
      kcache eval fidelity --text essays.txt --topn 32,64,128 \
          --policy default --policy paper --plot kl.svg
      kcache eval fidelity Qwen/Qwen3-8B --text essays.txt --ctx 32k \
          -o jsonl --output rows.jsonl --resume
    """
    from kcache_cli.engine import engine_of, load_with_bar
    from kcache_cli.evaluate.fidelity_table import COMMAND, NAMES, markdown
    from kcache_cli.evaluate.prose import read_prose
    from kcache_cli.policies import build_policies
    from kcache_cli.rows.chart import chart_file
    from kcache_cli.rows.store import Store
    from kcache_cli.settings import load_settings

    settings = load_settings()
    model = in_float32(model_options, settings)
    policies = build_policies(policy, policy_options, settings)
    target, form, there = results.destination(COMMAND, NAMES)
    chart = chart_file(plot)
    watch_options.check()
    model.check()

    from kcache.evaluate.fidelity import Case
    from kcache.evaluate.places import find_places
    from kcache.evaluate.sweep import Spec

    below = {} if dense_below is None else {"dense_below": dense_below}
    cases = tuple(
        Case(_called(name), each.replace(topn=rows, offload="all" if each.offload == "auto" else each.offload, **below))
        for name, each in policies.items()
        for rows in number_list(topn, "--topn", (each.topn,))
    )
    spec = Spec(cases, sample.ctx, sample.steps, sample.places)
    prose = read_prose(sample.text)
    _warn_if_exact(spec)

    engine = engine_of(context)
    check_context(engine, model, cases[0].policy, spec.ctx, f"{spec.steps} steps", spec.steps)
    lm = load_with_bar(engine, model)
    found = find_places(lm, prose, spec.ctx, spec.steps, spec.places)
    store = Store(target, form, markdown, there)
    try:
        with watching(engine, lm, "eval fidelity", watch_options):
            _run(engine, lm, spec, prose, found, store)
    finally:
        store.close()
        if chart is not None and store.rows:
            from kcache_cli.evaluate.fidelity_plot import draw

            draw(store.rows, chart)
    store.say_where(chart)


def _called(policy: str) -> str:
    """What a policy is called in tables: its name, or that of its file."""
    return Path(policy).stem if policy.endswith(".toml") else policy


def _warn_if_exact(spec: Spec) -> None:
    """Warn of policies that begin below their ``dense_below``, where the distance from full attention is 0."""
    from kcache_cli.exits import warn

    exact = [case for case in spec.cases if case.policy.offload != "none" and spec.ctx < case.policy.dense_below]
    if exact:
        names = ", ".join(dict.fromkeys(case.name for case in exact))
        below = max(case.policy.dense_below for case in exact)
        warn(
            f"contexts under dense_below tokens ({below:,}) are attended exactly, so --ctx {spec.ctx} says little or "
            f"nothing of TopN under --policy {names}: use --dense-below 0, or a larger --ctx"
        )


def _run(engine: Engine, lm: Any, spec: Spec, prose: Prose, places: Sequence[Place], store: Store) -> None:
    """Measure what the store does not hold yet, and store a case's row whenever it has grown by a place."""
    from kcache.bench.env import surroundings
    from kcache.evaluate.sweep import make_row, turns_of
    from kcache_cli.evaluate.fidelity_table import figures_there, identity, is_whole
    from kcache_cli.exits import note
    from kcache_cli.rows.progress import steps_bar

    env = surroundings(lm.device)
    rows = {identity(row): row for row in store.rows}
    known: dict[Case, list[Figures]] = {}

    def grow(case: Case, more: Sequence[Figures]) -> None:
        known.setdefault(case, []).extend(more)
        row = {**make_row(lm, spec, prose, case, places, known[case]), "env": env}
        if more or identity(row) not in rows:
            rows[identity(row)] = row
        store.replace([row for row in rows.values() if row["places"]], is_whole)

    for case in spec.cases:
        blank = make_row(lm, spec, prose, case, places, ())
        grow(case, figures_there(store.rows, blank))
    there = sum(map(len, known.values()))
    if there:
        note(f"{there} of {len(spec.cases) * len(places)} measurements were there already")
    with steps_bar(turns_of(spec, places, known), "measuring", str) as watch:
        try:
            for case, figures in engine.fidelity(lm, spec, places, known, lambda label: watch(label, 1)):
                grow(case, [figures])
        except KeyboardInterrupt:
            note("stopped; what has been measured is there" if store.rows else "stopped before a place was finished")
            raise

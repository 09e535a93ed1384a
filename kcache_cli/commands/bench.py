"""``kcache bench``: time decode steps of KCache and of the caches it replaces, on this machine."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kcache.policy import Offload
from kcache_cli.options import ModelOptions, PolicyOptions, Without, number_list, with_options
from kcache_cli.rows.formats import Format, Markdown, Row
from kcache_cli.watching import WatchOptions, watching

if TYPE_CHECKING:
    from kcache.bench.cases import Case
    from kcache.bench.spec import Spec
    from kcache_cli.engine import Engine
    from kcache_cli.rows.store import Store

_CASE_S = 60.0

_measure = partial(typer.Option, rich_help_panel="What to measure (lists are comma-separated)")
_result = partial(typer.Option, rich_help_panel="Results", show_default=False)


@with_options
def bench(
    context: typer.Context,
    model_options: ModelOptions,
    ctx: Annotated[
        str | None, _measure("--ctx", help="Contexts, in tokens: 8k is 8192.", show_default="2k,8k", metavar="LIST")
    ] = None,
    topn: Annotated[
        str | None, _measure("--topn", help="V rows fetched per KV head and step.", show_default="128", metavar="LIST")
    ] = None,
    batch: Annotated[
        str | None, _measure("--batch", help="Sequences decoded together.", show_default="1", metavar="LIST")
    ] = None,
    engines: Annotated[
        str | None,
        _measure(
            "--engine",
            help="kcache; dense, which is kcache with all V on the device; hf-dynamic, hf-static, hf-offloaded, which "
            "are transformers' caches. Ratios refer to the first hf one, or to dense.",
            show_default="kcache,dense,hf-static,hf-dynamic",
            metavar="LIST",
        ),
    ] = None,
    repeats: Annotated[
        int | None,
        _measure(
            "-r",
            "--repeats",
            min=1,
            metavar="INTEGER",
            help="Turns per engine.",
            show_default="5, fewer in a case that takes over a minute",
        ),
    ] = None,
    steps: Annotated[
        int,
        _measure("--steps", min=1, metavar="INTEGER", help="Steps timed per turn; fewer in one that takes over 3 s."),
    ] = 16,
    real_prefill: Annotated[
        bool,
        _measure(
            "--real-prefill", help="Prefill a text instead of filling in random rows; gives TTFT and prefill speed."
        ),
    ] = False,
    fidelity: Annotated[
        bool,
        _measure(
            "--fidelity", help="Also measure KL and top-1 agreement with full attention, on a text (prefills it)."
        ),
    ] = False,
    check_plan: Annotated[
        bool,
        _measure(
            "--check-plan", help="Put the speed that kcache plan predicts, and its error, beside what is measured."
        ),
    ] = False,
    form: Annotated[
        Format | None, _result("-o", "--format", help="Format of the rows. Default: md; a card per case at a terminal.")
    ] = None,
    output: Annotated[
        str | None,
        _result("--output", help="Write rows here; the name's ending tells the format.", metavar="FILE"),
    ] = None,
    plot: Annotated[
        str | None, _result("--plot", help="Draw tokens per second here: .png, .svg, .pdf.", metavar="FILE")
    ] = None,
    resume: Annotated[
        bool, _result("--resume", help="Keep the rows --output already holds and measure only the rest.")
    ] = False,
    compare: Annotated[
        str | None,
        _result("--compare", help="Rows of an earlier run, JSON: adds the speed over then.", metavar="FILE"),
    ] = None,
    offload: Annotated[
        Offload | None,
        typer.Option(
            "--offload",
            help="V leaves the device: all, so that TopN is what is timed; auto = what does not fit the budget; none.",
            show_default="all",
            rich_help_panel="Cache policy",
        ),
    ] = None,
    *,
    policy_options: Annotated[PolicyOptions, Without(("topn", "offload", "ctx", "allow_overflow"))],
    watch_options: Annotated[WatchOptions, Without(("dashboard",))],
) -> None:
    r"""Time decode steps of KCache beside full attention and the caches of transformers.

    Engines take turns in one process, on the loop that chat and generate run, so the ratios hold on a noisy machine;
    ratio is speed over the first hf engine (above 1 is faster). Contexts are random rows filled into the caches unless
    --real-prefill is given, and may be longer than the model's (speed only). What does not fit or fails is a row with
    the reason; with no other rows the exit code is 3 (it does not fit), 2 (longer than the model's positions) or 1.
    Rows go to standard output, progress to standard error.

    A step's floor is what its bytes (weights, K, scores, resident V, tail, rows over the link) take at the bandwidths
    measured on this machine when the command starts.

    Examples
    --------
      kcache bench
      kcache bench --ctx 32k --topn 64
      kcache bench Qwen/Qwen3-8B --ctx 8k,32k --batch 1,8 \
          --engine kcache,hf-static,hf-offloaded -o jsonl
      kcache bench --ctx 8k --topn 64,128 --fidelity \
          --output rows.jsonl --plot speed.svg
    """
    from kcache.bench.spec import DEFAULT_ENGINES, Spec
    from kcache_cli.bench.same import COMMAND, NAMES, compare_with
    from kcache_cli.engine import engine_of, load_with_bar
    from kcache_cli.policies import build_policy
    from kcache_cli.rows.chart import chart_file
    from kcache_cli.rows.store import Store, destination, read_rows, say_skipped
    from kcache_cli.settings import fill, load_settings

    settings = load_settings()
    model = fill(model_options, settings)
    policy = build_policy(replace(policy_options, offload=offload), settings)
    if offload is None and policy.offload == "auto":
        policy = policy.replace(offload="all")
    spec = Spec(
        ctxs=number_list(ctx, "--ctx", Spec.ctxs, tokens=True),
        batches=number_list(batch, "--batch", Spec.batches),
        topns=number_list(topn, "--topn", (policy.topn,)),
        engines=tuple(name.strip() for name in engines.split(",")) if engines is not None else DEFAULT_ENGINES,
        policy=policy,
        repeats=repeats or Spec.repeats,
        case_s=_CASE_S if repeats is None else None,
        steps=steps,
        real_prefill=real_prefill,
        fidelity=fidelity,
        check_plan=check_plan,
    )
    target, chosen, there = destination(form, output, resume, COMMAND, NAMES)
    chart = chart_file(plot)
    watch_options.check()
    model.check()
    old = None if compare is None else read_rows(Path(compare), "--compare", COMMAND, NAMES)
    compared = partial(compare_with, old)

    from kcache.bench.cases import make_cases

    engine = engine_of(context)
    lm = load_with_bar(engine, model)
    _warn_if_busy()
    cases = make_cases(spec)
    kept, left = _split(lm, spec, cases, there)
    store = Store(target, chosen, _layout(form, target), compared(kept))
    try:
        with watching(engine, lm, "bench", watch_options):
            _run(engine, lm, spec, left, store, compared)
    finally:
        store.close()
        if chart is not None and store.rows:
            from kcache_cli.bench.plot import draw

            draw(store.rows, chart)
    say_skipped(len(cases) - len(left))
    store.say_where(chart)
    _check_measured(store.rows)


def _layout(form: Format | None, target: Path | None) -> Markdown:
    """How rows are written for people: a Markdown table, or cards at a terminal from which none was asked."""
    from kcache_cli.bench.cards import cards
    from kcache_cli.bench.table import markdown

    if form is not None or target is not None or not sys.stdout.isatty():
        return markdown
    return partial(cards, width=shutil.get_terminal_size().columns)


def _warn_if_busy() -> None:
    from kcache.speed.findings import how_busy

    if (busy := how_busy(os.cpu_count() or 1)) is not None:
        print(f"kcache: {busy}: times will be too long and ratios uncertain", file=sys.stderr)


def _run(
    engine: Engine,
    lm: Any,
    spec: Spec,
    cases: Sequence[Case],
    store: Store,
    compared: Callable[[Sequence[Row]], list[Row]],
) -> None:
    """Measure, and store the rows of each case as it ends."""
    from kcache.bench.run import turns_of
    from kcache_cli.exits import note
    from kcache_cli.rows.progress import steps_bar

    total = sum(turns_of(case, spec) for case in cases)
    with steps_bar(total, "timing", lambda label: label.rpartition(" · ")[0]) as watch:
        try:
            for rows in engine.bench(lm, spec, cases, watch):
                store.add(compared([row.to_dict() for row in rows]))
        except KeyboardInterrupt:
            note(
                "stopped; the rows of finished cases are there" if store.rows else "stopped before a case was finished"
            )
            raise


def _split(lm: Any, spec: Spec, cases: Sequence[Case], there: list[Row]) -> tuple[list[Row], list[Case]]:
    """Rows to keep and cases to run: a case runs unless each of its rows is there, measured the same way.

    A case whose rows are there in part runs whole, since ratios need engines that took turns.
    """
    if not there:
        return [], list(cases)
    from kcache.bench.report import blank_row
    from kcache_cli.bench.same import identity, same_settings

    found = {identity(row): row for row in there if row.get("status") != "failed"}
    left, replaced = [], set()
    for case in cases:
        wanted = [blank_row(lm, spec, case, engine, {}).to_dict() for engine in case.engines]
        rows = [found.get(identity(row)) for row in wanted]
        if all(row is not None and same_settings(row, want) for row, want in zip(rows, wanted, strict=True)):
            continue
        left.append(case)
        replaced |= {identity(row) for row in wanted}
    return [row for row in there if identity(row) not in replaced], left


def _check_measured(rows: Sequence[Row]) -> None:
    """Leave with an exit code that says why, if nothing could be measured."""
    from kcache_cli.exits import DOES_NOT_FIT, FAILED, USAGE, note

    statuses = [row.get("status") for row in rows]
    if not rows or "ok" in statuses:
        return
    codes = {"does not fit": DOES_NOT_FIT, "too long": USAGE}
    worst = next((status for status in codes if status in statuses), statuses[0])
    row = rows[statuses.index(worst)]
    note(f"nothing could be measured: {row['engine']} at a context of {row['ctx']:,}: {worst}: {row['reason']}")
    raise typer.Exit(codes.get(str(worst), FAILED))

"""``kcache eval needle``: what a model finds in a long text with full attention, and with N rows."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kcache.errors import InputError
from kcache_cli.evaluate.flags import ResultOptions, TopnOptions, check_context, in_float32, result_option
from kcache_cli.options import ModelOptions, PolicyOptions, Without, number_list, with_options
from kcache_cli.rows.formats import Row
from kcache_cli.watching import WatchOptions, watching

if TYPE_CHECKING:
    from kcache.evaluate.retrieval import Case, Spec

_SAME = ("kind", "ctx", "depth", "sample", "engine", "topn", "model", "dtype", "device", "text", "seed", "policy")


_asked = functools.partial(typer.Option, rich_help_panel="What to ask (lists are comma-separated)")


@with_options
def needle(
    context: typer.Context,
    model_options: ModelOptions,
    ctx: Annotated[
        str | None,
        _asked("--ctx", help="Lengths of the haystack, in tokens.", metavar="LIST", show_default="2k,4k,7k"),
    ] = None,
    depth: Annotated[
        str, _asked("--depth", help="Where the needle is: 0 is the beginning, 1 the end.", metavar="LIST")
    ] = "0,.25,.5,.75,1",
    kind: Annotated[
        str,
        _asked(
            "--kind",
            help="passkey; multikey, one of four needles of one form; common-words and variable-tracking, whose "
            "answer is spread over the whole text.",
            metavar="LIST",
        ),
    ] = "passkey,multikey",
    samples: Annotated[
        int, _asked("--samples", help="Haystacks per cell, each with other contents.", min=1, metavar="INTEGER")
    ] = 1,
    seed: Annotated[int, _asked("--seed", help="Another seed, other contents.", min=0, metavar="INTEGER")] = 0,
    text: Annotated[
        list[str] | None,
        _asked("--text", help="Text files to make haystacks of. Default: the Python reference.", metavar="FILE"),
    ] = None,
    plot: Annotated[
        str | None,
        result_option("--plot", help="Draw heat maps of depth × length here: .png, .svg, .pdf.", metavar="FILE"),
    ] = None,
    *,
    results: ResultOptions,
    watch_options: WatchOptions,
    topn_options: TopnOptions,
    policy_options: Annotated[PolicyOptions, Without(("topn", "offload", "ctx", "allow_overflow"))],
) -> None:
    r"""Hide needles in a long text and ask for them, with full attention and with N rows.

    The text is prefilled, which is exact. The question and the beginning of the reply are then fed token by token, as
    decode steps, so that what looks for the needle is TopN decoding. Each haystack is prefilled once, for all. Weights
    are float32 unless --dtype is given: in 16 bits rounding alone changes replies.

    A reply is right if it holds the key; what is asked of N rows is to find what full attention finds. common-words
    (the ten words of a list that appear most often) and variable-tracking (a chain of assignments) follow RULER: they
    need many rows at once, which is where TopN is weak.

    Rows, one per haystack and N, are written as they come, and each haystack's scores are told on standard error; the
    summary is a table of mean scores, and names each case
    in which N rows did worse than full attention.

    Examples
    --------
      kcache eval needle
      kcache eval needle --ctx 4k --kind common-words,variable-tracking \
          --samples 5
      kcache eval needle Qwen/Qwen3-8B --ctx 8k,32k \
          --output needles.jsonl --resume --plot needles.png
    """
    from kcache_cli.engine import engine_of, load_with_bar
    from kcache_cli.evaluate.needle_table import COMMAND, NAMES, draw, in_words, markdown
    from kcache_cli.evaluate.prose import read_prose
    from kcache_cli.evaluate.report import finish, warn_if_exact
    from kcache_cli.exits import note
    from kcache_cli.rows.chart import chart_file
    from kcache_cli.rows.progress import steps_bar
    from kcache_cli.rows.store import Store
    from kcache_cli.settings import load_settings

    settings = load_settings()
    model = in_float32(model_options, settings)
    policy, topns = topn_options.policy(policy_options, settings)
    target, form, there = results.destination(COMMAND, NAMES)
    chart = chart_file(plot)
    watch_options.check()
    model.check()

    from kcache.bench.env import surroundings
    from kcache.evaluate.retrieval import Spec, check_lengths, run_cases

    spec = Spec(
        read_prose(text),
        kinds=tuple(name.strip() for name in kind.split(",")),
        ctxs=number_list(ctx, "--ctx", Spec.ctxs, tokens=True),
        depths=_depths(depth),
        samples=samples,
        seed=seed,
        topns=topns,
        policy=policy,
    )
    engine = engine_of(context)
    check_context(engine, model, policy, max(spec.ctxs), "a question and its reply", 1)
    lm = load_with_bar(engine, model)
    left = _left(lm, spec, there)
    check_lengths(lm, spec, left)
    store = Store(target, form, markdown, _others(lm, spec, there, left))
    try:
        bar = steps_bar(len(left), "asking", lambda label: label.partition(":")[0])
        with watching(engine, lm, "eval needle", watch_options), bar as watch:
            answered = run_cases(lm, spec, left, lambda label: watch(label, 0), surroundings(lm.device))
            for number, (case, rows) in enumerate(zip(left, answered, strict=False), start=1):
                told = [row.to_dict() for row in rows]
                store.add(told)
                watch("", 1)
                note(f"{number} of {len(left)} · {case.label}: {in_words(told)}")
    finally:
        store.close()
        mine = _of(lm, spec, store.rows)
        if chart is not None and mine:
            draw(mine, chart)
    warn_if_exact(mine)
    finish(store, markdown(mine), len(spec.cases) - len(left), chart)


def _depths(text: str) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise InputError(f"--depth {text}: not numbers between 0 and 1; write 0,.5,1") from None


def _key(row: Row) -> str:
    """What makes two rows the same case, asked in the same way."""
    return repr([row.get(name) for name in _SAME])


def _keys(lm: Any, spec: Spec, cases: Sequence[Case]) -> dict[str, Case]:
    """The keys of all rows that cases have."""
    from kcache.evaluate.retrieval import blank_row

    return {_key(blank_row(lm, spec, case, each).to_dict()): case for case in cases for each in spec.contenders}


def _left(lm: Any, spec: Spec, there: Sequence[Row]) -> list[Case]:
    """Cases to run: all but those whose rows are there, made the same way."""
    found = {_key(row) for row in there}
    missing = {case for key, case in _keys(lm, spec, spec.cases).items() if key not in found}
    return [case for case in spec.cases if case in missing]


def _others(lm: Any, spec: Spec, there: Sequence[Row], left: Sequence[Case]) -> list[Row]:
    """Rows to keep: those of cases that are not run again, and of other runs."""
    again = _keys(lm, spec, left)
    return [row for row in there if _key(row) not in again]


def _of(lm: Any, spec: Spec, rows: Sequence[Row]) -> list[Row]:
    """The rows of this run, in its order."""
    found = {_key(row): row for row in rows}
    return [found[key] for key in _keys(lm, spec, spec.cases) if key in found]

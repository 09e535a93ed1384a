"""``kcache eval tasks``: benchmarks through lm-eval, with full attention and with N rows."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from kcache.errors import InputError
from kcache_cli.evaluate.flags import ResultOptions, TopnOptions, in_float32
from kcache_cli.options import ModelOptions, PolicyOptions, Without, with_options
from kcache_cli.rows.formats import Row
from kcache_cli.watching import WatchOptions, watching

_WITHOUT_LM_EVAL = "kcache eval tasks needs lm-eval, which is not installed: pip install 'kcache-llm[eval]'"


_asked = functools.partial(typer.Option, rich_help_panel="What to ask")


@with_options
def tasks(
    context: typer.Context,
    model_options: ModelOptions,
    tasks: Annotated[
        str,
        _asked(
            "--tasks",
            help="gsm8k, which is lm-eval's gsm8k_cot (its worked examples come with the task); bbh, all of "
            "BIG-Bench-Hard with worked examples, or bbh:NAME for one task of it; triviaqa; or any name lm-eval knows. "
            "Comma-separated.",
            metavar="LIST",
        ),
    ] = "gsm8k",
    data: Annotated[
        Path | None,
        _asked(
            "--data",
            help="A folder with gsm8k/test.jsonl or test.jsonl, bbh/NAME.json, triviaqa/validation.jsonl.",
            metavar="DIR",
            show_default="the hub",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        _asked("--limit", help="Questions per task, the first ones.", min=1, metavar="INTEGER", show_default="all"),
    ] = None,
    max_tokens: Annotated[
        int | None,
        _asked(
            "-n",
            "--max-tokens",
            help="Longest reply, where that is to be less than the task's own.",
            min=1,
            metavar="INTEGER",
            show_default="the task's",
        ),
    ] = None,
    *,
    results: ResultOptions,
    watch_options: WatchOptions,
    topn_options: TopnOptions,
    policy_options: Annotated[PolicyOptions, Without(("topn", "offload", "ctx", "allow_overflow"))],
) -> None:
    r"""Run benchmarks with full attention and with N rows, and compare the answers question by question.

    Prompts, worked examples and scoring are lm-eval's (the extra named eval); decoding is kcache's, greedy,
    one sequence at a time. A small model's scores are low whatever one does, so the answers are also compared one by
    one: same answer read out of the reply, same reply to the letter. Weights are float32 unless --dtype is given: in
    16 bits rounding alone changes many replies of a small model.

    The prompts of these tasks are about a thousand tokens, where a policy's own dense_below would keep decoding exact:
    it is 0 here, so that TopN is what is measured, and a run in which no step used it is warned about.

    Tasks that score given continuations (multiple choice, lambada) are run by decode steps, token by token, and so is
    the last token before the continuation. One forward over a whole continuation, as is usual, attends exactly and
    would show a perfect match under any policy. The answers of triviaqa are a few tokens long and hardly depend on the
    context: a match there is weak evidence.

    Rows, one per question and N, are written as they come; lm-eval judges them at the end.

    Examples
    --------
      kcache eval tasks --tasks gsm8k --limit 50
      kcache eval tasks --tasks gsm8k,bbh:snarks --data data \
          --output answers.jsonl --resume
      kcache eval tasks Qwen/Qwen3-8B --tasks gsm8k,bbh --topn 128 \
          --output answers.jsonl
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(_WITHOUT_LM_EVAL)
    from kcache.bench.env import surroundings
    from kcache.evaluate.forks import contenders
    from kcache.evaluate.questions import Answerer, row_key
    from kcache_cli.engine import engine_of, load_with_bar
    from kcache_cli.evaluate.report import finish, warn_if_exact
    from kcache_cli.evaluate.tasks_table import COMMAND, NAMES, markdown
    from kcache_cli.rows.progress import steps_bar
    from kcache_cli.rows.store import Store
    from kcache_cli.settings import load_settings

    settings = load_settings()
    model = in_float32(model_options, settings)
    policy, topns = topn_options.policy(policy_options, settings)
    names = [name.strip() for name in tasks.split(",")]
    target, form, there = results.destination(COMMAND, NAMES)
    watch_options.check()
    model.check()
    engine = engine_of(context)

    from kcache.evaluate.harness import evaluate, open_tasks

    with open_tasks(names, data) as found:
        lm = load_with_bar(engine, model)
        store = Store(target, form, markdown, there)

        def keep(rows: Sequence[Row]) -> None:
            store.replace([*store.rows, *rows], _is_judged)

        try:
            bar = steps_bar(None, "asking", lambda label: label)
            with watching(engine, lm, "eval tasks", watch_options), bar as watch:
                answerer = Answerer(lm, contenders(policy, topns), there, keep, watch, surroundings(lm.device))
                rows = evaluate(answerer, found, limit, max_tokens)
            judged = {row_key(row): row for row in rows}
            store.replace([judged.get(row_key(row), row) for row in store.rows], _is_judged)
        finally:
            store.close()
    warn_if_exact(rows)
    finish(store, markdown(rows), answerer.skipped)


def _is_judged(row: Row) -> bool:
    return bool(row["scores"])

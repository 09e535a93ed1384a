"""``kcache models --verify``: run the walk, show how far it is, and write its verdicts."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from kcache.errors import ModelNotFoundError, UnsupportedModelError
from kcache_cli.console import answers, plain_table
from kcache_cli.exits import FAILED, note
from kcache_cli.replace import replace
from kcache_cli.text import one_line

if TYPE_CHECKING:
    from kcache.verify.verdict import Verdict

_NAMED_TIMEOUT_S = 900.0


def verify_models(names: Sequence[str], form: str | None, output: Path | None, workers: int, trust: bool) -> int:
    """Judge the models and print what was found; returns the exit code.

    Raises
    ------
    ModelNotFoundError
        If a name is neither a model type nor leads to a model.
    """
    from kcache.verify.judge import model_types
    from kcache.verify.walk import Job, walk
    from kcache_cli.rows.progress import steps_bar

    known = model_types()
    jobs = [
        Job(name) if name in known and not Path(name).exists() else Job(name, True, trust, _NAMED_TIMEOUT_S)
        for name in names or known
    ]
    for job in jobs:
        if job.named:
            _check_there(job.name, known)
    order = {job.name: number for number, job in enumerate(jobs)}
    verdicts: list[Verdict] = []
    with steps_bar(len(jobs), "verified", lambda label: label) as watch:
        for verdict in walk(jobs, workers):
            verdicts.append(verdict)
            watch(f"{verdict.model_type}: {verdict.kind}", 1)
    verdicts.sort(key=lambda verdict: order[verdict.model_type])
    if output is not None:
        replace(output, page(verdicts).encode())
        note(f"verdicts written to {output}")
    else:
        _print(verdicts, form)
    return 0 if all(verdict.acceptable for verdict in verdicts) else FAILED


def _check_there(name: str, types: Sequence[str]) -> None:
    """Raise unless a name leads to a model; whether kcache serves that is for the verdict to say."""
    from kcache.loading import load_config

    try:
        load_config(name)
    except UnsupportedModelError:
        return
    except ModelNotFoundError as error:
        if "/" in name:
            raise
        near = difflib.get_close_matches(name, types, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "without a name all of them are verified"
        raise ModelNotFoundError(f"{name}: no such type of causal model, {hint}; as a model: {error}") from None


def page(verdicts: Sequence[Verdict]) -> str:
    """The page of docs that holds all verdicts."""
    import transformers

    from kcache.verify.table import markdown, summary

    return f"""# Which models kcache serves

Written by `kcache models --verify --output docs/support.md` (`make support`) with transformers
{transformers.__version__}; nobody edits it. For each entry of transformers' causal-LM mapping a tiny random model of
the real class, in fp32, goes through a prompt, 24 decode steps, a second turn and 6 more, and as a left-padded batch of
two through the same with 8 and 4: with stock's cache, and with a KCache that offloads every layer and whose TopN covers
the context. A run with two rows per head and step shows that the comparison can see a loss. `kcache models --verify
./my-model` does the same for a model of yours.

- **exact**: every layer is tiered; logits within 1e-4 of the largest, and the same greedy tokens.
- **exact, stock layers**: as exact, and the layers that the reason names keep the cache transformers makes for them.
- **refused**: loading, `attach` and `KCache` raise a `KCacheError` with the reason.

{summary(verdicts)}

{markdown(verdicts)}"""


def _print(verdicts: Sequence[Verdict], form: str | None) -> None:
    from kcache.verify.table import markdown, summary
    from kcache_cli.rows.formats import json_list

    if form == "json":
        print(json_list([verdict.to_dict() for verdict in verdicts]), end="")
    elif form == "md":
        print(markdown(verdicts), end="")
    else:
        _print_table(verdicts)
        print(summary(verdicts))


def _print_table(verdicts: Sequence[Verdict]) -> None:
    table = plain_table()
    table.add_column("model", overflow="fold")
    table.add_column("verdict", no_wrap=True)
    table.add_column("tiered", justify="right")
    table.add_column("Δlogit", justify="right")
    table.add_column("reason", overflow="fold")
    for verdict in verdicts:
        layers = f"{verdict.tiered}/{verdict.layers}" if verdict.layers else ""
        difference = "" if verdict.difference is None else f"{verdict.difference:.0e}"
        table.add_row(one_line(verdict.model_type), verdict.kind, layers, difference, one_line(verdict.reason))
    answers().print(table)

"""``kcache eval``: what decoding with N rows costs in answers; one command per way of asking."""

from __future__ import annotations

import typer

from kcache_cli.evaluate import fidelity, needle, tasks
from kcache_cli.register import add

app = typer.Typer(
    help="Measure what decoding with N rows costs in answers, beside full attention.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

add(app, "fidelity", fidelity.fidelity)
add(app, "needle", needle.needle)
add(app, "tasks", tasks.tasks)

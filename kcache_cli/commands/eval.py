"""``kcache eval``: what decoding with N rows costs in answers; one command per way of asking."""

from __future__ import annotations

from typer.core import TyperGroup

from kcache_cli.register import Commands

eval = TyperGroup(
    name="eval",
    help="Measure what decoding with N rows costs in answers, beside full attention.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
eval.commands = Commands("kcache_cli.evaluate", ("fidelity", "needle", "tasks"))

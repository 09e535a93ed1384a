"""The ``kcache`` program: its commands, and how errors leave it.

Nothing here imports torch or a command that is not wanted; commands import torch when they run.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from kcache import __version__
from kcache_cli import exits
from kcache_cli.ending import SIGNALS, heard
from kcache_cli.ranks import check_command, speaks
from kcache_cli.register import Commands
from kcache_cli.variables import warn_of_misspelled

_NAMES = ("chat", "generate", "bench", "eval", "tune", "inspect", "plan", "doctor", "models", "pull", "config")


class Program(TyperGroup):
    """A command group that turns every error into one line and an exit code."""

    def __init__(self, **attrs: Any) -> None:
        super().__init__(**attrs)
        self.commands = Commands("kcache_cli.commands", _NAMES, hidden=("docs",))

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, without making them."""
        return list(self.commands)

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Run, report, exit."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
        signals = SIGNALS if speaks() else ()  # processes that follow rank 0 end with it
        with heard(signals, to_the_end=True) as came:
            try:
                result = super().main(args, prog_name, complete_var, False, windows_expand_args, **extra)
                sys.stdout.flush()
                code = result if isinstance(result, int) else 0
            except BaseException as error:
                code = exits.FAILED if came else _code_of(error)
            if came and code:  # whatever went wrong since, with a terminal that is gone for example
                _silence_output()
                code = exits.SIGNALLED + came[0]
        raise SystemExit(code)


def _code_of(error: BaseException) -> int:
    """Report what ended a command, as far as that is to be told; returns the exit code."""
    if isinstance(error, BrokenPipeError):
        _silence_output()
        return exits.FAILED
    if isinstance(error, KeyboardInterrupt):
        return exits.INTERRUPTED
    if not isinstance(error, Exception) or (exits.debugging() and not isinstance(error, typer.TyperException)):
        raise error
    return _report(error)


def _report(error: Exception) -> int:
    if isinstance(error, typer.TyperException) and not error.format_message():
        return error.exit_code  # a group without a command: its help has been printed
    context = getattr(error, "ctx", None)
    program = context.command_path if context is not None else "kcache"
    code = exits.report(error, program)
    if context is not None:
        print(f"try: {program} --help", file=sys.stderr)
    return code


def _silence_output() -> None:
    """Let the interpreter shut down without complaint when the reader of our output is gone."""
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except (OSError, ValueError):
        return


app = typer.Typer(
    name="kcache",
    cls=Program,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"kcache {__version__}")
        raise typer.Exit


_EXAMPLES = """\
Examples:

kcache chat  [dim]talk to the demo model, fetched on first use[/dim]

kcache chat -f report.txt  [dim]... about a long document[/dim]

kcache generate -i in.jsonl -o out.jsonl  [dim]many prompts, safe to kill[/dim]

kcache bench  [dim]how fast it is here, beside transformers[/dim]
"""


@app.callback(epilog=_EXAMPLES)
def kcache(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    """Long-context inference for Hugging Face models: K stays in device memory, V waits in host RAM."""
    check_command(context.invoked_subcommand)
    if speaks():
        warn_of_misspelled()


def main() -> None:
    """Run the program (the console script)."""
    if sys.stdout is None:  # closed by whoever started us
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    app(sys.argv[1:] or ["--help"], prog_name="kcache")

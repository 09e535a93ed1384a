"""The command reference in Markdown, made from the commands; ``python -m kcache_cli docs`` writes it."""

from __future__ import annotations

import inspect
import re
import textwrap
from typing import Any

import typer

_HEAD = """\
# Commands

Made by `kcache docs` from the commands themselves; do not edit.

A flag that is not given takes its value from a `KCACHE_*` variable, then from the settings file (`kcache config`), then
the default shown here.

Exit codes: 0 done, 1 unknown or unsupported model (and any other failure), 2 wrong usage (a bad value, unreadable
input, unwritable output), 3 does not fit in memory, 130 stopped with Ctrl-C, 143 by SIGTERM, 129 by SIGHUP (a terminal
that is closed). Messages go to standard error, one line each; `KCACHE_DEBUG=1` adds tracebacks.
"""


def reference() -> str:
    """Return the text of docs/cli.md."""
    from kcache_cli.app import app

    program = typer.main.get_command(app)
    assert isinstance(program, typer.core.TyperGroup)
    parts = [_HEAD]
    for name, command in program.commands.items():
        if not command.hidden:
            parts += _commands(name, command)
    parts.append(_settings())
    return "\n".join(parts)


def _commands(name: str, command: Any) -> list[str]:
    """A section, or one for each command of a group."""
    if isinstance(command, typer.core.TyperGroup):
        return [part for under, each in command.commands.items() for part in _commands(f"{name} {under}", each)]
    return [_command(name, command)]


def _command(name: str, command: Any) -> str:
    lines = [f"## kcache {name}", ""]
    for block in inspect.cleandoc(command.help or "").split("\n\n"):
        if block.startswith("Examples:"):
            lines += ["```sh", textwrap.dedent(block.partition("\n")[2]), "```", ""]
        else:
            lines += [block, ""]
    lines += ["| | |", "|---|---|"]
    context = typer.Context(command)
    lines += [_row(param, context) for param in command.params if param.name != "help"]
    return "\n".join([*lines, ""])


def _row(param: Any, context: typer.Context) -> str:
    names, text = param.get_help_record(context)
    text, default, rest = text.partition("[default: ")
    if default:
        value = rest.removesuffix("]").split("; ")[0]
        text += f"Default: {value.removeprefix('(').removesuffix(')')}."
    else:
        text = re.sub(r"\[\d+<=.*\]$", "", text)
    cells = [cell.strip().replace("  ", " ").replace("|", "\\|") for cell in (f"`{names}`", text)]
    return f"| {' | '.join(cells)} |"


def _settings() -> str:
    from kcache_cli.settings import Settings

    lines = ["## Settings", "", "| file | variable | what it is |", "|---|---|---|"]
    for name, field in Settings.model_fields.items():
        lines.append(f"| `{name}` | `KCACHE_{name.upper()}` | {field.description} |")
    lines += [
        "",
        "`KCACHE_CONFIG` names the settings file, `KCACHE_HOME` the folder for models and chat history, "
        "`KCACHE_DEBUG=1` shows tracebacks.",
        "",
    ]
    return "\n".join(lines)

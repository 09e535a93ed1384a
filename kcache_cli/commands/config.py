"""``kcache config``: show what the settings are and where they come from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from kcache.errors import InputError
from kcache_cli.exits import note

_EXAMPLES: dict[str, object] = {
    "temperature": 0.7,
    "top_p": 0.9,
    "top_k": 40,
    "seed": 0,
    "max_tokens": 512,
    "system": "Answer briefly.",
    "topn": 128,
    "offload": "auto",
    "kv_budget": "8GiB",
    "resident_layers": 2,
    "dense_layers": 2,
    "k_bits": "auto",
    "v_bits": 16,
    "backend": "auto",
    "graph": "auto",
    "ctx": 8192,
    "batch_size": 8,
    "theme": "kcache-light",
    "keys": "pause=p",
}
"""Values for the template where nothing is built in, so that any line can be used as it stands."""


def config(
    init: Annotated[bool, typer.Option("--init", help="Write a settings file to fill in, if there is none.")] = False,
    path: Annotated[bool, typer.Option("--path", help="Print the settings file's path only.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the settings as JSON.")] = False,
) -> None:
    """Show the settings, and where each comes from.

    A flag goes before an environment variable (KCACHE_TOPN=64), a variable before the settings file, the file before
    what is built in. KCACHE_CONFIG names another settings file.

    Examples
    --------
      kcache config
      kcache config --init
      KCACHE_TOPN=64 kcache config --json
    """
    from kcache.policy import Policy
    from kcache_cli import paths, settings
    from kcache_cli.tui.start import check_theme, parse_keys

    file = paths.config_file()
    if path:
        print(file)
        return
    if init:
        _write_template(file)
        note(f"wrote {file}")
        return
    values = settings.load_settings()
    check_theme(values.theme)
    parse_keys(values.keys)
    _, in_file = settings.read_file(file)
    rows = []
    for name in settings.Settings.model_fields:
        given = getattr(values, name)
        value = getattr(Policy, name, None) if given is None else given  # None: kcache or the model chooses
        rows.append((name, value, settings.source_of(name, in_file)))
    if as_json:
        found = {name: {"value": value, "source": source} for name, value, source in rows}
        print(json.dumps({"file": str(file), "settings": found}, indent=2))
        return
    _print_table(file, rows)


def _print_table(file: Path, rows: list[tuple[str, Any, str]]) -> None:
    from kcache_cli.console import answers, plain_table
    from kcache_cli.settings import Settings

    table = plain_table()
    for heading in ("setting", "value", "from", "what it is"):
        table.add_column(heading, overflow="fold")
    for name, value, source in rows:
        shown = "-" if value is None else str(value)
        style = "dim" if source == "built-in" else None
        table.add_row(name, shown, source, Settings.model_fields[name].description or "", style=style)
    console = answers()
    console.print(f"{file}{'' if file.exists() else ' (does not exist)'}", soft_wrap=True)
    console.print()
    console.print(table)


def _write_template(file: Path) -> None:
    from kcache_cli.settings import Settings

    lines = ["# Settings of kcache. Flags and KCACHE_* variables go before these.", ""]
    for name, field in Settings.model_fields.items():
        example = json.dumps(_EXAMPLES.get(name, field.default))
        lines.append(f"# {name} = {example:<12} # {field.description}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as new:
            new.write("\n".join(lines) + "\n")
    except FileExistsError:
        raise InputError(f"{file} exists already; edit it, or remove it first") from None
    except OSError as error:
        raise InputError(f"cannot write {file}: {error.strerror or error}") from None

"""``kcache models``: the models that can be named, which are on this machine, and what kcache can do for any model."""

from __future__ import annotations

import json
from typing import Annotated, Literal

import typer

Form = Literal["md", "json"]


def models(
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL]...",
            help="With --verify: a model type (llama), a hub id, a folder, or a config.json. Default: every type.",
            show_default=False,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array.")] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare tiny models, or the ones named, with stock transformers.")
    ] = False,
    form: Annotated[
        Form | None, typer.Option("-o", "--format", help="Verdicts as md or json. Default: a table.", metavar="FORMAT")
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", help="Write the page of verdicts here, as Markdown.", metavar="FILE")
    ] = None,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Verdicts found side by side.", metavar="N")] = 2,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run Python code that comes with a named model.")
    ] = False,
) -> None:
    """List the demo model and the models in the Hugging Face cache.

    Any other Hugging Face causal language model can be named too, by its hub id or its folder. With --verify, each
    architecture that transformers knows is made as a tiny random model and put through a prompt, decode steps, a padded
    batch and a second turn, with a KCache whose TopN covers the context and with stock's cache. A named model is run
    with its own weights where it is small, and as a tiny model of its config where it is not. Exit code 1 if kcache is
    wrong about any of them.

    Examples
    --------
      kcache models
      kcache models --verify ./my-model
      kcache models --verify llama gemma3_text -o md
      kcache models --verify --output docs/support.md
    """
    from kcache.errors import InputError

    if as_json and form == "md":
        raise InputError("--json and -o md name two formats; leave one out")
    if verify:
        from kcache_cli.rows.store import check_file
        from kcache_cli.verify import verify_models

        chosen = "json" if as_json else form
        target = check_file("--output", output)
        if target is not None and (chosen == "json" or target.suffix.lower() not in ("", ".md", ".txt")):
            raise InputError(f"--output {output}: is a page of Markdown; end its name in .md, leave out -o and --json")
        raise typer.Exit(verify_models(names or [], chosen, target, workers, trust_remote_code))
    if names:
        raise InputError(f"kcache models lists them all; to check {names[0]}, write kcache models --verify {names[0]}")
    if output is not None or form == "md":
        raise InputError("-o md and --output go with --verify")
    _list_models(as_json or form == "json")


def _list_models(as_json: bool) -> None:
    import kcache

    entries = kcache.known_models()
    if as_json:
        rows = [
            {
                "name": entry.name,
                "kind": entry.kind,
                "ready": entry.ready,
                "size_bytes": entry.size_bytes,
                "path": str(entry.path) if entry.path is not None else None,
                "description": entry.description,
            }
            for entry in entries
        ]
        print(json.dumps(rows, indent=2))
        return

    from kcache_cli.console import answers, plain_table
    from kcache_cli.text import size

    table = plain_table()
    table.add_column("model", overflow="fold")
    table.add_column("on this machine")
    table.add_column("size", justify="right")
    table.add_column("what it is", overflow="fold")
    for entry in entries:
        here = "yes" if entry.ready else "no; fetched on first use"
        table.add_row(entry.name, here, size(entry.size_bytes), entry.description)
    answers().print(table)

"""``kcache models``: the models that can be named, and which are on this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def models(as_json: Annotated[bool, typer.Option("--json", help="Print a JSON array.")] = False) -> None:
    """List the demo model and the models in the Hugging Face cache.

    Any other Hugging Face causal language model can be named too, by its hub id or its folder.

    Examples
    --------
      kcache models
      kcache models --json
    """
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
    from rich.console import Console
    from rich.table import Table

    from kcache_cli.text import size

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("model", overflow="fold")
    table.add_column("on this machine")
    table.add_column("size", justify="right")
    table.add_column("what it is", overflow="fold")
    for entry in entries:
        here = "yes" if entry.ready else "no; fetched on first use"
        table.add_row(entry.name, here, size(entry.size_bytes), entry.description)
    Console(markup=False, emoji=False, highlight=False).print(table)

"""``kcache docs``: write the command reference from the commands themselves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kcache_cli.exits import FAILED, note


def docs(
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write here instead of standard output.")
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only say whether FILE is up to date.")] = False,
) -> None:
    """Write docs/cli.md.

    Examples
    --------
      kcache docs -o docs/cli.md
      kcache docs -o docs/cli.md --check
    """
    from kcache_cli.reference import reference

    text = reference()
    if output is None:
        print(text, end="")
        return
    if not check:
        output.write_text(text, encoding="utf-8")
        note(f"wrote {output}")
        return
    if not output.exists() or output.read_text(encoding="utf-8") != text:
        note(f"{output} is stale; run `kcache docs -o {output}`")
        raise typer.Exit(FAILED)

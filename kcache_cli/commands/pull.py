"""``kcache pull``: fetch a model ahead of use."""

from __future__ import annotations

from typing import Annotated

import typer

from kcache_cli.completion import complete_model
from kcache_cli.exits import note


def pull(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="smollm2 or a hub id.", autocompletion=complete_model)
    ] = "smollm2",
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="REV", help="Branch, tag or commit on the hub.")
    ] = None,
    gguf_file: Annotated[
        str | None, typer.Option("--gguf-file", metavar="NAME", help="A GGUF file in the model's repository.")
    ] = None,
) -> None:
    """Fetch a model without running it, and print the folder it is in.

    A fetch that was interrupted is taken up again; a damaged one is detected and never used.

    Examples
    --------
      kcache pull smollm2
      kcache pull Qwen/Qwen3-0.6B --revision main
    """
    import kcache
    from kcache_cli.console import download_bar

    with download_bar(f"fetching {model}") as progress:
        folder = kcache.pull(model, progress, revision=revision, gguf_file=gguf_file)
    note(f"{model} is ready")
    print(folder)

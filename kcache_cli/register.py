"""Putting a function on a command group, its docstring as its help."""

from __future__ import annotations

import inspect
from collections.abc import Callable

import typer


def add(group: typer.Typer, name: str, function: Callable[..., None], *, hidden: bool = False) -> None:
    """Add a command; its docstring is its help text, of which only the examples keep their lines."""
    text, _, examples = inspect.cleandoc(function.__doc__ or "").partition("\n\nExamples\n--------\n")
    paragraphs = [part.replace("\n", " ") for part in text.split("\n\n")]
    if examples:
        paragraphs.append(f"Examples:\n{examples}")
    group.command(name, help="\n\n".join(paragraphs), hidden=hidden)(function)

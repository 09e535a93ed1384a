"""Commands, each made when it is first wanted: a third of the time to start would go on the flags of the others."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, MutableMapping
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperCommand, TyperGroup


class Commands(MutableMapping[str, Any]):
    """The commands of a group by name; command ``x`` is ``x`` in module ``x`` of a package.

    That is a function, whose docstring is its help, or a group.
    """

    def __init__(self, package: str, names: tuple[str, ...], hidden: tuple[str, ...] = ()) -> None:
        self._package, self._hidden = package, hidden
        self._made: dict[str, Any] = dict.fromkeys((*names, *hidden))

    def __getitem__(self, name: str) -> Any:
        made = self._made[name]
        if made is None:
            found = getattr(import_module(f"{self._package}.{name}"), name)
            made = found if isinstance(found, TyperGroup) else command(name, found, hidden=name in self._hidden)
            self._made[name] = made
        return made

    def __setitem__(self, name: str, made: Any) -> None:
        self._made[name] = made

    def __delitem__(self, name: str) -> None:
        del self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._made)

    def __len__(self) -> int:
        return len(self._made)


def command(name: str, function: Callable[..., None], *, hidden: bool = False) -> TyperCommand:
    """Make a command; the function's docstring is its help text, of which only the examples keep their lines."""
    text, _, examples = inspect.cleandoc(function.__doc__ or "").partition("\n\nExamples\n--------\n")
    paragraphs = [part.replace("\n", " ") for part in text.split("\n\n")]
    if examples:
        paragraphs.append(f"Examples:\n{examples}")
    alone = typer.Typer(add_completion=False, rich_markup_mode="rich")
    alone.command(name, help="\n\n".join(paragraphs), hidden=hidden)(function)
    made = typer.main.get_command(alone)
    assert isinstance(made, TyperCommand)
    return made

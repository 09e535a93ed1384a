"""Printing what a model says without letting it drive the terminal."""

from __future__ import annotations

import json

import pytest

from kcache_cli.text import json_line, one_line, printable, size


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain\n\ttext", "plain\n\ttext"),
        ("\x1b[31mred\x1b[0m", "[31mred[0m"),
        ("\x1b]0;title\x07", "]0;title"),
        ("a\rb\x08c\x7f", "abc"),
        ("\x9b31m\x85", "31m"),
        ("safe\u202egnp.exe\u2066x\u2069", "safegnp.exex"),
        ("[bold]not markup[/bold] :smile:", "[bold]not markup[/bold] :smile:"),
        ("naïve 漢字 👩‍👩‍👧 עברית", "naïve 漢字 👩‍👩‍👧 עברית"),
        ("half \ud800 pair", "half  pair"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
    printable(text).encode("utf-8")


@pytest.mark.parametrize(
    "text", ["a\nb", "\x1b[31m", "\x9b1m", "\u2028\u2029\u0085", "\u202e", "\ud800", "漢字", '"\\']
)
def test_json_line_is_one_safe_line_and_loses_nothing(text: str) -> None:
    line = json_line({"text": text})
    assert len(line.splitlines()) == 1
    assert printable(line) == line
    assert json.loads(line) == {"text": text}


def test_json_line_keeps_ordinary_letters_readable() -> None:
    assert json_line("漢字 é") == '"漢字 é"'


def test_json_line_refuses_nan() -> None:
    with pytest.raises(ValueError, match="JSON"):
        json_line(float("nan"))


def test_one_line() -> None:
    assert one_line("a\n  b\x1b\tc\n") == "a b c"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**20, "5.0 MiB"), (2**31, "2.00 GiB")]
)
def test_size(count: int, text: str) -> None:
    assert size(count) == text

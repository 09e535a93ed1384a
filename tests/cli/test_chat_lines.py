"""Where the lines of a chat break at a terminal."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from kcache_cli.chat.figures import Figures, between_figures
from kcache_cli.chat.writer import AnswerWriter, Folding
from kcache_cli.console import put

FIGURES = Figures(4800, 4800, 24, 18500.0, 13.8, 106_300_000, 88_000_000, 111_100_000, 1_220_000.0)


@pytest.mark.parametrize("width", [40, 60, 80, 110, 139, 140])
def test_the_footer_breaks_between_figures_alone(width: int) -> None:
    footer = FIGURES.footer(host_only=True)
    lines = between_figures(footer, width).split("\n")
    assert " · ".join(lines) == footer.replace("\n", " · ")
    assert all(len(line) <= width or " · " not in line for line in lines)
    assert between_figures(footer, None) == footer
    assert (len(lines) == 2) == (max(map(len, footer.split("\n"))) <= width)


def folded(text: str, width: int, size: int = 1) -> str:
    folding = Folding(lambda: width)
    return "".join(folding.fold(text[at : at + size]) for at in range(0, len(text), size)) + folding.rest()


@pytest.mark.parametrize(("is_terminal", "gap"), [(True, "\n"), (False, " ")])
def test_remarks_are_wrapped_at_words_for_a_terminal_alone(is_terminal: bool, gap: str) -> None:
    file = io.StringIO()
    put(
        Console(file=file, width=20, force_terminal=is_terminal, color_system=None), "saved to /a/rather/long/name.json"
    )
    assert file.getvalue() == f"saved to{gap}/a/rather/long/name.json\n"


@pytest.mark.parametrize("size", [1, 3, 100])
def test_lines_of_an_answer_end_between_words(size: int) -> None:
    text = "the sea is a vast\nand old place 漢字漢字 said to be"
    lines = "the sea is", "a vast", "and old", "place 漢字漢字 said", "to be"  # the terminal breaks the fourth itself
    assert folded(text, 10, size) == "\n".join(lines)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("0123456789 \nabc", "0123456789\nabc"),  # no line is empty for a space that nobody sees
        ("see https://a.b/c/d/e/f now", "see\nhttps://a.b/c/d/e/f\nnow"),  # whole, to be copied
        ("  - one two\n  - six", "  - one\ntwo\n  - six"),
        ("a\tbcd", "a\nbcd"),
        ("```x``` one two", "```x```\none two"),
        ("```py\nx = 1 + 2 + 3 + 4\n```\nas you see here", "```py\nx = 1 + 2 + 3 + 4\n```\nas you see\nhere"),
        ("été e\u0301te\u0301 été", "été e\u0301te\u0301\nété"),
    ],
)
def test_where_lines_of_an_answer_do_not_end(text: str, shown: str) -> None:
    assert folded(text, 10) == shown


def test_a_terminal_that_is_made_narrower_has_shorter_lines() -> None:
    width = 20
    folding = Folding(lambda: width)
    shown = folding.fold("one two three four five ")
    width = 10
    assert shown + folding.fold("six seven eight ") + folding.rest() == "one two three four\nfive six\nseven\neight "


def test_a_word_without_end_is_shown_all_the_same() -> None:
    assert Folding(lambda: 10).fold("x" * 35) == "x" * 30


def test_what_is_piped_is_what_was_said(capsys: pytest.CaptureFixture[str]) -> None:
    answer = AnswerWriter()
    for piece in ("word " * 50, "wo", "rd\t\t ", "\x1b[2Jx"):
        answer.write(piece)
    assert capsys.readouterr().out == "word " * 50 + "word\t\t [2Jx"
    answer.end()
    assert capsys.readouterr().out == "\n"

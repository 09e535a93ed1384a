"""Where the lines of a chat break at a terminal."""

from __future__ import annotations

import pytest

from kcache_cli.chat.figures import Figures, between_figures
from kcache_cli.chat.writer import Folding

FIGURES = Figures(4800, 4800, 24, 18500.0, 13.8, 106_300_000, 88_000_000, 111_100_000, 1_220_000.0)


@pytest.mark.parametrize("width", [40, 60, 80, 110, 139, 140])
def test_the_footer_breaks_between_figures_alone(width: int) -> None:
    footer = FIGURES.footer(host_only=True)
    lines = between_figures(footer, width).split("\n")
    assert " · ".join(lines) == footer.replace("\n", " · ")
    assert all(len(line) <= width or " · " not in line for line in lines)
    assert between_figures(footer, None) == footer
    assert (len(lines) == 2) == (max(map(len, footer.split("\n"))) <= width)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_no_line_of_an_answer_begins_with_the_space_that_ended_the_one_before(size: int) -> None:
    text = "the sea is a vast\nand old place 漢字漢字 said to be"
    fold = Folding(10).fold
    shown = "".join(fold(text[at : at + size]) for at in range(0, len(text), size))
    lines = "the sea is", "a vast", "and old place 漢字漢字 said to", "be"  # the terminal breaks the third itself
    assert shown == "\n".join(lines)
    assert shown.replace("\n", " ") == text.replace("\n", " ")

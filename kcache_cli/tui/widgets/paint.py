"""Colours of heat: cells of the map, the legend, words of the context."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from kcache_cli.tui.look import Look
from kcache_cli.tui.model.passage import Piece
from kcache_cli.tui.palette import RAMP_STEPS

_TAB = "  "


def shade(value: float, look: Look) -> str:
    """The sign for a value from 0 to 1 where colour cannot say it; what is not nothing is seen."""
    signs = look.signs.shades
    at = 0 if value <= 0 else 1 + min(int(value * (len(signs) - 1)), len(signs) - 2)
    return signs[at]


def colour(value: float, ramp: Sequence[str]) -> str:
    """The colour for a value from 0 to 1."""
    return ramp[min(int(value * RAMP_STEPS), RAMP_STEPS - 1)]


def legend(look: Look, width: int, low: str, high: str) -> Text:
    """The scale with the words for its ends."""
    palette = look.palette
    text = Text.assemble((f"{low} ", palette.muted))
    ramp = palette.ramp
    for at in range(width):
        value = (at + 0.5) / width
        if look.halves:
            text.append(" ", f"on {colour(value, ramp)}")
        else:
            text.append(shade(value, look), palette.text)
    text.append(f" {high}", palette.muted)
    return text


def words(pieces: Sequence[Piece], look: Look, roles: bool = True) -> Text:
    """Tokens as running text; those that were picked stand out by how many heads picked them, special ones as well."""
    palette = look.palette
    ramp = palette.ramp
    text = Text(no_wrap=False)
    for piece in pieces:
        style = (palette.prompt if piece.role == "prompt" else palette.answer) if roles else palette.text
        if piece.special:
            style = palette.faint
        shown = piece.text.replace("\t", _TAB)
        if piece.weight <= 0:
            text.append(shown, style)
        elif look.colour and not look.ascii:
            text.append(shown, _lit(piece.weight, look, ramp))
        else:
            text.append(shown, "bold reverse" if piece.weight >= 0.5 else "bold underline")
    return text


def _lit(weight: float, look: Look, ramp: Sequence[str]) -> str:
    value = min(1.0, weight) ** 0.4
    back = colour(value, ramp)
    light = sum(int(back[at : at + 2], 16) * part for at, part in ((1, 0.3), (3, 0.59), (5, 0.11)))
    return f"{'#101010' if light > 120 else '#f4f4f4'} on {back}"


def flat(pieces: Sequence[Piece]) -> list[Piece]:
    """The same pieces for a single line: line breaks become spaces."""
    return [
        Piece(" ".join(piece.text.split("\n")), piece.position, piece.role, piece.special, piece.weight)
        for piece in pieces
    ]

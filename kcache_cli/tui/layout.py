"""How the panels share the terminal: which are shown, and how high their rows are."""

from __future__ import annotations

from dataclasses import dataclass

PANELS = ("memory", "link", "heat", "layers", "speed", "words")
_ROOMY = (100, 32)
_HEAT_AROUND = 6
"""Lines of the heat panel beside its cells: frame, modes, axis, what is under the cursor."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Heights of the three rows of panels, 0 for a row that is not shown, and the panels that are."""

    top: int
    middle: int
    low: int
    shown: frozenset[str]


def arrange(
    width: int,
    height: int,
    lines: int,
    *,
    chosen: str = "heat",
    maximised: str | None = None,
    talking: bool = False,
    writing: bool = False,
) -> Layout:
    """Share ``height`` lines.

    Parameters
    ----------
    width, height : int
        Of what there is for panels.
    lines : int
        Lines that the heat map's cells would fill.
    chosen : str
        The panel that has the middle of a small terminal.
    maximised : str or None
        The panel that has everything.
    talking : bool
        The text is a conversation of this process, which wants more room.
    writing : bool
        The user writes to it just now, and wants to see it, whatever was asked for last.
    """
    if maximised is not None:
        is_top, is_low = maximised in ("memory", "link"), maximised in ("layers", "speed", "words")
        middle = 0 if is_top or is_low else height
        return Layout(height * is_top, middle, height * is_low, frozenset({maximised}))
    if width < _ROOMY[0] or height < _ROOMY[1] - 2:
        return _small(height, "words" if writing else chosen, talking)
    top = 9 if height >= 38 else 8
    if talking:
        low = max(9, height // 3)
        beside = "layers" if chosen == "layers" else "speed"
        return Layout(top, height - top - low, low, frozenset({"memory", "link", "heat", beside, "words"}))
    wanted = lines + _HEAT_AROUND
    low = max(7, height - top - wanted)
    if height - top - low > wanted + 4:
        low = height - top - wanted
    return Layout(top, height - top - low, low, frozenset(PANELS))


def _small(height: int, chosen: str, talking: bool) -> Layout:
    top = 5 if height >= 16 else 0
    tops = {"memory", "link"} if top else set()
    rest = height - top
    if talking and rest >= 12:
        low = max(6, rest * 2 // 5)
        below = chosen if chosen in ("layers", "speed") else "words"
        return Layout(top, rest - low, low, frozenset({*tops, "heat", below}))
    if chosen in ("layers", "speed", "words"):
        return Layout(top, 0, rest, frozenset({*tops, chosen}))
    if talking:
        return Layout(0, 0, height, frozenset({"words"}))
    return Layout(top, rest, 0, frozenset({*tops, "heat"}))

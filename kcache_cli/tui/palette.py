"""Colours and signs: one palette for dark and one for light themes, the heat scale, and what stands in for both.

Everything the panels draw beside text comes from here, so that a theme, NO_COLOR and ASCII mode are each one choice.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from textual.theme import Theme

RAMP_STEPS = 40


@dataclass(frozen=True)
class Palette:
    """Colours as ``#rrggbb``; ``heat`` are the anchors of the scale, from nothing to everything."""

    dark: bool
    background: str
    text: str
    muted: str
    faint: str
    accent: str
    good: str
    warn: str
    bad: str
    weights: str
    k: str
    v: str
    overhead: str
    hot: str
    activations: str
    other: str
    free: str
    host_v: str
    ghost: str
    h2d: str
    d2h: str
    prompt: str
    answer: str
    cursor: str
    on_bar: str
    heat: tuple[str, ...]

    @cached_property
    def ramp(self) -> list[str]:
        """The heat scale in :data:`RAMP_STEPS` colours."""
        return ramp(self.heat)


DARK = Palette(
    dark=True,
    background="#0d1017",
    text="#d8deea",
    muted="#7f8aa3",
    faint="#3a4358",
    accent="#5ad1c8",
    good="#69d58c",
    warn="#f0b64c",
    bad="#ff6b6b",
    weights="#6d7b99",
    k="#4b9bff",
    v="#9a7cff",
    overhead="#f0b64c",
    hot="#f07f5a",
    activations="#69d58c",
    other="#39435a",
    free="#1b2130",
    host_v="#2fc4b2",
    ghost="#8a96b0",
    h2d="#38c6d9",
    d2h="#e879b9",
    prompt="#8fb8ff",
    answer="#d8deea",
    cursor="#ffffff",
    on_bar="#0b0e14",
    heat=("#141925", "#25204f", "#5b1f78", "#a52c60", "#e0523f", "#f8952c", "#fbd44f", "#fffbe3"),
)
LIGHT = Palette(
    dark=False,
    background="#fbfaf7",
    text="#22262f",
    muted="#6d7382",
    faint="#c9c8c2",
    accent="#0b7f78",
    good="#1d8a4a",
    warn="#a86a00",
    bad="#c22f2f",
    weights="#8d97aa",
    k="#2468d6",
    v="#7146d1",
    overhead="#c98a12",
    hot="#d2513f",
    activations="#2f9a5a",
    other="#c4c9d4",
    free="#eceae4",
    host_v="#128f83",
    ghost="#8a909c",
    h2d="#0f86a5",
    d2h="#b8397f",
    prompt="#2458b0",
    answer="#22262f",
    cursor="#000000",
    on_bar="#ffffff",
    heat=("#f1efe9", "#fbe3b6", "#f8bd74", "#ee8a4e", "#d2513f", "#9b2850", "#5a1850", "#22092f"),
)


def ramp(anchors: tuple[str, ...]) -> list[str]:
    """Colours between anchors, evenly."""
    known = np.array([[int(anchor[at : at + 2], 16) for at in (1, 3, 5)] for anchor in anchors])
    places = np.linspace(0, len(anchors) - 1, RAMP_STEPS)
    mixed = np.stack([np.interp(places, np.arange(len(anchors)), known[:, part]) for part in range(3)], 1)
    return [f"#{red:02x}{green:02x}{blue:02x}" for red, green, blue in np.rint(mixed).astype(int)]


@dataclass(frozen=True)
class Signs:
    """The characters that pictures are made of.

    ``shades`` is a scale from nothing to full for a whole cell; ``half`` is the upper half block, empty where a cell
    can show one value only.
    """

    half: str
    shades: str
    eighths: str
    bars: str
    hatch: str
    square: str
    up: str
    down: str
    mark: str
    play: str
    pause: str
    live: str
    knob: str
    line: str
    full: str
    half_line: str
    dot: str
    quote: tuple[str, str]


UNICODE = Signs(
    "▀",
    " ░▒▓█",
    " ▏▎▍▌▋▊▉█",
    " ▁▂▃▄▅▆▇█",
    "╱",
    "■",
    "▲",
    "▼",
    "┃",
    "▶",
    "Ⅱ",
    "●",
    "●",
    "━",
    "━",
    "╸",
    "·",
    ("“", "”"),
)
ASCII = Signs(
    "",
    " .:-=+*#%@",
    "  #",
    " .:|#",
    "/",
    "#",
    "^",
    "v",
    "|",
    ">",
    "=",
    "*",
    "O",
    "-",
    "#",
    " ",
    "-",
    ('"', '"'),
)


def theme_of(palette: Palette) -> Theme:
    """The Textual theme that goes with a palette."""
    dark = palette.dark
    return Theme(
        name="kcache-dark" if dark else "kcache-light",
        primary=palette.accent,
        secondary=palette.k,
        accent=palette.accent,
        warning=palette.warn,
        error=palette.bad,
        success=palette.good,
        foreground=palette.text,
        background=palette.background,
        surface="#131823" if dark else "#f3f1ec",
        panel="#1a2030" if dark else "#e9e6df",
        dark=dark,
        variables={
            "border": palette.faint,
            "border-blurred": palette.faint,
            "footer-background": palette.background,
            "footer-key-foreground": palette.accent,
            "footer-description-foreground": palette.muted,
            "block-cursor-background": palette.accent,
            "input-selection-background": f"{palette.accent} 35%",
        },
    )


THEMES = ("kcache-dark", "kcache-light")

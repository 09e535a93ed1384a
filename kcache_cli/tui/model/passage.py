"""The text of the context as the dashboard shows it: safe to print, and how much of it was picked."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from kcache.watch.frame import Frame, Role
from kcache_cli.text import printable

_SPECIAL = re.compile(r"<\|[^|<>]*\|>|</?s>|<(?:bos|eos|pad|start_of_turn|end_of_turn)>")
_BEFORE_A_ROLE = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>")


@dataclass(frozen=True, slots=True)
class Piece:
    """A token: its text, printable, who said it, and the share of heads that picked it.

    A ``special`` one was said by nobody: it belongs to the model's form of a chat, as the name of a role does.
    """

    text: str
    position: int
    role: Role
    special: bool = False
    weight: float = 0.0


def pieces_of(frame: Frame, texts: list[str], start: int, weights: np.ndarray | None = None) -> list[Piece]:
    """Make pieces of the texts of tokens from ``start`` on; ``weights`` has a number for each."""
    found = []
    names_role = False
    for at, text in enumerate(texts):
        plain = printable(text)
        is_special = _SPECIAL.fullmatch(plain.strip()) is not None
        names_role = plain.strip() in _BEFORE_A_ROLE if is_special else names_role and plain.isalpha()
        weight = 0.0 if weights is None or at >= len(weights) else float(weights[at])
        role = role_at(frame, start + at)
        found.append(Piece(plain, start + at, role, is_special or names_role, weight))
    return found


def role_at(frame: Frame, position: int) -> Role:
    """Whose token stands at a position."""
    role: Role = "prompt"
    for mark in frame.marks:
        if mark.start > position:
            break
        role = mark.role
    return role


def beginning(frame: Frame, layer: int, positions: range, room: int) -> int:
    """Where a passage about positions begins: a little before, or so that what was picked most is among ``room``."""
    found = weights(frame, layer, positions.start, positions.stop)
    most = 0 if found is None else int(np.argmax(found))
    return max(0, positions.start - 8, positions.start + most - room // 2)


def weights(frame: Frame, layer: int | None, start: int, end: int) -> np.ndarray | None:
    """The share of rows of picks that have each of the positions ``start:end``, of a layer or of all together.

    None where the frame has no exact picks.
    """
    layers = frame.layers if layer is None else frame.layers[layer : layer + 1]
    counts, rows = np.zeros(max(0, end - start)), 0
    for it in layers:
        if it.picks is None or not it.picks.size:
            continue
        inside = it.picks[(it.picks >= start) & (it.picks < end)].astype(np.int64)
        counts += np.bincount(inside - start, minlength=len(counts))
        rows += it.picks.shape[0] * it.picks.shape[1]
    return counts / rows if rows else None

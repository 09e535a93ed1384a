"""Haystacks of real prose, and prompts split where reading ends and asking begins.

A passage is made of whole sentences of a text, from a place the seed says, up to a number of tokens; sentences that
are to be found stand at given depths, 0 at the beginning and 1 at the end. The prompt is that of the model's chat
template, cut at the question: what is before is prefilled, what follows is fed by decode steps.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from typing import TYPE_CHECKING, cast

from kcache.decoding.prompts import check_messages, token_ids
from kcache.errors import InputError

if TYPE_CHECKING:
    from kcache.models.loaded import LoadedModel

_LONGEST = 400  # characters of a sentence; what has no end by then is cut
_SENTENCE = re.compile(rf"\S.{{0,{_LONGEST}}}?(?:[.!?]\s+|\s*\n\s*\n\s*|\Z)|\S.{{0,{_LONGEST}}}\s*", re.S)
_WORD = re.compile(r"\b[a-z]{4,9}\b")


@dataclass(frozen=True)
class Prose:
    """A text to hide things in; ``name`` is what it is called in results."""

    name: str
    text: str

    @cached_property
    def sentences(self) -> tuple[str, ...]:
        """The text in pieces, each with the space that follows it."""
        return tuple(_SENTENCE.findall(self.text))

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The different lower-case words of four to nine letters, in alphabetical order."""
        return tuple(sorted(set(_WORD.findall(self.text))))

    @cached_property
    def digest(self) -> str:
        """What tells this text from another."""
        return sha256(self.text.encode()).hexdigest()[:12]


def passage(lm: LoadedModel, prose: Prose, tokens: int, start: float, hidden: Iterable[tuple[float, str]] = ()) -> str:
    """Take sentences of ``prose`` until they, and what is hidden among them, fill ``tokens``.

    Parameters
    ----------
    lm : LoadedModel
        Whose tokens count.
    prose : Prose
        Begins anew where it is shorter than the passage.
    tokens : int
    start : float
        Where in the prose to begin, between 0 and 1.
    hidden : pairs of depth and sentence
        Depth 0 is before the first sentence of the passage and 1 after the last.

    Raises
    ------
    InputError
        If the text has no sentences, or there is no room for any beside what is hidden.
    """
    placed = sorted(hidden, key=lambda pair: pair[0])
    room = tokens - sum(count_tokens(lm, f"{sentence}\n") for _, sentence in placed)
    pieces, sizes = _fill(lm, prose, room, start)
    total, before, at = sum(sizes), 0, 0
    parts: list[str] = []
    for depth, sentence in placed:
        while at < len(pieces) and before + sizes[at] / 2 < depth * total:
            parts.append(pieces[at])
            before += sizes[at]
            at += 1
        parts.append(f"{sentence}\n")
    return "".join([*parts, *pieces[at:]]).strip()


def _fill(lm: LoadedModel, prose: Prose, room: int, start: float) -> tuple[list[str], list[int]]:
    """Sentences that take at most ``room`` tokens, and the tokens of each."""
    sentences = prose.sentences
    if not sentences:
        raise InputError(f"{prose.name} holds no text to make a haystack of")
    pieces: list[str] = []
    sizes: list[int] = []
    left, at = room, int(start * len(sentences))
    while True:
        piece = sentences[at % len(sentences)]
        size = count_tokens(lm, piece)
        if size > left:
            break
        pieces.append(piece)
        sizes.append(size)
        left, at = left - size, at + 1
    if not pieces:
        raise InputError("there is no room for a haystack beside what is hidden and asked; ask for a longer context")
    return pieces, sizes


def count_tokens(lm: LoadedModel, text: str) -> int:
    """Tokens of a piece of text by itself."""
    return len(token_ids(lm, text))


def split_prompt(lm: LoadedModel, context: str, question: str, lead: str = "") -> tuple[list[int], list[int]]:
    """Token ids of a prompt up to the question, and from the question on.

    Parameters
    ----------
    lm : LoadedModel
        With a chat template, context and question are one message of its user.
    context, question : str
    lead : str
        How the answer begins; it is fed as if the model had said it.

    Raises
    ------
    InputError
        If the chat template does not keep the question as it is.
    """
    if getattr(lm.tokenizer, "chat_template", None):
        message = {"role": "user", "content": f"{context}\n\n{question}"}
        check_messages([message])
        text = cast(str, lm.tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True))
        at = text.rfind(question)
        if at < 0:
            raise InputError(f"the chat template of {lm.name} changes what the user says, so it cannot be cut there")
        special = False  # the template has written them
    else:
        text, at, special = f"{context}\n\nQuestion: {question}\nAnswer:", len(context) + 2, True
    return token_ids(lm, text[:at], special), token_ids(lm, text[at:] + lead)


def spread(count: int, random: Sequence[float]) -> list[float]:
    """``count`` depths in order, one at a random place of each of ``count`` equal stretches."""
    return [(number + random[number]) / count for number in range(count)]

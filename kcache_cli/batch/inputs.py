"""Reading the prompts of a batch: JSON lines or plain text, a line each, and what is wrong with the bad ones."""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from kcache.errors import InputError
from kcache_cli.batch.keys import Unread
from kcache_cli.text import json_line

Id = str | int
Prompt = str | list[dict[str, str]]


@dataclass(frozen=True)
class Entry:
    """One prompt: where it stood, what it is called, and the text or the messages."""

    line: int
    id: Id
    prompt: Prompt


@dataclass(frozen=True)
class BadLine:
    """A line that cannot be used, and why."""

    line: int
    reason: str

    def __str__(self) -> str:
        return f"line {self.line}: {self.reason}"


@dataclass
class Inputs:
    """The prompts of a file in its order, its bad lines, the file's SHA-256, and what is worth a word."""

    sha256: str
    entries: list[Entry] = field(default_factory=list)
    bad: list[BadLine] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


class _Unusable(ValueError):
    """Why a line cannot be used."""


def read_source(name: str) -> bytes:
    """Read a file, or standard input for ``-``.

    Raises
    ------
    InputError
        If it cannot be read.
    """
    if name == "-":
        return sys.stdin.buffer.read() if sys.stdin is not None else b""
    try:
        return Path(name).expanduser().read_bytes()
    except OSError as error:
        raise InputError(f"-i {name}: cannot be read: {error.strerror or error}") from None


def parse_inputs(data: bytes, source: str = "-") -> Inputs:
    """Take the prompts out of ``data``; blank lines count in the numbering and are skipped.

    Raises
    ------
    InputError
        If two lines have the same id, or the file, which is called ``source``, is binary or in UTF-16.
    """
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise InputError(f"-i {source}: is in UTF-16; convert it to UTF-8 first")
    if b"\0" in data:
        raise InputError(f"-i {source}: is not text (byte {data.index(0) + 1:,} is zero); prompts are lines of UTF-8")
    inputs = Inputs(hashlib.sha256(data).hexdigest())
    seen: dict[str, int] = {}
    plain: list[int] = []
    unread = Unread()
    for number, raw in enumerate(data.removeprefix(b"\xef\xbb\xbf").split(b"\n"), start=1):
        try:
            entry = _parse_line(number, raw.removesuffix(b"\r"), unread)
        except _Unusable as error:
            inputs.bad.append(BadLine(number, str(error)))
            continue
        if entry is None:
            continue
        key = json_line(entry.id)
        if key in seen:
            own = " (of a line without one it is the number)" if entry.id in (seen[key], number) else ""
            raise InputError(f"lines {seen[key]} and {number} have the same id {key}{own}; ids must differ")
        seen[key] = number
        inputs.entries.append(entry)
        if entry.prompt == raw.removesuffix(b"\r").decode():
            plain.append(number)
    if 0 < len(plain) < len(inputs.entries):
        which = f"line {plain[0]} is" if len(plain) == 1 else f"line {plain[0]} and {len(plain) - 1:,} more are"
        inputs.remarks.append(f"{which} taken for a prompt as it stands, beside lines of JSON")
    inputs.remarks += unread.remarks()
    return inputs


def _parse_line(number: int, raw: bytes, unread: Unread) -> Entry | None:
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise _Unusable(f"not UTF-8 text (byte {error.start + 1})") from None
    if not text.strip():
        return None
    if not text.lstrip().startswith("{"):
        return Entry(number, number, text)
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
    except _Unusable:
        raise
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else "a number too long or nesting too deep"
        raise _Unusable(f"not valid JSON: {reason} (a line that begins with {{ is read as JSON)") from None
    unread.take(number, value)
    return Entry(number, _id_of(value, number), _prompt_of(value))


def _refuse_constant(name: str) -> NoReturn:
    raise _Unusable(f"{name} is not a value; a prompt is text")


def _id_of(value: dict[str, Any], number: int) -> Id:
    """The id a line gives, or its number."""
    found = value.get("id", number)
    if isinstance(found, bool) or not isinstance(found, (str, int)):
        raise _Unusable(f'"id" must be a text or a whole number, not {json_line(found)[:40]}')
    if isinstance(found, str):
        _check_text(found, '"id"')
    return found


def _prompt_of(value: dict[str, Any]) -> Prompt:
    if ("prompt" in value) == ("messages" in value):
        given = "both" if "prompt" in value else "neither"
        raise _Unusable(f'one of "prompt" and "messages" is needed, {given} given')
    if "prompt" in value:
        prompt = value["prompt"]
        if not isinstance(prompt, str):
            raise _Unusable(f'"prompt" must be a text, not {json_line(prompt)[:40]}')
        if not prompt.strip():
            raise _Unusable("the prompt is empty")
        _check_text(prompt, '"prompt"')
        return prompt
    return check_messages(value["messages"])


def check_messages(messages: object) -> list[dict[str, str]]:
    """Return messages as ``{"role", "content"}`` pairs of text.

    Raises
    ------
    ValueError
        Saying what is wrong.
    """
    if not isinstance(messages, list) or not messages:
        raise _Unusable('"messages" must be a list of {"role", "content"}, and not empty')
    checked = []
    for position, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise _Unusable(f"message {position} is not an object")
        role, content = message.get("role"), _joined(message.get("content"))
        if not isinstance(role, str) or not isinstance(content, str):
            raise _Unusable(f'message {position} needs "role" and "content", both text')
        if role not in ("system", "user", "assistant", "tool"):
            raise _Unusable(
                f'message {position} has the role "{role[:20]}"; it must be system, user, assistant or tool'
            )
        _check_text(content, f"message {position}")
        checked.append({"role": role, "content": content})
    if not any(message["content"].strip() for message in checked):
        raise _Unusable("all messages are empty")
    return checked


def _joined(content: object) -> object:
    """Content that comes in parts, as the OpenAI API has it, as one text, if that is all they hold."""
    if not isinstance(content, list) or not content:
        return content
    parts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content]
    return "".join(part for part in parts if part) if all(isinstance(part, str) for part in parts) else content


def _check_text(text: str, what: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise _Unusable(f"{what} holds half a surrogate pair, which is not text") from None

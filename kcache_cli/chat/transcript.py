"""Conversations on disk: one JSON file of messages and settings, written whole or not at all."""

from __future__ import annotations

import json
import os
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from kcache.errors import InputError, KCacheError
from kcache.policy import Policy
from kcache_cli.batch.inputs import check_messages
from kcache_cli.chat.conversation import Conversation

if TYPE_CHECKING:
    from kcache import Sampling

FORMAT = 1
_SAMPLING = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
_OPENING = re.compile(rb'\s*\{\s*"kcache_chat"\s*:')
_OPENING_BYTES = 256


@dataclass(frozen=True)
class Transcript:
    """What a saved conversation holds."""

    model: str
    messages: list[dict[str, str]]
    max_tokens: int
    sampling: Sampling
    policy: Policy


def save(conversation: Conversation, name: str) -> Path:
    """Write the conversation to a file, in place of a saved one at most, and return its path.

    Raises
    ------
    InputError
        If something else is there already, or the file cannot be written.
    """
    session = conversation.session
    system = [{"role": "system", "content": session.system}] if session.system is not None else []
    sampling = {key: getattr(session.sampling, key) for key in _SAMPLING}
    content = {
        "kcache_chat": FORMAT,
        "model": conversation.model,
        "messages": [*system, *session.messages],
        "settings": {
            "max_tokens": conversation.max_tokens,
            **{key: value for key, value in sampling.items() if value is not None},
            "policy": session.policy.to_dict(),
        },
    }
    path = Path(name).expanduser()
    try:
        if path.exists() and not path.is_dir() and not _is_saved(path):
            raise InputError(f"{name} is there already and is no saved conversation; take another name")
        _write(path, json.dumps(content, indent=2))
    except OSError as error:
        raise InputError(f"cannot save to {name}: {error.strerror or error}") from None
    return path


def _is_saved(path: Path) -> bool:
    """Whether a whole saved conversation is there, of any version; what opens otherwise may be large and is left."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        opening = file.read(_OPENING_BYTES)
        if not _OPENING.match(opening):
            return False
        data = opening + file.read()
    try:
        json.loads(data)
    except (ValueError, RecursionError):
        return False
    return True


def _write(path: Path, text: str) -> None:
    if path.is_dir():
        raise IsADirectoryError(21, "is a folder; name a file")
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read(name: str) -> Transcript:
    """Read a saved conversation.

    Raises
    ------
    InputError
        If the file cannot be read, or is not a whole saved conversation.
    """
    try:
        data = Path(name).expanduser().read_bytes()
    except OSError as error:
        raise InputError(f"cannot load {name}: {error.strerror or error}") from None
    try:
        return _parse(json.loads(data, parse_constant=_refuse))
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError, KCacheError) as error:
        raise InputError(f"{name} is not a saved conversation, or is damaged: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """What is wrong with a file, in words about the file."""
    if isinstance(error, json.JSONDecodeError):
        if not error.doc.strip():
            return "it is empty"
        if not error.doc[error.pos :].strip() or error.msg.startswith("Unterminated"):
            return "it breaks off before its end"
        return f"it is no JSON from line {error.lineno}, column {error.colno} on"
    if isinstance(error, UnicodeDecodeError):
        return "it is no text"
    if isinstance(error, KeyError):
        return f"{error.args[0]!r} is missing"
    if isinstance(error, (TypeError, AttributeError, RecursionError)):
        return "a part of it is of another kind than was saved"
    return str(error)


def _parse(value: Any) -> Transcript:
    if not isinstance(value, dict) or value.get("kcache_chat") != FORMAT:
        raise ValueError(f'it does not begin with "kcache_chat": {FORMAT}')
    settings = value["settings"]
    messages = check_messages(value["messages"]) if value["messages"] else []
    max_tokens = settings["max_tokens"]
    if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 1:
        raise ValueError(f"max_tokens is {max_tokens!r}")
    policy = Policy.from_dict(settings["policy"])
    return Transcript(str(value["model"]), messages, max_tokens, _sampling_of(settings), policy)


def _sampling_of(settings: dict[str, Any]) -> Sampling:
    from kcache import Sampling

    found = {key: settings[key] for key in _SAMPLING if key in settings}
    for key, number in found.items():
        kinds = int if key in ("top_k", "seed") else (int, float)
        if isinstance(number, bool) or not isinstance(number, kinds):
            raise ValueError(f"{key} is {number!r}")
    return Sampling(**found)


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}")


def restore(conversation: Conversation, transcript: Transcript) -> None:
    """Go on from a transcript; when something in it is refused, the conversation stays as it was."""
    session = conversation.session
    if not transcript.messages or transcript.messages[0]["role"] != "system":
        session.system = None
    session.load_messages(transcript.messages)
    session.sampling, session.policy = transcript.sampling, transcript.policy
    conversation.max_tokens = transcript.max_tokens
    conversation.document = None

"""The slash commands of a chat: what they are called, what they do, and what is left to type."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from kcache.errors import InputError
from kcache.policy import Policy
from kcache_cli.chat import transcript
from kcache_cli.chat.conversation import Conversation
from kcache_cli.chat.figures import Figures
from kcache_cli.text import size

Say = Callable[[str], None]

SAMPLING_NAMES: dict[str, type] = {"temperature": float, "top_p": float, "top_k": int, "seed": int}
POLICY_NAMES = tuple(field.name for field in dataclasses.fields(Policy))
SET_NAMES = ("max_tokens", *SAMPLING_NAMES, *POLICY_NAMES)
_SAVED_NAMES = (*SET_NAMES, "repetition_penalty")


class Leave(Exception):
    """The user wants to go."""


@dataclass(frozen=True)
class Command:
    """A slash command."""

    run: Callable[[Conversation, str, Say], None]
    usage: str
    help: str


def parse(line: str) -> tuple[str, str] | None:
    """Split a slash command into name and argument; None for what is a message (a path, say)."""
    name, _, argument = line.strip().partition(" ")
    if not name.startswith("/") or not name[1:].isalpha():
        return None
    return name, argument.strip()


def run(
    conversation: Conversation, name: str, argument: str, say: Say, keys: Mapping[str, str] = MappingProxyType({})
) -> None:
    """Run a slash command; ``keys`` are what ``/help`` tells besides: keys, and what they do.

    Raises
    ------
    Leave
        For ``/bye`` and ``/quit``.
    KCacheError
        If it cannot be done; nothing has changed then.
    """
    command = COMMANDS.get(name)
    if command is None:
        raise InputError(f"no command {name}; /help lists them")
    command.run(conversation, argument, say)
    if command is COMMANDS["/help"]:
        for key, does in keys.items():
            say(_line(key, does))


def _line(usage: str, help: str) -> str:
    return f"  {usage:<22}{help}"


def _help(conversation: Conversation, argument: str, say: Say) -> None:
    for command in dict.fromkeys(COMMANDS.values()):
        say(_line(command.usage, command.help))


def _clear(conversation: Conversation, argument: str, say: Say) -> None:
    conversation.session.clear()
    kept = "; the document will be read again with the next question" if conversation.document else ""
    say(f"conversation forgotten{kept}")


def _bye(conversation: Conversation, argument: str, say: Say) -> None:
    raise Leave


def _system(conversation: Conversation, argument: str, say: Say) -> None:
    session = conversation.session
    if not argument:
        say(f"system: {session.system}" if session.system is not None else "no system message; /system TEXT sets one")
        return
    session.system = None if argument == "none" else argument
    say("system message removed" if session.system is None else "system message set")


def _save(conversation: Conversation, argument: str, say: Say) -> None:
    if not argument:
        raise InputError("which file? /save FILE")
    say(f"saved to {transcript.save(conversation, argument)}")


def _load(conversation: Conversation, argument: str, say: Say) -> None:
    if not argument:
        raise InputError("which file? /load FILE")
    loaded = transcript.read(argument)
    before = {name: _current(conversation, name) for name in _SAVED_NAMES}
    transcript.restore(conversation, loaded)
    after = {name: _current(conversation, name) for name in _SAVED_NAMES}
    changed = ", ".join(f"{name} {value}" for name, value in after.items() if value != before[name])
    settings = f", and settings: {changed}" if changed else ""
    say(f"loaded {len(loaded.messages)} messages from {argument}{settings}")
    if loaded.model != conversation.model:
        say(f"note: they were written with {loaded.model}; this is {conversation.model}")


def _set(conversation: Conversation, argument: str, say: Say) -> None:
    if not argument:
        for name in SET_NAMES:
            say(f"  {name:<18}{_current(conversation, name)}")
        return
    name, _, text = argument.partition(" ")
    name, text = name.replace("-", "_"), text.strip()
    if name not in SET_NAMES:
        raise InputError(f"no setting {name}; they are {', '.join(SET_NAMES)}")
    if text:
        _change(conversation, name, text)
    say(f"{name} = {_current(conversation, name)}")


_SIZES = ("kv_budget",)


def _change(conversation: Conversation, name: str, text: str) -> None:
    session = conversation.session
    if name == "max_tokens":
        value = _number(name, text, int)
        if value is None or value < 1:
            raise InputError(f"max_tokens must be at least 1, got {text}")
        conversation.max_tokens = value
    elif name in SAMPLING_NAMES:
        number = _number(name, text, SAMPLING_NAMES[name])
        session.sampling = dataclasses.replace(session.sampling, **{name: number})
    else:
        session.policy = session.policy.replace(**{name: _policy_value(name, text)})


def _policy_value(name: str, text: str) -> Any:
    default = getattr(Policy(), name)
    words = name in _SIZES or isinstance(default, str)  # what the policy itself reads
    if text.lower() == "default" or (text.lower() in ("none", "auto") and not isinstance(default, str)):
        return default
    return text if words else _number(name, text, int)


def _number(name: str, text: str, kind: type) -> Any:
    if text.lower() in ("none", "default"):
        return None
    try:
        return kind(text)
    except ValueError:
        what = "whole number" if kind is int else "number"
        raise InputError(f"{name} must be a {what}, got {text}") from None


def _current(conversation: Conversation, name: str) -> str:
    if name == "max_tokens":
        return str(conversation.max_tokens)
    of_policy = name in POLICY_NAMES
    holder: Any = conversation.session.policy if of_policy else conversation.session.sampling
    value = getattr(holder, name)
    if value is None:
        return "auto" if of_policy else "another each time" if name == "seed" else "the model's own"
    return size(value) if name == "kv_budget" else str(value)


def _stats(conversation: Conversation, argument: str, say: Say) -> None:
    session = conversation.session
    if session.cache is None:
        say("the cache is empty")
        return
    stats = session.cache.stats
    device, host = ("device tier (RAM)", "host tier") if conversation.host_only else ("device", "host")
    for name, value in (
        ("tokens in the cache", f"{stats.tokens:,}"),
        ("messages", f"{len(session.messages):,}"),
        (device, size(stats.device_bytes)),
        ("  of it K", size(stats.k_bytes)),
        ("  of it V", size(stats.resident_v_bytes)),
        ("  of it policy data", size(stats.overhead_bytes - stats.hot_bytes)),
        *([("  of it hot rows", size(stats.hot_bytes))] if stats.hot_bytes else []),
        (host, size(stats.host_bytes)),
        ("full KV cache", size(stats.full_kv_bytes)),
        ("decode steps", f"{stats.steps:,}"),
        ("V rows fetched", f"{stats.rows_fetched:,} ({stats.hot_hits:,} from the hot set)"),
        ("link, host to device", size(stats.bytes_h2d)),
        ("link, device to host", size(stats.bytes_d2h)),
    ):
        say(f"  {name:<22}{value}")
    figures = Figures.of(session)
    if figures is not None:
        say(figures.footer(conversation.host_only))


COMMANDS = {
    "/help": Command(_help, "/help", "this list"),
    "/clear": Command(_clear, "/clear", "forget the conversation"),
    "/set": Command(_set, "/set [NAME [VALUE]]", "show or change settings: temperature, topn, ..."),
    "/stats": Command(_stats, "/stats", "what the cache holds and has moved"),
    "/save": Command(_save, "/save FILE", "write the conversation to a file"),
    "/load": Command(_load, "/load FILE", "go on from a saved conversation"),
    "/system": Command(_system, "/system [TEXT]", "show or set the system message; none removes it"),
    "/bye": Command(_bye, "/bye, /quit", "leave"),
}
COMMANDS["/quit"] = COMMANDS["/bye"]

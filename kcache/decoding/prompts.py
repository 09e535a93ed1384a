"""Prompts in, token ids out: strings, token ids, and chat messages through the model's template."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any, TypeAlias, cast

from kcache.errors import ContextLengthError, InputError

if TYPE_CHECKING:
    from kcache.models.loaded import LoadedModel, Reader

Message: TypeAlias = dict[str, str]
Prompt: TypeAlias = str | list[int] | list[Message]


LEAST_SHARED = 128
"""Tokens that prompts must begin with alike for that to be read once: it is a forward of its own."""


def alike(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two prompts begin with alike."""
    alike, most = 0, min(len(one), len(other))
    while alike < most:  # slices compare much faster than tokens one by one
        half = (alike + most + 1) // 2
        if one[alike:half] == other[alike:half]:
            alike = half
        else:
            most = half - 1
    return alike


def encode(lm: LoadedModel | Reader, prompts: Prompt | Sequence[Prompt]) -> list[list[int]]:
    """Turn one prompt or several into token ids, one list per sequence.

    Raises
    ------
    InputError
        For no prompts, an empty one, or messages without a chat template.
    """
    many = _as_list(prompts)
    if not many:
        raise InputError("no prompt given")
    batch = [_encode_one(lm, prompt) for prompt in many]
    known = lm.vocabulary
    for number, ids in enumerate(batch, start=1):
        if not ids:
            raise InputError(f"prompt {number} is empty; it needs at least one token")
        strange = next((token for token in ids if not 0 <= token < known), None)
        if strange is not None:
            raise InputError(f"prompt {number} holds the token id {strange}; those of {lm.name} are 0 to {known - 1}")
    return batch


def encode_messages(lm: LoadedModel | Reader, messages: list[Message]) -> list[int]:
    """Render messages with the chat template, ready for the assistant's answer.

    Raises
    ------
    InputError
        If the tokenizer has no chat template, or the template refuses the messages.
    """
    if not getattr(lm.tokenizer, "chat_template", None):
        raise InputError(f"{lm.name} has no chat template; use `kcache generate` with plain prompts")
    check_messages(messages)
    try:
        encoded = lm.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise InputError(f"the chat template of {lm.name} does not take these messages: {reason}") from error
    return [int(token) for token in cast(Any, encoded)["input_ids"]]


def check_messages(messages: Sequence[Message]) -> None:
    """Raise unless each message is a role and a content, both text.

    Raises
    ------
    InputError
        Naming the first that is not, by number.
    """
    for number, message in enumerate(messages, start=1):
        if not all(isinstance(message.get(key), str) for key in ("role", "content")):
            raise InputError(f'message {number} is not {{"role": text, "content": text}}: {message!r}')
        _check_text(message["content"], f"message {number}")


def check_length(lm: LoadedModel, tokens: int, max_new_tokens: int, allow_overflow: bool) -> int:
    """Return how many new tokens there is room for after ``tokens``.

    Raises
    ------
    ContextLengthError
        If ``tokens`` leave no room in the model's context.
    InputError
        If ``max_new_tokens`` is not a whole number of at least 1.
    """
    if not _is_whole(max_new_tokens) or max_new_tokens < 1:
        raise InputError(f"max_new_tokens must be a whole number of at least 1, got {max_new_tokens!r}")
    context = lm.context_length
    if context is None or allow_overflow:
        return max_new_tokens
    if tokens >= context:
        raise ContextLengthError(
            f"the prompt is {tokens:,} tokens and the context of {lm.name} is {context:,}; "
            "shorten it, or allow overflow (allow_overflow=True, --allow-overflow) and expect the answer to degrade"
        )
    return min(max_new_tokens, context - tokens)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, (bytes, Mapping)) or not isinstance(prompts, Iterable):
        raise _not_a_prompt(prompts)
    items = list(cast(Sequence[Any], prompts))
    if items and all(_is_whole(item) for item in items):
        return [cast(list[int], items)]
    if items and all(isinstance(item, dict) for item in items):
        return [cast(list[Message], items)]
    return items


def token_ids(lm: LoadedModel | Reader, text: str, special: bool = False) -> list[int]:
    """The tokens of a text; with ``special`` those that the tokenizer puts around every text, too."""
    return list(cast(Any, lm.tokenizer(text, add_special_tokens=special, verbose=False))["input_ids"])


def _encode_one(lm: LoadedModel | Reader, prompt: Prompt) -> list[int]:
    if isinstance(prompt, str):
        _check_text(prompt, "the prompt")
        return [int(token) for token in cast(Any, lm.tokenizer(prompt))["input_ids"]] if prompt else []
    if isinstance(prompt, list) and all(_is_whole(item) for item in prompt):
        return [int(token) for token in cast(list[int], prompt)]
    if isinstance(prompt, list) and all(isinstance(item, dict) for item in prompt):
        return encode_messages(lm, cast(list[Message], prompt))
    raise _not_a_prompt(prompt)


def _not_a_prompt(given: object) -> InputError:
    return InputError(f"a prompt is a string, token ids, or a list of messages; got {type(given).__name__}")


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _check_text(text: str, what: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(f"{what} holds a lone surrogate at character {error.start + 1}, which is no text") from error

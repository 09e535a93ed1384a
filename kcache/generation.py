"""Generation: prefill in chunks, then the decode loop (:mod:`kcache.decoding.loop`), streamed as events.

Prompts of a batch are left-padded to one length ``T``; ids and masks are ``[B, T]``. Sequences that have ended
leave the cache when they are enough, so that the steps of the others read less. Until then they are fed on; in a cache
that will be used again they stay, and are fed padding. What all prompts begin with is read once
(:mod:`kcache.decoding.prefix`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from kcache.attaching import attach
from kcache.backends.cpu import compile_ahead
from kcache.cache import KCache
from kcache.decoding.forward import Read, prefill
from kcache.decoding.loop import decode, graph_of
from kcache.decoding.pieces import keeps_states
from kcache.decoding.prefix import read_once, shared_length
from kcache.decoding.prompts import Prompt, check_length, encode
from kcache.decoding.sampling import Sampler, Sampling
from kcache.decoding.text import Detokenizer
from kcache.errors import CacheStateError, InputError, expect
from kcache.models.ends import end_ids
from kcache.models.loaded import LoadedModel
from kcache.policy import Policy
from kcache.watch.capture import watchers_of

FinishReason = Literal["stop", "length"]

_MOVE = (1 / 8, 8)
"""Sequences move up where so much of the batch has ended and may take so many steps more: a move copies what stays."""
_MOVE_RECORDED = (1 / 2, 64)
"""The same where steps are recorded: they are recorded anew then, which takes as long as many of them."""


@dataclass(frozen=True, slots=True)
class TokenEvent:
    """One new token of one sequence.

    Attributes
    ----------
    index : int
        Which prompt it belongs to.
    token_id : int
    text : str
        Text that became certain with it; may be empty, and excludes stop strings.
    finish_reason : {"stop", "length"} or None
        Set on a sequence's last event: an end token or stop string, or no room for more.
    prompt_tokens, completion_tokens : int
        Tokens of this prompt, and new tokens so far.
    elapsed_ms, ttft_ms : float
        Time since generation began, and the time of the first token; what has to be compiled first is in both.
    """

    index: int
    token_id: int
    text: str
    finish_reason: FinishReason | None
    prompt_tokens: int
    completion_tokens: int
    elapsed_ms: float
    ttft_ms: float


def generate(
    lm: LoadedModel,
    prompts: Prompt | Sequence[Prompt],
    policy: Policy | None = None,
    *,
    sampling: Sampling | None = None,
    max_new_tokens: int = 256,
    stop: str | Sequence[str] = (),
    cache: KCache | None = None,
    allow_overflow: bool = False,
    read: Read | None = None,
) -> Iterator[TokenEvent]:
    """Generate from one prompt or a batch of prompts, decoded together.

    Parameters
    ----------
    lm : LoadedModel
        From :func:`kcache.load`.
    prompts : str, list of token ids, or list of those and of message lists
        A string is continued as it stands; a list of ``{"role", "content"}`` goes through the chat template.
    policy : Policy, optional
    sampling : Sampling, optional
        Default: the model's own generation config, of which nothing but what :class:`Sampling` names and the end tokens
        is read: no default of transformers' ``generate`` (``top_k=50``), nor tokens or n-grams that it forbids.
    max_new_tokens : int
        At most so many per sequence, and never past the model's context unless ``allow_overflow``.
    stop : str or sequence of str
        Texts that end a sequence; they are not part of its text.
    cache : KCache, optional
        Continue after what this cache holds; by default a new one is made, of exactly the size needed. The last token
        of a sequence is not in the cache yet: begin the next prompt with it.
    allow_overflow : bool
        Let prompt and answer exceed the model's context.
    read : callable, optional
        Told, while the prompts are read, how many of their positions have been taken in, and of how many. On CUDA the
        host is ahead of the device.

    Yields
    ------
    TokenEvent
        One per sequence and step, in prompt order within a step.

    Raises
    ------
    InputError
        For an empty prompt, a missing chat template, or an argument that is something else.
    PolicyError
        If ``policy`` is no policy.
    ContextLengthError
        If a prompt does not fit the model's context.
    DoesNotFitError
        If the cache does not fit in memory.
    CacheStateError
        If ``cache`` holds another number of sequences.
    """
    expect(LoadedModel, "lm", lm, "what kcache.load returns")
    sampling = Sampling() if sampling is None else sampling
    expect(Sampling, "sampling", sampling, "a kcache.Sampling, such as Sampling(temperature=0)")
    expect((KCache, type(None)), "cache", cache, "a kcache.KCache")
    batch = encode(lm, prompts)
    keep = cache is not None
    past = 0 if cache is None else cache.get_seq_length()
    longest = past + max(len(ids) for ids in batch)
    room = check_length(lm, longest, max_new_tokens, allow_overflow)
    if cache is None:
        cache = KCache(lm.model, policy, max_length=longest + room)
    elif policy is not None and policy != cache.policy:
        raise InputError("the cache was made with another policy; leave policy out to go on with the cache's own")
    elif past and cache.batch_size != len(batch):
        raise CacheStateError(
            f"this cache holds {cache.batch_size} sequences and was given {len(batch)} prompts; "
            "give one for each, or make a new cache"
        )
    return stream(lm, batch, cache, sampling, room, stop_texts(stop), keep=keep, read=read)


def stop_texts(stop: str | Sequence[str]) -> list[str]:
    """The texts that end a sequence, one or several, as a list.

    Raises
    ------
    InputError
        If it is something else.
    """
    texts = [stop] if isinstance(stop, str) else list(stop) if isinstance(stop, Iterable) else [stop]
    for text in texts:
        expect(str, "stop", text, "a string or several; leave it out where only end tokens end a sequence")
    return texts


@dataclass
class _Sequence:
    """Progress of one sequence of a batch."""

    prompt_tokens: int
    text: Detokenizer
    completion_tokens: int = 0
    done: bool = False


def stream(
    lm: LoadedModel,
    batch: list[list[int]],
    cache: KCache,
    sampling: Sampling,
    max_new_tokens: int,
    stop: Sequence[str] = (),
    keep_going: Callable[[], bool] = lambda: True,
    fed: list[int] | None = None,
    keep: bool = False,
    read: Read | None = None,
) -> Iterator[TokenEvent]:
    """Decode token id prompts with a cache that may already hold tokens; see :func:`generate`.

    ``keep_going`` is asked between prefill chunks and between tokens; ``fed`` collects the ids the cache has taken in
    (first sequence); ``keep`` says that the cache will be used again, so that nothing may enter it which is of no
    sequence; ``read`` is told how far the prompt has been read.
    """
    began = time.perf_counter()
    device = lm.device
    sampler = Sampler(sampling, lm.model.generation_config, device)
    ends = end_ids(lm.model, lm.tokenizer)
    sequences = [_Sequence(len(ids), Detokenizer(lm.tokenizer, stop)) for ids in batch]
    pad_id = lm.tokenizer.pad_token_id or 0
    ended = [False] * len(batch) if keep else []
    ttft_ms, latest, width = 0.0, 0, max(len(ids) for ids in batch)
    compile_ahead(device, lm.model.dtype, cache.get_seq_length() + width)  # or the first step would wait for it
    with attach(lm.model):
        shared = 0 if keep else shared_length(lm.model, cache, batch)
        past = torch.tensor([batch[0][:shared] or fed or []], dtype=torch.long, device=device)
        if shared:
            for _ in read_once(lm.model, cache, past, len(batch), _of_all(read, 0, width)):
                if not keep_going():
                    return
        ids, mask = _pad([row[shared:] for row in batch], pad_id, cache, device)
        history = torch.cat([past.expand(len(batch), -1), ids], 1)
        logits: torch.Tensor | None = None
        for newest, piece in prefill(lm.model, cache, ids, mask, _of_all(read, shared, width)):
            logits = newest
            if fed is not None:
                fed.extend(piece)
            if not keep_going():
                return
        assert logits is not None
        steps = decode(lm.model, cache, logits, sampler, history, mask, ended, pad_id)
        held, going = list(range(len(batch))), None  # the sequence at each place in the cache, and the places that stay
        for step in range(max_new_tokens):
            values = steps.send(going)
            held = held if going is None else [held[place] for place in going]
            if fed is not None and step:
                fed.append(latest)
            latest = values[0]
            elapsed_ms = (time.perf_counter() - began) * 1e3
            ttft_ms = ttft_ms or elapsed_ms
            made: dict[int, int] = {}
            for index, token in zip(held, values, strict=True):
                sequence = sequences[index]
                if not sequence.done:
                    last = step == max_new_tokens - 1
                    yield _event(index, sequence, token, token in ends, last, elapsed_ms, ttft_ms)
                    if sequence.done:
                        made[index] = sequence.completion_tokens
            if made:
                last_one = all(sequence.done for sequence in sequences)
                for watcher in watchers_of(lm.model):
                    watcher.finish(cache, made, last_one)
            if keep:
                ended[:] = [sequence.done for sequence in sequences]
            if all(sequence.done for sequence in sequences) or not keep_going():
                return
            if not keep:
                going = _going([sequences[index].done for index in held], max_new_tokens - step - 1, cache)


def _of_all(read: Read | None, before: int, total: int) -> Read | None:
    """Who is told of a part of the prompts, told of all: ``before`` positions have been read, of ``total``."""
    return None if read is None else lambda done, _: read(before + done, total)


def _going(ended: list[bool], steps: int, cache: KCache) -> list[int] | None:
    """Places of the sequences to go on with, for so many steps at most; None for all if none should move."""
    share, least_steps = _MOVE if graph_of(cache) is None else _MOVE_RECORDED
    if sum(ended) < share * len(ended) or steps < least_steps or not keeps_states(cache):
        return None
    return [place for place, has_ended in enumerate(ended) if not has_ended]


def _event(
    index: int, sequence: _Sequence, token: int, ended: bool, last: bool, elapsed_ms: float, ttft_ms: float
) -> TokenEvent:
    sequence.completion_tokens += 1
    text = "" if ended else sequence.text.push(token)
    reason: FinishReason | None = None
    if ended or sequence.text.stopped:
        reason = "stop"
    elif last:
        reason = "length"
    if reason is not None:
        sequence.done = True
        text += sequence.text.finish()
    return TokenEvent(
        index, token, text, reason, sequence.prompt_tokens, sequence.completion_tokens, elapsed_ms, ttft_ms
    )


def _pad(
    batch: list[list[int]], pad_id: int, cache: KCache, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Left-pad to ``[B, T]``; the mask covers what the cache holds too, and is None when nothing is padded."""
    width = max(len(ids) for ids in batch)
    ids = torch.tensor([[pad_id] * (width - len(row)) + row for row in batch], device=device)
    past = cache.get_seq_length()
    held = cache.shared.validity.rows(0, past, device) if past else None
    if held is None and all(len(row) == width for row in batch):
        return ids, None
    new = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in batch], device=device)
    before = new.new_ones(len(batch), past) if held is None else held.to(new.dtype)
    return ids, torch.cat([before, new], 1)

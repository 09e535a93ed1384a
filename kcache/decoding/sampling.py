"""Choosing the next token: the caller's settings over the model's own generation config, with transformers' warpers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import cast

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from kcache.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen; ``None`` leaves a setting to the model's generation config.

    Attributes
    ----------
    temperature : float or None
        0 is greedy.
    top_p, top_k, repetition_penalty : float, int, float or None
    seed : int or None
        From 0 on; makes a run repeatable. None draws a fresh one.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, 0, None, "0 is greedy, 0.7 a common choice")
        _check("top_p", self.top_p, 0, 1, "1 switches it off")
        _check("top_k", self.top_k, 0, None, "0 switches it off")
        _check("repetition_penalty", self.repetition_penalty, 0, None, "1 switches it off")
        for name, value in (("top_k", self.top_k), ("seed", self.seed)):
            if value is not None and not isinstance(value, Integral):
                raise InputError(f"{name} must be a whole number, got {value!r}")
        _check("seed", self.seed, 0, 2**64 - 1, "any number in there makes a run repeatable")
        for name in ("top_p", "repetition_penalty"):
            if getattr(self, name) == 0:
                raise InputError(f"{name} must be above 0, got 0; 1 switches it off")


def _check(name: str, value: float | None, low: float, high: float | None, hint: str) -> None:
    if value is None:
        return
    finite = isinstance(value, Integral) or (isinstance(value, Real) and math.isfinite(value))
    if not finite or value < low or (high is not None and value > high):
        limits = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InputError(f"{name} must be {limits}, got {value!r}; {hint}")


def is_greedy(sampling: Sampling, config: GenerationConfig) -> bool:
    """Whether the likeliest token is always taken: by what was asked for or, where nothing was, by the model's own."""
    asked = sampling.temperature or sampling.top_p is not None or sampling.top_k is not None
    return sampling.temperature == 0 or not (config.do_sample or asked)


class Sampler:
    """Picks one token per sequence from logits ``[B, vocabulary]``."""

    def __init__(self, sampling: Sampling, config: GenerationConfig, device: torch.device) -> None:
        self.greedy = is_greedy(sampling, config)
        self._processors = LogitsProcessorList()
        self._generator: torch.Generator | None = None
        penalty = _first(sampling.repetition_penalty, config.repetition_penalty, 1.0)
        if penalty != 1.0:
            self._processors.append(RepetitionPenaltyLogitsProcessor(float(penalty)))
        if self.greedy:
            return
        temperature = _first(sampling.temperature, config.temperature, 1.0)
        top_k, top_p = _first(sampling.top_k, config.top_k, 0), _first(sampling.top_p, config.top_p, 1.0)
        if temperature != 1.0:
            self._processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            self._processors.append(TopKLogitsWarper(int(top_k)))
        if top_p < 1.0:
            self._processors.append(TopPLogitsWarper(float(top_p)))
        self._generator = torch.Generator(device)
        if sampling.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(sampling.seed)

    @property
    def needs_history(self) -> bool:
        """Whether :meth:`pick` reads the tokens so far."""
        return any(isinstance(item, RepetitionPenaltyLogitsProcessor) for item in self._processors)

    def pick(self, logits: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        """Choose the next token of each sequence, ``[B]``; ``history`` ``[B, T]`` are the tokens so far."""
        scores = logits
        if self._processors:
            scores = self._processors(cast(torch.LongTensor, history), cast(torch.FloatTensor, logits.float()))
        if self.greedy:
            return scores.argmax(-1)
        probs = torch.softmax(scores.float(), -1)
        return torch.multinomial(probs, 1, generator=self._generator)[:, 0]


def _first(*values: float | None) -> float:
    return next(value for value in values if value is not None)

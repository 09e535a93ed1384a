"""Samplers that say what they are told to, for runs that must be fed the same."""

from __future__ import annotations

import torch
from transformers import GenerationConfig

from kcache.decoding.sampling import Sampler, Sampling


class Forced(Sampler):
    """Gives the tokens ``[steps, B]`` one after the other, and keeps the logits it was shown."""

    def __init__(self, forced: torch.Tensor) -> None:
        super().__init__(Sampling(temperature=0), GenerationConfig(), forced.device)
        self._forced = forced
        self.seen: list[torch.Tensor] = []

    def keep(self, places: list[int]) -> None:
        """Go on with the sequences at ``places``."""
        self._forced = self._forced[:, places]

    def pick(self, logits: torch.Tensor, history: torch.Tensor) -> torch.Tensor:
        self.seen.append(logits.clone())
        return self._forced[min(len(self.seen), len(self._forced)) - 1]

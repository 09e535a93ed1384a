"""Decode steps nobody ran: captured moments with picks that move the way those of a real model do."""

from __future__ import annotations

from collections import deque

import numpy as np
import torch

from kcache.machine.arriving import Arriving
from kcache.watch.build import build
from kcache.watch.capture import Forward
from kcache.watch.codec import Message
from kcache.watch.columns import STATS
from kcache.watch.frame import Memory
from kcache.watch.moment import Captured, Picks
from kcache.watch.tokens import Pieces, Tokens

RECENT = 128
AGAIN = 0.82


class Words:
    """A tokenizer whose every token is a word of its own."""

    eos_token_id = None

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        return {"input_ids": [7]}

    def decode(self, ids: list[int], **options: object) -> str:
        return "".join(f" w{token}" for token in ids)


class Steps:
    """A model at work.

    Each head's picks are, with the probability measured on real text (0.82), among the last 128 distinct positions it
    picked before; the others fall anywhere, half of them near the end of the context.
    """

    def __init__(self, layers: int = 32, kv_heads: int = 8, group: int = 4, topn: int = 128, tokens: int = 32_000):
        self.layers, self.kv_heads, self.group, self.topn, self.tokens = layers, kv_heads, group, topn, tokens
        self.random = np.random.default_rng(0)
        self.text = Tokens(Pieces(Words()))
        self.number = 0
        self._recent = [deque(self._fresh(2 * RECENT), maxlen=RECENT) for _ in range(layers * kv_heads)]
        self._before: torch.Tensor | None = None
        self._counts = np.zeros((layers, len(STATS)), np.int64)
        self._mass = self.random.uniform(0.7, 0.98, layers * kv_heads * group)
        self._worth = self.random.pareto(0.7, tokens + 10_000) + 1e-3
        self.text.take(self._forward(0, tokens, True))

    def _forward(self, past: int, count: int, prompt: bool) -> Forward:
        ids = torch.as_tensor(self.random.integers(100, 49_000, (1, count)))
        return Forward(1, 0.05 * self.number, past, count, 1, prompt, Arriving(ids), None)

    def _fresh(self, count: int) -> list[int]:
        anywhere = self.random.integers(0, self.tokens, count)
        near = self.tokens - 1 - self.random.geometric(1 / 300, count) % self.tokens
        return [int(value) for value in np.where(self.random.random(count) < 0.5, anywhere, near)]

    def _picks_of(self, head: int) -> list[int]:
        recent = self._recent[head]
        old = sorted(set(recent))
        again = int(self.random.binomial(self.topn, AGAIN))
        chosen = set(self.random.choice(old, min(again, len(old)), replace=False).tolist())
        while len(chosen) < self.topn:
            chosen.update(self._fresh(self.topn - len(chosen)))
        for position in self.random.permutation(list(chosen)).tolist():
            if position in recent:
                recent.remove(position)
            recent.append(position)
        return list(chosen)

    def _weights(self, flat: torch.Tensor) -> torch.Tensor:
        """What each pick holds: a few of a head's, much the same from step to step, hold most of its mass."""
        found = self._worth[flat.numpy().reshape(-1, self.topn)]
        found = found * np.exp(self.random.normal(0, 0.3, found.shape))
        mass = self._mass.reshape(len(found), -1).mean(1, keepdims=True)
        return torch.as_tensor(found / found.sum(1, keepdims=True) * mass, dtype=torch.float32).flatten()

    def step(self) -> Message:
        """The columns of the next step's frame."""
        self.text.take(self._forward(self.tokens, 1, False))
        self.tokens += 1
        self.number += 1
        heads = self.layers * self.kv_heads
        flat = torch.tensor([self._picks_of(head) for head in range(heads)], dtype=torch.int32).reshape(-1)
        self._mass = np.clip(self._mass + self.random.normal(0, 0.03, len(self._mass)), 0.3, 1)
        rows = self.kv_heads * self.topn
        self._counts[:, STATS.index("rows_fetched")] += rows
        hits = self.random.binomial(rows, AGAIN, self.layers)
        self._counts[:, STATS.index("hot_hits")] += hits
        self._counts[:, STATS.index("bytes_h2d")] += (rows - hits) * 256
        self._counts[:, STATS.index("bytes_d2h")] += self.kv_heads * 256
        self._counts[:, STATS.index("full_kv_bytes")] = self.tokens * self.kv_heads * 512
        for name in ("steps", "tokens"):
            self._counts[:, STATS.index(name)] = self.number if name == "steps" else self.tokens
        picks = Picks(
            (1, self.number),
            1,
            ((1, self.kv_heads, self.topn),) * self.layers,
            (self.kv_heads * self.group,) * self.layers,
            (flat,),
            (),
            (),
        )
        captured = Captured(
            1,
            1.8e9 + 0.0512 * self.number + self.random.random() / 100,
            1,
            [tuple(map(int, row)) for row in self._counts],
            b"\0" * self.layers,
            b"\3" * self.layers,
            picks,
            (Arriving(flat),),
            (Arriving(torch.as_tensor(self._mass, dtype=torch.float32)),),
            (Arriving(self._weights(flat)),),
            () if self._before is None else (Arriving(self._before),),
            () if self._before is None else picks.shapes,
        )
        self._before = flat
        memory = Memory(80 << 30, int(self.random.integers(1 << 34)), 1 << 34, 1 << 34, 1 << 37, 1 << 36, 1 << 33)
        return build(captured, self.text, memory, "decode", self.number)

"""Keys of input lines that nothing reads, though their names say that somebody means them to be read.

Any other key is the user's own, a right answer for example, and not worth a word.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterable

from kcache_cli.text import json_line

READ = ("id", "prompt", "messages")
_FLAGS = {
    "max_tokens": "--max-tokens",
    "max_new_tokens": "--max-tokens",
    "temperature": "--temperature",
    "top_p": "--top-p",
    "top_k": "--top-k",
    "seed": "--seed",
    "stop": "--stop",
}
_NEAR = 0.9
"""So alike are names of eight letters of which one is wrong; ``prompt_id`` and ``_id`` are others' names."""


class Unread:
    """Counts such keys over the lines of a file."""

    def __init__(self) -> None:
        self._firsts: dict[str, int] = {}
        self._counts: Counter[str] = Counter()

    def take(self, line: int, keys: Iterable[str]) -> None:
        """Take in the keys of a line."""
        for key in keys:
            if key not in READ:
                self._firsts.setdefault(key, line)
                self._counts[key] += 1

    def remarks(self) -> list[str]:
        """One for each key that seems to be meant for something."""
        found = []
        for key, first in self._firsts.items():
            near = difflib.get_close_matches(key.lower().replace("-", "_"), (*READ, *_FLAGS), n=1, cutoff=_NEAR)
            if not near:
                continue
            more = f" and {self._counts[key] - 1:,} more" if self._counts[key] > 1 else ""
            flag = _FLAGS.get(near[0])
            meant = f'did you mean "{near[0]}"?' if flag is None else f"{flag} says it for all prompts"
            found.append(f"line {first}{more}: {json_line(key)} is not read; {meant}")
        return found

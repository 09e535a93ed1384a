"""The figures of an answer: for the footer, for ``/stats`` and for ``--json``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kcache_cli.text import size

if TYPE_CHECKING:
    from kcache import Session


_DOT = " · "


@dataclass(frozen=True)
class Figures:
    """Counts, times and bytes after one answer."""

    prompt_tokens: int
    new_prompt_tokens: int
    completion_tokens: int
    ttft_ms: float
    tok_s: float
    device_kv_bytes: int
    host_kv_bytes: int
    full_kv_bytes: int
    link_bytes_per_token: float

    @classmethod
    def of(cls, session: Session) -> Figures | None:
        """Read a session's last turn; None before the first."""
        turn = session.last_turn
        if turn is None:
            return None
        stats = session.cache.stats if session.cache is not None else None
        return cls(
            prompt_tokens=turn.prompt_tokens,
            new_prompt_tokens=turn.new_prompt_tokens,
            completion_tokens=turn.completion_tokens,
            ttft_ms=turn.ttft_ms,
            tok_s=turn.tok_s,
            device_kv_bytes=stats.device_bytes if stats else 0,
            host_kv_bytes=stats.host_bytes if stats else 0,
            full_kv_bytes=stats.full_kv_bytes if stats else 0,
            link_bytes_per_token=turn.link_bytes_per_token,
        )

    def to_json(self, text: str, finish_reason: str | None) -> dict[str, Any]:
        """The object that ``--json`` prints for an answer; without a reason it was stopped."""
        return {
            "text": text,
            "finish_reason": finish_reason,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "ttft_ms": round(self.ttft_ms, 1),
            "tok_s": round(self.tok_s, 2),
            "device_kv_bytes": self.device_kv_bytes,
            "host_kv_bytes": self.host_kv_bytes,
            "full_kv_bytes": self.full_kv_bytes,
            "link_bytes_per_token": round(self.link_bytes_per_token, 1),
        }

    def footer(self, host_only: bool) -> str:
        """Two lines to print under an answer."""
        new = f" ({self.new_prompt_tokens:,} new)" if self.new_prompt_tokens < self.prompt_tokens else ""
        tokens = f"prompt {self.prompt_tokens:,}{new} · answer {self.completion_tokens:,} tokens"
        times = f"TTFT {_seconds(self.ttft_ms)} · {self.tok_s:.1f} tok/s"
        device = "device tier (RAM)" if host_only else "device"
        tiers = f"{device} {size(self.device_kv_bytes)} · host tier {size(self.host_kv_bytes)}"
        full = f"full KV cache {size(self.full_kv_bytes)}"
        link = f"link {self.link_bytes_per_token / 1e6:.2f} MB/token"
        run = "host-only run: " if host_only else ""
        return f"{tokens} · {times}\n{run}{tiers} · {full} · {link}"


def between_figures(text: str, width: int | None) -> str:
    """Break lines of more than ``width`` columns between figures, where there is a dot; None is no limit."""
    return "\n".join(piece for line in text.split("\n") for piece in _pieces(line.split(_DOT), width))


def _pieces(figures: list[str], width: int | None) -> list[str]:
    pieces = figures[:1]
    for figure in figures[1:]:
        longer = pieces[-1] + _DOT + figure
        if width is None or len(longer) <= width:
            pieces[-1] = longer
        else:
            pieces.append(figure)
    return pieces


def _seconds(ms: float) -> str:
    return f"{ms:.0f} ms" if ms < 1000 else f"{ms / 1000:.1f} s"

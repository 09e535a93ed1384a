"""Numbers as people read them."""

from __future__ import annotations

from kcache_cli.text import size

__all__ = ["bytes_short", "count", "figure", "percent", "position", "rate", "seconds", "size"]


def bytes_short(value: float) -> str:
    """``820K``, ``71M``, ``1.3G``: for a narrow column."""
    for unit in ("B", "K", "M", "G"):
        if abs(value) < 999.5:
            return f"{value:.1f}{unit}" if unit != "B" and abs(value) < 9.95 else f"{value:.0f}{unit}"
        value /= 1024
    return f"{value:.1f}T"


def rate(value: float | None) -> str:
    """Bytes a second as ``20.6 MB/s``."""
    if value is None:
        return "– MB/s"
    if value >= 1e9:
        return f"{value / 1e9:.2f} GB/s"
    return f"{value / 1e6:.1f} MB/s"


def seconds(value_s: float | None) -> str:
    """``24 ms``, ``13.1 s``, ``2:05``."""
    if value_s is None:
        return "–"
    if value_s < 1:
        return f"{value_s * 1e3:.0f} ms"
    if value_s < 100:
        return f"{value_s:.1f} s"
    return clock(value_s)


def clock(value_s: float) -> str:
    """``0:12``, ``1:02:03``."""
    minutes, rest = divmod(int(value_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def figure(value: float) -> str:
    """``7.2``, ``132``: as precise as it is read."""
    return f"{value:.1f}" if value < 99.95 else f"{value:,.0f}"


def percent(share: float | None) -> str:
    """A share as ``82 %``."""
    if share is None:
        return "–"
    return f"{share:.1%}".replace("%", " %") if 0 < share < 0.0995 else f"{share:.0%}".replace("%", " %")


def count(value: float) -> str:
    """``812``, ``5.7k``, ``1.2M``."""
    if value < 10_000:
        return f"{value:,.0f}"
    return f"{value / 1e3:,.0f}k" if value < 1e6 else f"{value / 1e6:,.1f}M"


def position(value: int) -> str:
    """A place in the context as ``512``, ``4k``, ``1.5k``."""
    if value < 1024:
        return str(value)
    return f"{value / 1024:.2f}".rstrip("0").rstrip(".") + "k"

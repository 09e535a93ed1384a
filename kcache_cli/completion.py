"""What the shell offers for an argument that is half typed."""

from __future__ import annotations

from pathlib import Path


def complete_model(incomplete: str) -> list[str]:
    """Known and cached model names."""
    try:
        import kcache

        names = [entry.name for entry in kcache.known_models()]
    except Exception:
        # A completion has nowhere to report an error to: offer nothing.
        return []
    return [name for name in names if name.startswith(incomplete)]


def complete_gpu(incomplete: str) -> list[str]:
    """Cards that plans know."""
    from kcache.speed.cards import CARDS

    return [card.name for card in CARDS if card.name.startswith(incomplete.lower())]


def complete_policy(incomplete: str) -> list[str]:
    """Policy names, profiles, and TOML files in the folder that is being typed."""
    from kcache_cli.profiles import NAMES, profiles

    folder = Path(incomplete).parent
    files = [str(path) for path in folder.glob("*.toml")] if folder.is_dir() else []
    return [name for name in [*NAMES, *profiles(), *sorted(files)] if name.startswith(incomplete)]

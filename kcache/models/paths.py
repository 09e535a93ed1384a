"""Where kcache keeps what it may fetch again: the user's cache folder, or ``KCACHE_HOME``."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path | None:
    """Return the folder that ``KCACHE_HOME`` names for everything kcache keeps; None where it is not set."""
    named = os.environ.get("KCACHE_HOME", "").strip()
    return Path(named).expanduser().absolute() if named else None


def cache_dir() -> Path:
    """Return kcache's cache folder: ``KCACHE_HOME`` where it is set, else the platform's place for caches.

    The folder need not exist yet.
    """
    from platformdirs import user_cache_path

    return home() or user_cache_path("kcache", appauthor=False)

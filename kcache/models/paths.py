"""Where kcache keeps what it may fetch again: the user's cache folder, or ``KCACHE_HOME``."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """Return kcache's cache folder: ``KCACHE_HOME`` where it is set, else the platform's place for caches.

    The folder need not exist yet.
    """
    home = os.environ.get("KCACHE_HOME", "").strip()
    if home:
        return Path(home).expanduser().absolute()
    from platformdirs import user_cache_path

    return user_cache_path("kcache", appauthor=False)

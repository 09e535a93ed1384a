"""Where the command line keeps its own files: settings, chat history, what was measured.

``KCACHE_CONFIG`` names the settings file; ``KCACHE_HOME`` moves everything kcache keeps under one folder.
"""

from __future__ import annotations

import os
from pathlib import Path

from kcache.models.paths import home

PREFIX = "KCACHE_"
"""What the names of our environment variables begin with."""


def config_file() -> Path:
    """The settings file, which need not exist."""
    named = os.environ.get("KCACHE_CONFIG")
    if named:
        return Path(named).expanduser()
    from platformdirs import user_config_path

    return user_config_path("kcache") / "config.toml"


def history_file() -> Path:
    """The chat history, readable by its owner alone."""
    return _state() / "chat_history"


def links_file() -> Path:
    """How fast links to devices were measured to be."""
    return _state() / "links.json"


def _state() -> Path:
    from platformdirs import user_state_path

    return home() or user_state_path("kcache")

"""Names of ``KCACHE_*`` variables: one that is misspelled would be ignored in silence.

The settings, and with them pydantic, are only imported where there is a name to compare with theirs.
"""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping

from kcache_cli.exits import warn
from kcache_cli.paths import PREFIX

OTHERS = ("CONFIG", "DEBUG", "HOME", "WATCH_TOKEN", "WEB")
"""Variables that are no settings, without the prefix."""


def warn_of_misspelled(environ: Mapping[str, str] = os.environ) -> None:
    """Warn of each variable that nothing reads and whose name is close to one that is read."""
    names = {name: name.upper().removeprefix(PREFIX) for name in environ if name.upper().startswith(PREFIX)}
    if set(names.values()) <= set(OTHERS):
        return
    from kcache_cli.settings import Settings

    known = [*map(str.upper, Settings.model_fields), *OTHERS]
    for name, short in names.items():
        near = [] if short in known else difflib.get_close_matches(short, known, n=1)
        if near:
            warn(f"unknown variable {name}; did you mean {PREFIX}{near[0]}?")

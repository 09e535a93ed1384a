"""Policies by name: those of the code, and profiles that were tuned for a model."""

from __future__ import annotations

from pathlib import Path

import kcache

NAMES = ("default", "paper")


def profiles() -> dict[str, Path]:
    """The profiles that come with kcache, by the name of the model each was found for."""
    return {path.stem: path for path in sorted((Path(kcache.__file__).parent / "profiles").glob("*.toml"))}

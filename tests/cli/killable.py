"""``kcache`` on a slow fake engine, as a process of its own that a test can kill."""

from __future__ import annotations

from kcache_cli.app import app
from tests.cli.fakes import FakeEngine

if __name__ == "__main__":
    app(prog_name="kcache", obj=FakeEngine([["word "] * 1000], step_s=0.02, light=True))

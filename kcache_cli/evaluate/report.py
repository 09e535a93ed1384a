"""What ``kcache eval needle``, ``kcache eval tasks`` and ``kcache tune`` say when they end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from kcache_cli.exits import warn
from kcache_cli.rows.formats import Row
from kcache_cli.rows.store import Store, say_skipped


def warn_if_exact(rows: Sequence[Row]) -> None:
    """Warn of rows that should tell what TopN costs and were decoded exactly; an empty reply took no step."""
    kcache = [row for row in rows if row["engine"] == "kcache" and row["reply"] != ""]
    exact = sum(row["rows_fetched"] == 0 for row in kcache)
    if exact:
        warn(
            f"no step used TopN in {exact} of {len(kcache)} rows, which says nothing of it: use --dense-below 0, "
            "--offload all, and fewer --dense-layers than the model has"
        )


def finish(store: Store, summary: str, skipped: int = 0, chart: Path | None = None) -> None:
    """Print the summary if the rows went to a file, and say what is where."""
    say_skipped(skipped)
    if store.target is not None:
        sys.stdout.write(summary)
    store.say_where(chart)

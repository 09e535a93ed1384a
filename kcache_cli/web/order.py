"""What the dashboard in a browser shall show, handed to its process in the environment: never on a command line."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

VARIABLE = "KCACHE_WEB"


@dataclass(frozen=True)
class Order:
    """Which run to look at; see :func:`kcache_cli.inspect.choose.choose`."""

    file: str | None = None
    pid: int | None = None
    address: str | None = None

    @classmethod
    def of(cls, file: Path | None, pid: int | None, address: str | None) -> Order:
        """Make an order of the command's arguments; a file is found from anywhere."""
        return cls(None if file is None else str(file.expanduser().absolute()), pid, address)

    def put(self) -> None:
        """Leave it in the environment for processes that this one starts."""
        os.environ[VARIABLE] = json.dumps(asdict(self))

    @classmethod
    def take(cls) -> Order:
        """Find it there."""
        return cls(**json.loads(os.environ[VARIABLE]))

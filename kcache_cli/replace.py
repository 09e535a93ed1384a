"""Writing a finished file: through a temporary one beside it, so that a file is whole or not there."""

from __future__ import annotations

from pathlib import Path
from tempfile import NamedTemporaryFile


def replace(target: Path, data: bytes) -> None:
    """Put ``data`` where ``target`` is; a link is followed, a device or pipe written to."""
    target = target.resolve()
    if target.exists() and not target.is_file():
        target.write_bytes(data)
        return
    mode = target.stat().st_mode & 0o777 if target.exists() else 0o644
    with NamedTemporaryFile(dir=target.parent, delete=False) as file:
        file.write(data)
    scratch = Path(file.name)
    scratch.chmod(mode)
    scratch.replace(target)

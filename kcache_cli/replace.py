"""Writing a finished file: through a temporary one beside it, so that a file is whole or not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import NamedTemporaryFile


def replace(target: Path, data: bytes) -> None:
    """Put ``data`` where ``target`` is; a link is followed, a device or pipe written to."""
    with naming(target):
        target = target.resolve()
        if target.exists() and not target.is_file():
            target.write_bytes(data)
            return
        mode = target.stat().st_mode & 0o777 if target.exists() else 0o644
        with NamedTemporaryFile(dir=target.parent, delete=False) as file:
            scratch = Path(file.name)
            try:
                file.write(data)
                file.close()
                scratch.chmod(mode)
                scratch.replace(target)
            except BaseException:
                scratch.unlink(missing_ok=True)
                raise


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the disk say which file it was."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None

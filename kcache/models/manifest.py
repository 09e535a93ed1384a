"""Know whether the files of a folder are the ones that were put there.

A manifest (``kcache.json`` in the folder) holds size, modification time and SHA-256 of each file. A check compares
sizes and times, which costs nothing, and hashes only files whose time has changed (a copied cache folder, say).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

MANIFEST = "kcache.json"


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, made_from: str) -> None:
    """Describe every file of ``folder`` as it now is, and flush all of it to the disk.

    Parameters
    ----------
    folder : Path
    made_from : str
        What the files were made from and how; a manifest with another value no longer matches.
    """
    files = {}
    for path in sorted(folder.iterdir()):
        if path.name == MANIFEST:
            continue
        _flush(path)
        entry = path.stat()
        files[path.name] = {"size": entry.st_size, "mtime_ns": entry.st_mtime_ns, "sha256": sha256(path)}
    _write(folder, {"made_from": made_from, "files": files})


def check_manifest(folder: Path, made_from: str) -> bool:
    """Return whether ``folder`` holds exactly what its manifest says, made from ``made_from``."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        if manifest["made_from"] != made_from:
            return False
        touched = False
        for name, known in manifest["files"].items():
            entry = (folder / name).stat()
            if entry.st_size != known["size"]:
                return False
            if entry.st_mtime_ns != known["mtime_ns"]:
                if sha256(folder / name) != known["sha256"]:
                    return False
                known["mtime_ns"] = entry.st_mtime_ns
                touched = True
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    if touched:
        with contextlib.suppress(OSError):  # a read-only folder is hashed again next time
            _write(folder, manifest)
    return True


def _write(folder: Path, manifest: dict[str, Any]) -> None:
    new = folder / f"{MANIFEST}.{os.getpid()}.new"
    new.write_text(json.dumps(manifest, indent=1), encoding="utf-8")
    _flush(new)
    new.replace(folder / MANIFEST)


def _flush(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())

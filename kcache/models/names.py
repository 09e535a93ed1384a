"""Which models there are to name: where a name leads, what is already on this machine, and fetching ahead of use."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kcache.errors import InputError, ModelNotFoundError, expect
from kcache.models import hub
from kcache.models.demo import SMOLLM2, ensure
from kcache.models.progress import Progress, folder_bytes, ignore_progress

SourceKind = Literal["demo", "local", "hub"]


@dataclass(frozen=True)
class Source:
    """Where a model's files are or come from.

    Attributes
    ----------
    name : str
        What the user called it.
    kind : {"demo", "local", "hub"}
    folder : Path or None
        The folder of a local model.
    gguf_file : str or None
        File inside the folder or repository that holds the model.
    revision : str or None
        Branch, tag or commit on the hub.
    """

    name: str
    kind: SourceKind
    folder: Path | None = None
    gguf_file: str | None = None
    revision: str | None = None

    def fetch(self, progress: Progress = ignore_progress, *, weights: bool = True, code: bool = False) -> Path:
        """Return a local folder with the model's files, fetching what is missing.

        Raises
        ------
        ModelNotFoundError, DownloadError
        """
        if self.folder is not None:
            return self.folder
        if self.kind == "demo":
            return ensure(SMOLLM2, progress)
        return hub.fetch(
            self.name, progress, revision=self.revision, gguf_file=self.gguf_file, code=code, weights=weights
        )


@dataclass(frozen=True)
class ModelEntry:
    """One line of ``kcache models``.

    Attributes
    ----------
    name : str
        What to give to :func:`kcache.load`.
    kind : {"demo", "hub"}
    description : str
    path : Path or None
        Where its files are; None when it is not on this machine yet.
    size_bytes : int
        Bytes on this machine, or those it will take for a model that is not there yet.
    """

    name: str
    kind: SourceKind
    description: str
    path: Path | None
    size_bytes: int

    @property
    def ready(self) -> bool:
        """Whether the model is on this machine."""
        return self.path is not None


def find_source(name: str | os.PathLike[str], *, revision: str | None = None, gguf_file: str | None = None) -> Source:
    """Say where a model's name leads, looking at local files only.

    ``smollm2`` is the demo model; then a folder or a ``.gguf`` file that exists; anything else is a hub id.

    Raises
    ------
    InputError
        If ``name`` is neither text nor a path, or ``revision`` or ``gguf_file`` does not apply.
    ModelNotFoundError
        If the name can be none of the three.
    """
    expect((str, os.PathLike), "name", name, "the name or path of a model")
    text = os.fspath(name)
    if text == SMOLLM2.name:
        if revision is not None or gguf_file is not None:
            raise InputError(f"{SMOLLM2.name} has one form only; leave out revision and gguf_file")
        return Source(text, "demo")
    path = Path(text).expanduser()
    if text.strip() and path.exists():
        if revision is not None:
            raise InputError(
                f"revision={revision!r} is for models on the hub, and {text} is on this machine; leave it out"
            )
        return _local(text, path, gguf_file)
    if text.endswith(".gguf") or path.is_absolute() or text.startswith((".", "~")) or text.count("/") > 1:
        raise ModelNotFoundError(
            f"there is no file or folder {text!r}; check the path, or use smollm2 (the demo model)"
        )
    if not text.strip():
        raise hub.unknown_name(text)
    return Source(text, "hub", gguf_file=gguf_file, revision=revision)


def _local(text: str, path: Path, gguf_file: str | None) -> Source:
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise ModelNotFoundError(
                f"{text} is a file but no .gguf; give the folder that holds the model's config.json"
            )
        return Source(text, "local", path.parent, path.name)
    if gguf_file is not None:
        if not (path / gguf_file).is_file():
            raise ModelNotFoundError(f"the folder {text} has no file {gguf_file}; check gguf_file")
    elif not (path / "config.json").is_file():
        found = sorted(file.name for file in path.glob("*.gguf"))
        hint = f"choose its GGUF file with gguf_file={found[0]!r}" if found else "give the folder of a saved model"
        raise ModelNotFoundError(f"the folder {text} has no config.json; {hint}")
    return Source(text, "local", path, gguf_file)


def pull(
    name: str,
    progress: Progress | None = None,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
) -> Path:
    """Fetch a model without loading it, and return the folder it is in.

    Parameters
    ----------
    name : str
        ``smollm2``, or a hub id; a local folder is returned as it is.
    progress : callable, optional
        Called with bytes done, bytes in all, and a label.

    Raises
    ------
    ModelNotFoundError, DownloadError, InputError
    """
    return find_source(name, revision=revision, gguf_file=gguf_file).fetch(progress or ignore_progress)


def known_models() -> list[ModelEntry]:
    """List the models that can be named without thinking: the demo model, then those in the hub's cache."""
    ready = SMOLLM2.ready
    folder = SMOLLM2.folder
    entry = ModelEntry(
        SMOLLM2.name,
        "demo",
        SMOLLM2.description,
        folder if ready else None,
        folder_bytes(folder) if ready else SMOLLM2.disk_bytes,
    )
    return [entry, *_hub_models()]


def _hub_models() -> list[ModelEntry]:
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir().repos
    except (CacheNotFound, OSError):
        return []
    return [
        ModelEntry(repo.repo_id, "hub", "in the hub's cache", Path(repo.repo_path), int(repo.size_on_disk))
        for repo in sorted(repos, key=lambda repo: repo.repo_id)
        if repo.repo_type == "model"
    ]

"""Bring the files of a Hugging Face hub model into its cache: only those needed, and without long waits.

One request asks the hub what a model holds. When that request fails, the answer is what the cache already has, or one
clear error at once: the hub client's own way is to try each file six times first. With the listing at hand only one
set of weights is fetched (safetensors if there are any), and the progress is in bytes.
"""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from kcache.errors import DownloadError, ModelNotFoundError
from kcache.models.progress import Progress, ignore_progress, watch_folder

_TIMEOUT_S = 10.0
_TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "additional_chat_templates/*.jinja")


def fetch(
    repo: str,
    progress: Progress,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    code: bool = False,
    weights: bool = True,
) -> Path:
    """Return a local folder with the files of hub model ``repo``, fetching what is missing.

    Parameters
    ----------
    repo : str
        A hub id, ``owner/name``.
    progress : callable
        Told the bytes that have arrived.
    revision : str, optional
        Branch, tag or commit; the default branch if left out.
    gguf_file : str, optional
        A GGUF file of the repository to take instead of safetensors.
    code : bool
        Fetch Python files too, for models whose code is trusted.
    weights : bool
        Fetch weights; without, only what describes the model (a GGUF file describes itself, so it is fetched).

    Raises
    ------
    ModelNotFoundError
        If there is no such model, revision or file, access is not granted, or the hub cannot be reached and the cache
        does not have it.
    DownloadError
        If the download itself fails.
    """
    listing = _listing(repo, revision)
    if listing is None:
        return _cached(repo, revision, weights, gguf_file)
    commit, sizes = listing
    files = choose_files(repo, list(sizes), gguf_file=gguf_file, code=code, weights=weights)
    return _download(repo, revision, commit, {name: sizes[name] for name in files}, progress if weights else None)


def choose_files(repo: str, names: list[str], *, gguf_file: str | None, code: bool, weights: bool) -> list[str]:
    """Pick the files to fetch from the names of all files of a repository."""
    patterns = [*_TEXT_FILES, *(["*.py"] if code else [])]
    texts = [n for n in names if any(n.count("/") == p.count("/") and fnmatch(n, p) for p in patterns)]
    top = [n for n in names if "/" not in n]
    if gguf_file is not None:
        if gguf_file not in names:
            raise ModelNotFoundError(f"{repo} has no file {gguf_file}; {_gguf_hint(names)}")
        return [*texts, gguf_file]
    if "config.json" not in names:
        raise ModelNotFoundError(f"{repo} has no config.json, so transformers cannot load it; {_gguf_hint(names)}")
    if not weights:
        return texts
    tensors = [n for n in top if n.endswith(".safetensors")]
    named = [n for n in tensors if n.startswith("model")]
    pickles = [n for n in top if fnmatch(n, "pytorch_model*.bin")]
    chosen = named or tensors or pickles
    if not chosen:
        raise ModelNotFoundError(f"{repo} has no safetensors weights; {_gguf_hint(names)}")
    return texts + chosen


def _gguf_hint(names: list[str]) -> str:
    found = sorted(n for n in names if n.lower().endswith(".gguf"))
    if not found:
        return "it has no GGUF files either; choose another model"
    return f"choose one of its GGUF files with gguf_file: {', '.join(found[:4])}{', …' if len(found) > 4 else ''}"


def _listing(repo: str, revision: str | None) -> tuple[str, dict[str, int]] | None:
    """Return commit and file sizes of a repository, or None when the hub cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    try:
        info = HfApi().model_info(repo, revision=revision, timeout=_TIMEOUT_S, files_metadata=True)
    except GatedRepoError as error:
        raise ModelNotFoundError(
            f"{repo} is gated: accept its terms on the hub and log in with `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"the hub has no model {repo!r}, or it is private: check the spelling, or log in with `hf auth login`"
        ) from error
    except RevisionNotFoundError as error:
        raise ModelNotFoundError(f"{repo} has no revision {revision!r}; name a branch, tag or commit") from error
    except HFValidationError as error:
        raise unknown_name(repo) from error
    except Exception:  # whatever the client's transport raises: no network, a timeout, offline mode
        return None
    return str(info.sha), {file.rfilename: int(file.size or 0) for file in info.siblings or ()}


def unknown_name(name: str) -> ModelNotFoundError:
    """Return the error for a name that is no known model, folder or hub id."""
    return ModelNotFoundError(
        f"unknown model {name!r}: give smollm2 (the demo model), a folder with a config.json, a .gguf file, "
        "or a hub id such as owner/name"
    )


def _cached(repo: str, revision: str | None, weights: bool, gguf_file: str | None) -> Path:
    """Return the cache's snapshot of a model that the hub could not be asked about."""
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    anchor = gguf_file or "config.json"
    try:
        found = try_to_load_from_cache(repo, anchor, revision=revision)
    except HFValidationError as error:
        raise unknown_name(repo) from error
    if not isinstance(found, str):
        raise ModelNotFoundError(
            f"{repo!r} is no local folder, it is not in the hub's cache, and the hub cannot be reached; "
            "check the name and the network, or use smollm2 (the demo model)"
        )
    folder = Path(found).parents[anchor.count("/")]
    have = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    try:
        choose_files(repo, have, gguf_file=gguf_file, code=False, weights=weights)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"the hub's cache holds only a part of {repo}, and the hub cannot be reached; check the network"
        ) from error
    return folder


def _download(repo: str, revision: str | None, commit: str, sizes: dict[str, int], progress: Progress | None) -> Path:
    """Fetch the files named in ``sizes``; by revision, not commit, so that the cache knows the revision offline."""
    from huggingface_hub import snapshot_download, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_CACHE
    from huggingface_hub.file_download import repo_folder_name
    from huggingface_hub.utils.tqdm import tqdm

    class Silent(tqdm):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **{**kwargs, "disable": True})

    missing = sum(
        size for name, size in sizes.items() if not isinstance(try_to_load_from_cache(repo, name, revision=commit), str)
    )
    blobs = Path(HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model") / "blobs"
    report = progress if progress and missing else ignore_progress
    try:
        with watch_folder(blobs, missing, f"downloading {repo}", report):
            return Path(snapshot_download(repo, revision=revision, allow_patterns=list(sizes), tqdm_class=Silent))
    except Exception as error:
        raise DownloadError(
            f"the download of {repo} failed ({' '.join(str(error).split())[:200]}); what arrived is kept, try again"
        ) from error

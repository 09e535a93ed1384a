"""Make the pictures of the dashboard from real runs of the demo model: ``python docs/images/dashboard.py``.

A document of some 5,700 tokens with a needle in its middle is read, and the needle asked for; both runs are recorded,
and pictures are taken of the recordings. ``dashboard.png`` is of the default policy. ``needle-1.png`` to
``needle-3.png`` are of N = 64, where less is picked besides: while the answer begins, at the step that says what the
needle says, and after it.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from kcache.watch.recording import open_recording
from kcache.watch.source import Source

sys.path.insert(0, str(Path(__file__).parent))
from make import HERE, QUESTION, handbook

CODE = "7413"
MOST_BYTES = 300_000


def record(folder: Path, name: str, *flags: str) -> Path:
    """Ask the question; returns the recording."""
    document, target = folder / "handbook.txt", folder / f"{name}.kcr"
    document.write_text(handbook())
    command = [sys.executable, "-m", "kcache_cli", "chat", "-f", str(document), "--temperature", "0", "-n", "30"]
    subprocess.run([*command, *flags, "--record", str(target)], input=QUESTION, text=True, check=True)
    return target


def moments(source: Source) -> tuple[int, int, int]:
    """Steps before the code, in the middle of it, and after it."""
    latest = source.latest()
    assert latest is not None
    start = latest.marks[-1].start
    text = source.pieces(0, latest.tokens)
    # The token at position p is in the cache from the step on that reads it, and the next is what that step says.
    said = ["".join(text[start : start + count]) for count in range(latest.tokens - start + 1)]
    first = next((step for step, words in enumerate(said) if CODE[0] in words), None)
    if first is None or CODE not in said[-1]:
        raise SystemExit(f"the model did not find the needle: {said[-1]!r}")
    last = next(step for step, words in enumerate(said) if CODE in words)
    return max(1, first - 4), (first + last) // 2, min(last + 3, latest.step)


def picture(recording: Path, name: str, *flags: str) -> None:
    """Take a picture of a recording."""
    target = HERE / name
    command = [sys.executable, "-m", "kcache_cli", "inspect", str(recording), "--export-png", str(target)]
    subprocess.run([*command, "--overwrite", *flags], check=True)
    if target.stat().st_size > MOST_BYTES:
        raise SystemExit(f"{target} is {target.stat().st_size:,} bytes; at most {MOST_BYTES:,} are wanted")


def main() -> None:
    """Record, unless recordings are given, and take the pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--keep", type=Path, help="a folder to leave the recordings in, and to find them in again")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        whole, few = folder / "default.kcr", folder / "needle.kcr"
        if not whole.exists():
            record(folder, "default")
        if not few.exists():
            record(folder, "needle", "--topn", "64")
        _, found, _ = moments(open_recording(whole))
        picture(whole, "dashboard.png", "--at", str(found), "--size", "120x40")
        for number, step in enumerate(moments(open_recording(few)), start=1):
            picture(few, f"needle-{number}.png", "--at", str(step), "--size", "100x34")


if __name__ == "__main__":
    main()

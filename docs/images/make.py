"""Make the pictures of the README from real runs of the demo model: ``python docs/images/make.py``."""

from __future__ import annotations

import io
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from rich.console import Console
from rich.text import Text

HERE = Path(__file__).parent
QUESTION = "What is the secret code of the blue lighthouse?"
NEEDLE = "\n\nThe secret code of the blue lighthouse is 7413.\n\n"


def handbook() -> str:
    """A 24,000-character document out of Python's own reference, a needle in its middle."""
    text = "\n\n".join(topics[name] for name in sorted(topics))[:24000]
    return text[: len(text) // 2] + NEEDLE + text[len(text) // 2 :]


def main() -> None:
    """Ask the question and export what the terminal shows."""
    with tempfile.TemporaryDirectory() as folder:
        document = Path(folder) / "handbook.txt"
        document.write_text(handbook())
        command = [sys.executable, "-m", "kcache_cli", "chat", "-f", str(document), "--temperature", "0", "-n", "15"]
        run = subprocess.run(command, input=QUESTION, capture_output=True, text=True, check=True)
    console = Console(record=True, width=112, file=io.StringIO())
    console.print(Text("$ ", "green") + Text("kcache chat -f handbook.txt --temperature 0", "bold"))
    console.print(Text(">>> ", "cyan") + Text(QUESTION))
    console.print(Text(run.stdout.strip()))
    console.print(Text("\n".join(run.stderr.strip().splitlines()[-2:]), "dim"))
    console.save_svg(str(HERE / "chat.svg"), title="kcache")


if __name__ == "__main__":
    main()

"""Benchmarks by name, and benchmark data from a folder instead of the hub.

A task of lm-eval is a YAML file. For local data a file of the same name is written that includes the stock one and
names other data: prompts, worked examples and scoring stay those of lm-eval.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kcache.errors import InputError

_BBH = "bbh_cot_fewshot_"
_SHORT = {"gsm8k": "gsm8k_cot"}
_FOLDERS = ("gsm8k", "bbh/cot_fewshot", "triviaqa")


def stock_name(name: str) -> str:
    """Return what lm-eval calls a task.

    ``gsm8k`` is its ``gsm8k_cot``, whose worked examples come with the task; ``bbh`` its group of that name, and
    ``bbh:snarks`` one of the group's tasks; other names are its own.
    """
    if name.startswith("bbh:"):
        return _BBH + name.removeprefix("bbh:")
    return _SHORT.get(name, name)


def task_folders(names: Sequence[str], tasks: Path) -> list[Path] | None:
    """Folders below lm-eval's ``tasks`` where these are; None if all must be searched, which takes its time."""
    known = all(name in ("gsm8k", "bbh", "triviaqa") or name.startswith("bbh:") for name in names)
    return [tasks / folder for folder in _FOLDERS] if known else None


@dataclass(frozen=True)
class LocalTask:
    """A task with data of its own: what lm-eval calls it, the stock YAML file, and the data."""

    name: str
    stock: Path
    data: Path
    split: str
    field: str | None = None
    changes: tuple[str, ...] = ()

    def write(self, folder: Path) -> None:
        """Write the task's YAML file."""
        lines = [
            f"include: {json.dumps(str(self.stock))}",
            f"task: {self.name}",
            "dataset_path: json",
            "dataset_name: null",
            "dataset_kwargs:",
            f"  data_files: {{{self.split}: {json.dumps(str(self.data))}}}",
            *([f"  field: {self.field}"] if self.field else []),
            *self.changes,
        ]
        (folder / f"{self.name}.yaml").write_text("\n".join(lines) + "\n", encoding="utf-8")


def local_tasks(names: Sequence[str], data: Path, tasks: Path) -> list[LocalTask]:
    """Find the data of ``gsm8k``, ``bbh``, ``bbh:…`` and ``triviaqa`` in a folder.

    Parameters
    ----------
    names : sequence of str
    data : Path
        Holds ``gsm8k/test.jsonl`` (or ``test.jsonl``), ``bbh/*.json`` and ``triviaqa/validation.jsonl``.
    tasks : Path
        lm-eval's own folder of tasks.

    Raises
    ------
    InputError
        If a file is missing, or a task's data cannot come from a folder.
    """
    if not data.is_dir():
        raise InputError(f"data {data}: is not a folder")
    found: list[LocalTask] = []
    for name in names:
        if name == "gsm8k":
            files = [data / "gsm8k" / "test.jsonl", data / "test.jsonl"]
            stock = tasks / "gsm8k" / "gsm8k-cot.yaml"
            found.append(LocalTask(stock_name(name), stock, _first(files, name), "test"))
        elif name == "bbh" or name.startswith("bbh:"):
            stocks = sorted((tasks / "bbh" / "cot_fewshot").glob("[a-z]*.yaml"))
            asked = [stock for stock in stocks if name in ("bbh", f"bbh:{stock.stem}")]
            if not asked:
                known = ", ".join(stock.stem for stock in stocks)
                raise InputError(f"no task {name}; after bbh: comes one of {known}")
            for stock in asked:
                file = _first([data / "bbh" / f"{stock.stem}.json", data / f"{stock.stem}.json"], name)
                found.append(LocalTask(_BBH + stock.stem, stock, file, "test", "examples"))
        elif name == "triviaqa":
            file = _first([data / "triviaqa" / "validation.jsonl"], name)
            changes = ("training_split: null",)
            found.append(LocalTask(name, tasks / "triviaqa" / "default.yaml", file, "validation", changes=changes))
        else:
            raise InputError(f"data serves gsm8k, bbh and triviaqa; leave it out to fetch {name} from the hub")
    return found


def _first(files: Sequence[Path], name: str) -> Path:
    there = next((file for file in files if file.is_file()), None)
    if there is None:
        raise InputError(f"no data for {name}: {files[0]} does not exist")
    return there.resolve()

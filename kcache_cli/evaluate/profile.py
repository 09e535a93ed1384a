"""A policy written as a TOML profile, with what it was measured to be in comments."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from kcache.errors import InputError
from kcache_cli.replace import replace
from kcache_cli.rows.formats import Row, versions
from kcache_cli.rows.store import check_file
from kcache_cli.text import one_line

if TYPE_CHECKING:
    from kcache.policy import Policy

_OF_A_MACHINE = ("offload", "kv_budget", "resident_layers", "prefill_chunk", "backend", "graph")
"""Fields a profile leaves to whoever uses it."""


def profile_file(name: str | None, model: str, overwrite: bool) -> Path:
    """The file to write, which can be written; by default called after the model, in the current folder.

    Raises
    ------
    InputError
    """
    path = check_file("--profile", name or f"{_called(model)}.toml")
    assert path is not None
    if path.exists() and not overwrite:
        raise InputError(f"--profile {path}: is there already; give --overwrite to replace it, or another name")
    return path


def _called(model: str) -> str:
    """A model's name as that of a file, without owner and folders."""
    name = Path(model).expanduser().resolve().name if Path(model).expanduser().is_dir() else model.rpartition("/")[2]
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "model"


def write_profile(path: Path, policy: Policy, row: Row) -> None:
    """Write a policy and the row it was measured to be."""
    replace(path, profile(policy, row).encode())


def profile(policy: Policy, row: Row) -> str:
    """The text of a profile."""
    values = {name: value for name, value in policy.to_dict().items() if name not in _OF_A_MACHINE}
    about = "".join(f"# {line}".rstrip() + "\n" for line in _about(row))
    return about + "\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in values.items())


def _about(row: Row) -> list[str]:
    error = "" if row["kl_se"] is None else f" ± {row['kl_se']:.4f} (s.e. of the places)"
    places = f"{row['places']} places" if row["places"] > 1 else "1 place"
    return [
        f"Found by kcache tune: the cheapest policy tried whose mean KL from full attention is at most "
        f"{row['target_kl']:g} nats.",
        "",
        f"model     {one_line(row['model'])}, {row['dtype']}",
        f"text      {one_line(row['text'])}, sha256 {row['text_sha256']}",
        f"measured  {row['steps']:,} teacher-forced steps after {row['ctx']:,} tokens at {places}",
        f"KL        {row['kl_mean']:.4f}{error}",
        f"top-1     {row['top1']:.3f}",
        f"link      {row['bytes_h2d_per_token']:,.0f} bytes per token, {row['rows_per_kv_head']:.1f} rows per KV head "
        "and offloaded layer",
        f"device    {row['device_overhead']:.1%} of a full KV cache beside K, of {row['most_device_overhead']:.1%} "
        "allowed",
        f"with      {one_line(', '.join(versions(row)[:-1]))}",
        f"date      {row['env']['time']}",
    ]

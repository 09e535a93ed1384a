"""From flags to a :class:`kcache.Policy`."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kcache.errors import InputError, PolicyError
from kcache.policy import Policy
from kcache_cli.options import PolicyOptions
from kcache_cli.profiles import NAMES, profiles

if TYPE_CHECKING:
    from kcache_cli.settings import Settings

FIELDS = (
    "topn", "offload", "kv_budget", "resident_layers", "dense_layers", "k_bits", "v_bits", "backend", "graph",
)  # fmt: skip


def build_policy(options: PolicyOptions, settings: Settings) -> Policy:
    """Build the policy that flags and settings describe.

    ``--policy`` on the command line starts from that policy alone: only flags change it, not the single policy fields
    of the settings.

    Raises
    ------
    PolicyError
        If a value makes no sense.
    InputError
        If a policy file cannot be read.
    """
    from kcache_cli.settings import fill

    given = options if options.policy is not None else fill(options, settings)
    changes = {name: getattr(given, name) for name in FIELDS if getattr(given, name) is not None}
    return read_policy(given.policy or settings.policy).replace(**changes)


def build_policies(names: Sequence[str] | None, options: PolicyOptions, settings: Settings) -> dict[str, Policy]:
    """Build the policy of each ``--policy``, as :func:`build_policy` does, by name; without any, that of the settings.

    Raises
    ------
    PolicyError, InputError
    """
    if not names:
        return {settings.policy: build_policy(options, settings)}
    return {name: build_policy(replace(options, policy=name), settings) for name in names}


def read_policy(name: str) -> Policy:
    """Return the policy called ``name``, a profile that comes with kcache, or the policy in the TOML file of that name.

    Raises
    ------
    PolicyError, InputError
    """
    if name == "default":
        return Policy()
    if name == "paper":
        return Policy.paper()
    path = profiles().get(name, Path(name).expanduser())
    try:
        values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(
            f"--policy {name}: neither {', '.join([*NAMES, *profiles()])}, nor a file that exists"
        ) from None
    except OSError as error:
        raise InputError(f"--policy {name}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"--policy {name}: not UTF-8 text; a policy file is TOML") from None
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"--policy {name}: not valid TOML: {error}") from None
    try:
        return Policy.from_dict(values)
    except PolicyError as error:
        raise PolicyError(f"{name}: {error}") from None

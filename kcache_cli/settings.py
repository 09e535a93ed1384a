"""Defaults for flags, from the settings file and the environment.

A flag goes before a ``KCACHE_*`` variable, a variable before the settings file, the file before what is built in.
pydantic checks the values; :func:`fill` puts them where a flag was not given.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from kcache.errors import InputError
from kcache.policy import BackendName, Bits, Graph, KeyBits, Offload, parse_bits, parse_bytes, parse_tokens
from kcache_cli import paths
from kcache_cli.options import DtypeName
from kcache_cli.paths import PREFIX

Options = TypeVar("Options")


def _size(given: str | int) -> str | int:
    """A size as it was written, if it is one."""
    parse_bytes(given)
    return given


class Settings(BaseSettings):
    """Every setting, its type and its built-in default; ``None`` leaves the choice to kcache or the model."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, env_ignore_empty=True, extra="forbid", frozen=True)

    model: str = Field("smollm2", min_length=1, description="model of chat and generate")
    device: str = Field("auto", min_length=1, description="auto, cpu, cuda, cuda:1, ...")
    dtype: DtypeName = Field("auto", description="number format of the weights")
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False, description="0 is greedy")
    top_p: float | None = Field(None, gt=0, le=1, allow_inf_nan=False, description="nucleus sampling, 1 is off")
    top_k: int | None = Field(None, ge=0, description="keep the likeliest tokens, 0 is off")
    seed: int | None = Field(None, ge=0, le=2**32 - 1, description="makes sampling repeatable")
    max_tokens: int | None = Field(None, ge=1, description="longest answer, in tokens")
    system: str | None = Field(None, description="system message of chat")
    policy: str = Field("default", min_length=1, description="default, paper, smollm2, or a TOML file")
    topn: int | None = Field(None, ge=1, description="V rows fetched per KV head and step")
    offload: Offload | None = Field(None, description="auto, all, none")
    kv_budget: Annotated[str | int, AfterValidator(_size)] | None = Field(
        None, description="device memory for the cache, like 20GiB"
    )
    resident_layers: int | None = Field(None, ge=0, description="first layers whose V stays on the device")
    dense_layers: int | None = Field(None, ge=0, description="first layers that always attend exactly")
    k_bits: Annotated[KeyBits, BeforeValidator(parse_bits)] | None = Field(
        None, description="of a number of K: auto, 16, 8 or 8+8"
    )
    v_bits: Annotated[Bits, BeforeValidator(parse_bits)] | None = Field(
        None, description="of a number of offloaded V: 16 or 8"
    )
    backend: BackendName | None = Field(None, description="auto, reference, cpu, triton")
    graph: Graph | None = Field(None, description="auto, off")
    ctx: Annotated[int, BeforeValidator(parse_tokens)] | None = Field(
        None, description="context to plan memory for, in tokens"
    )
    batch_size: int | None = Field(None, ge=1, description="prompts that generate decodes together")
    theme: str | None = Field(None, description="colours of the dashboard: kcache-dark, kcache-light, nord, ...")
    ascii: bool = Field(False, description="draw the dashboard with ASCII alone")
    keys: str | None = Field(None, description="other keys for the dashboard, like pause=p,quit=ctrl+q")

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment first, then what the settings file said (given to the constructor)."""
        return env_settings, init_settings


def load_settings() -> Settings:
    """Read the settings.

    Raises
    ------
    InputError
        Naming the file and line, or the variable, that is wrong.
    """
    path = paths.config_file()
    text, values = read_file(path)
    try:
        return Settings(**values)
    except ValidationError as error:
        problem = error.errors()[0]
        name = str(problem["loc"][0]) if problem["loc"] else "?"
        raise InputError(_explain(path, text, name, problem, values)) from None


def read_file(path: Path) -> tuple[str, dict[str, Any]]:
    """Return the text and the values of the settings file; nothing when there is none and none was named."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        if os.environ.get("KCACHE_CONFIG"):
            raise InputError(f"{path} (from KCACHE_CONFIG) does not exist; `kcache config --init` makes one") from None
        return "", {}
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise InputError(f"cannot read the settings file {path}: {reason}") from None
    try:
        return text, tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"{path}: not valid TOML: {error}") from None


def source_of(name: str, file_values: dict[str, Any]) -> str:
    """Where a setting's value comes from: a variable's name, ``file``, or ``built-in``."""
    variable = variable_of(name)
    if variable is not None:
        return variable
    return "file" if name in file_values else "built-in"


def variable_of(name: str) -> str | None:
    """The environment variable that sets ``name`` now, in whatever case it is spelled."""
    return next((key for key, value in os.environ.items() if value and key.upper() == f"{PREFIX}{name}".upper()), None)


def fill(options: Options, settings: Settings) -> Options:
    """Return options whose missing flags are taken from the settings."""
    missing = {
        field.name: getattr(settings, field.name)
        for field in dataclasses.fields(options)  # type: ignore[arg-type]
        if getattr(options, field.name) is None and field.name in Settings.model_fields
    }
    return dataclasses.replace(options, **missing)  # type: ignore[type-var]


def _explain(path: Path, text: str, name: str, problem: Any, values: dict[str, Any]) -> str:
    variable = variable_of(name)
    if variable is not None and name in Settings.model_fields:
        return f"{variable}={os.environ[variable]!r}: {_plain(problem['msg'])}"
    line = next(
        (
            number
            for number, row in enumerate(text.splitlines(), 1)
            if re.match(rf"\s*[\[\"']*{re.escape(name)}\b", row)
        ),
        1,
    )
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, Settings.model_fields, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else "; `kcache config` lists the settings"
        return f"{path}:{line}: unknown setting {name!r}{hint}"
    return f"{path}:{line}: {name} = {values.get(name)!r}: {_plain(problem['msg'])}"


def _plain(message: str) -> str:
    message = message.removeprefix("Value error, ")
    return message[:1].lower() + message[1:]

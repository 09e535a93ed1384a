"""Flags that several commands share, as dataclasses, and the decorator that puts them on a command.

A flag that is not given is ``None``; :func:`kcache_cli.settings.fill` then takes the value from the environment, the
settings file or the built-in default.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from kcache.errors import InputError, PolicyError
from kcache.policy import BackendName, Graph, Offload, Policy, parse_tokens
from kcache_cli.completion import complete_model, complete_policy

DtypeName = Literal["auto", "bfloat16", "float16", "float32"]


def _option(*names: str, help: str, panel: str, default: str = "", metavar: str | None = None, **more: Any) -> Any:
    return typer.Option(
        *names, help=help, rich_help_panel=panel, show_default=default or False, metavar=metavar, **more
    )


def token_count(text: str) -> int:
    """Read a number of tokens, such as ``8192`` or ``8k``, for typer."""
    try:
        return parse_tokens(text)
    except PolicyError as error:
        raise typer.BadParameter(str(error)) from None


_model = functools.partial(_option, panel="Model")
_sampling = functools.partial(_option, panel="Sampling (default: the model's own generation config)")
_policy = functools.partial(_option, panel="Cache policy")


@dataclass(frozen=True)
class ModelOptions:
    """Which model, from where, on what."""

    model: Annotated[
        str | None,
        typer.Argument(
            metavar="MODEL",
            help="A known name, a Hugging Face hub id, or a local folder.",
            show_default="smollm2, the demo model",
            autocompletion=complete_model,
        ),
    ] = None
    device: Annotated[
        str | None, _model("--device", help="auto, cpu, cuda, cuda:1, ...", default="auto", metavar="DEVICE")
    ] = None
    device_map: Annotated[
        Path | None,
        _model(
            "--device-map",
            help='Which module goes where, a JSON file as accelerate has it: {"model.layers.0": 0, "lm_head": "cpu"}.',
            metavar="FILE",
        ),
    ] = None
    dtype: Annotated[DtypeName | None, _model("--dtype", help="Number format of the weights.", default="auto")] = None
    revision: Annotated[str | None, _model("--revision", help="Branch, tag or commit on the hub.", metavar="REV")] = (
        None
    )
    gguf_file: Annotated[
        str | None, _model("--gguf-file", help="A GGUF file in the model's repository or folder.", metavar="NAME")
    ] = None
    trust_remote_code: Annotated[
        bool, _model("--trust-remote-code", help="Run Python code that comes with the model. Off by default.")
    ] = False

    @property
    def name(self) -> str:
        """The model's name, once the settings have been filled in."""
        return self.model or "smollm2"

    def check(self) -> None:
        """Refuse a name that leads nowhere on this machine and can be none on the hub, before torch is imported.

        Raises
        ------
        InputError, ModelNotFoundError
        """
        from kcache.models.names import find_source

        find_source(self.name, revision=self.revision, gguf_file=self.gguf_file)


@dataclass(frozen=True)
class SamplingOptions:
    """How the next token is chosen."""

    temperature: Annotated[float | None, _sampling("--temperature", help="0 is greedy.")] = None
    top_p: Annotated[float | None, _sampling("--top-p", help="Nucleus sampling; 1 is off.")] = None
    top_k: Annotated[int | None, _sampling("--top-k", help="Keep the K likeliest tokens; 0 is off.")] = None
    seed: Annotated[
        int | None, _sampling("--seed", help="Makes sampling repeatable.", min=0, max=2**32 - 1, metavar="INTEGER")
    ] = None


@dataclass(frozen=True)
class PolicyOptions:
    """What is kept where, and what a decode step reads."""

    topn: Annotated[
        int | None, _policy("--topn", help="V rows fetched per KV head and step.", default=str(Policy.topn))
    ] = None
    policy: Annotated[
        str | None,
        _policy(
            "--policy",
            help="default, paper (the scheme as published), smollm2 (what kcache tune found), or a TOML file of policy "
            "fields. Single policy flags change it further.",
            default="default",
            metavar="NAME|FILE",
            autocompletion=complete_policy,
        ),
    ] = None
    offload: Annotated[
        Offload | None,
        _policy(
            "--offload",
            help="V leaves the device: auto = what does not fit the budget, all, none (exact attention).",
            default="auto",
        ),
    ] = None
    kv_budget: Annotated[
        str | None,
        _policy(
            "--kv-budget",
            help="Device memory for the cache, at the context planned for: 20GiB, 512MiB, ...",
            default="what is free",
            metavar="SIZE",
        ),
    ] = None
    resident_layers: Annotated[
        int | None, _policy("--resident-layers", help="Keep V of exactly this many first layers on the device.")
    ] = None
    dense_layers: Annotated[
        int | None,
        _policy("--dense-layers", help="First layers that always attend exactly.", default=str(Policy.dense_layers)),
    ] = None
    k_bits: Annotated[
        str | None,
        _policy(
            "--k-bits",
            help="8: K in half the memory once V has left, scores nearly exact. 8+8: the memory of 16, half the "
            "reading, picks weighed exactly. Both slow on a CPU.",
            default="auto: 8+8 of 16-bit models that kernels decode on CUDA, else 16",
            metavar="auto|16|8|8+8",
            autocompletion=lambda: ["auto", "16", "8", "8+8"],
        ),
    ] = None
    v_bits: Annotated[
        int | None,
        _policy(
            "--v-bits",
            help="8: offloaded V in half the host memory and over the link, nearly exact. Slow on a CPU.",
            default=str(Policy.v_bits),
            metavar="16|8",
            autocompletion=lambda: ["16", "8"],
        ),
    ] = None
    backend: Annotated[BackendName | None, _policy("--backend", help="Who computes a decode step.", default="auto")] = (
        None
    )
    graph: Annotated[
        Graph | None,
        _policy("--graph", help="On CUDA, record a decode step and replay it; off runs each anew.", default="auto"),
    ] = None
    ctx: Annotated[
        int | None,
        _policy(
            "--ctx",
            help="Context to plan memory for, in tokens: 8192, 32k, ...",
            default="the model's",
            metavar="TOKENS",
            parser=token_count,
        ),
    ] = None
    allow_overflow: Annotated[
        bool, _policy("--allow-overflow", help="Go on past the model's context; answers get worse there.")
    ] = False


@dataclass(frozen=True)
class Without:
    """Beside an options dataclass in ``Annotated``: leave these flags out, their fields at their defaults."""

    names: tuple[str, ...]


def with_options(function: Callable[..., None]) -> Callable[..., None]:
    """Replace each parameter whose type is an options dataclass by that dataclass's flags."""
    hints = get_type_hints(function, include_extras=True)
    groups: dict[str, tuple[Any, list[str]]] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(function).parameters.items():
        kind, left_out = _group(hints[name])
        if kind is not None:
            flags = get_type_hints(kind, include_extras=True)
            taken = [field for field in fields(kind) if field.name not in left_out]
            groups[name] = kind, [field.name for field in taken]
            parameters += [
                inspect.Parameter(
                    field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=flags[field.name]
                )
                for field in taken
            ]
        else:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[name]))

    @functools.wraps(function)
    def command(**values: Any) -> None:
        built = {name: kind(**{flag: values.pop(flag) for flag in flags}) for name, (kind, flags) in groups.items()}
        function(**values, **built)

    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


def _group(hint: Any) -> tuple[Any, tuple[str, ...]]:
    """The options dataclass a parameter's type names, and which of its flags are left out; None for other types."""
    if get_origin(hint) is Annotated:
        kind, *notes = get_args(hint)
        left_out = [name for note in notes if isinstance(note, Without) for name in note.names]
        return (kind, tuple(left_out)) if is_dataclass(kind) else (None, ())
    return (hint, ()) if is_dataclass(hint) else (None, ())


def number_list(text: str | None, option: str, default: Sequence[int], *, tokens: bool = False) -> tuple[int, ...]:
    """Read ``64,128``, or with ``tokens`` also ``8k,32k``; the default where nothing was given.

    Raises
    ------
    InputError
        If an entry is not a whole number of at least 1.
    """
    if text is None:
        return tuple(default)
    numbers = []
    for part in text.split(","):
        try:
            numbers.append(parse_tokens(part) if tokens or part.strip().isdigit() else 0)
        except PolicyError:
            numbers.append(0)
        if numbers[-1] < 1:
            example = "8192, 8k or 8k,32k" if tokens else "64 or 64,128"
            raise InputError(f"{option} {text}: {part.strip()!r} is not a number to use; write {example}")
    return tuple(numbers)

"""Load any Hugging Face causal LM with its tokenizer: the demo model, a local folder, a hub id, or a GGUF file.

Everything that can be known without weights is checked first: the name, the data type, the device, and from the config
whether the model is one that kcache can serve. Loading itself is ``from_pretrained`` with accelerate's device map.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.distributed.configuration_utils import DistributedConfig

from kcache.attention.probe import probe
from kcache.errors import InputError, ModelNotFoundError, UnsupportedModelError, expect
from kcache.machine.devices import SPREADS, check_device_map, is_too_old
from kcache.machine.parallel import check_heads
from kcache.machine.threads import let_go_of_threads
from kcache.models.demo import SMOLLM2
from kcache.models.explained import explained, short
from kcache.models.loaded import LoadedModel, Reader
from kcache.models.names import Source, find_source
from kcache.models.progress import Progress, ignore_progress, quiet_transformers
from kcache.models.support import check_supported, context_length

DeviceMap = str | int | torch.device | dict[str, Any] | None
Name = str | os.PathLike[str]

_DTYPE_ALIASES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def load_reader(
    name: Name,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Reader:
    """Load what turns prompts into tokens for a model that others will run; see :func:`load`."""
    source = find_source(name, revision=revision, gguf_file=gguf_file)
    config = load_config(name, revision=revision, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    folder = source.fetch(progress or ignore_progress, weights=source.gguf_file is not None, code=trust_remote_code)
    extra = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    tokenizer = _load_tokenizer(source, folder, trust_remote_code, extra)
    vocabulary = int(config.get_text_config(decoder=True).vocab_size)
    return Reader(source.name, tokenizer, context_length(config), vocabulary)


def load(
    name: Name,
    *,
    device_map: DeviceMap = "auto",
    dtype: torch.dtype | str = "auto",
    revision: str | None = None,
    gguf_file: str | None = None,
    quantization_config: Any = None,
    trust_remote_code: bool = False,
    tensor_parallel: int = 1,
    progress: Progress | None = None,
) -> LoadedModel:
    """Load a causal language model and its tokenizer, for decoding: its parameters ask for no gradients.

    Parameters
    ----------
    name : str or path
        ``"smollm2"`` (the demo model, fetched on first use), a local folder or ``.gguf`` file, or a hub id.
    device_map : str, int, torch.device, dict or None
        As in accelerate: ``"auto"`` spreads the model over the devices there are; ``"cpu"``, ``"cuda:1"``, a map.
    dtype : torch.dtype or str
        ``"auto"`` takes the checkpoint's own.
    revision : str, optional
        Branch, tag or commit of a hub model.
    gguf_file : str, optional
        GGUF file inside the folder or repository.
    quantization_config : optional
        Handed to transformers as it is.
    trust_remote_code : bool
        Run Python code that comes with the model.
    tensor_parallel : int
        Processes to share the model's heads among, started by ``torchrun``; all of them call this. Each then sits on
        its own GPU, or on the CPU where there is none.
    progress : callable, optional
        Called with bytes done, bytes in all, and a label while files are fetched or converted; perhaps from a thread.

    Raises
    ------
    InputError
        If ``name`` is none, or ``dtype`` or ``device_map`` cannot be used here.
    ModelNotFoundError
        If the name leads nowhere, or to a folder that lacks something.
    UnsupportedModelError
        If kcache cannot serve the model, or transformers cannot load it; the message says why.
    DownloadError
        If fetching fails.
    DoesNotFitError
        If the weights do not fit the device.
    """
    torch_dtype = parse_dtype(dtype)
    _check_device_map(device_map)
    if tensor_parallel > 1:
        _check_parallel(device_map)
        device_map = None
    source = find_source(name, revision=revision, gguf_file=gguf_file)
    config = load_config(name, revision=revision, gguf_file=gguf_file, trust_remote_code=trust_remote_code)
    if tensor_parallel > 1:
        check_heads(config, source.name, tensor_parallel)
    folder = source.fetch(progress or ignore_progress, code=trust_remote_code)
    if source.kind == "demo" and torch_dtype == "auto":
        torch_dtype = _faster_than_bf16(device_map) or torch_dtype
    extra: dict[str, Any] = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    tokenizer = _load_tokenizer(source, folder, trust_remote_code, extra)
    if quantization_config is not None:
        extra["quantization_config"] = quantization_config
    if tensor_parallel > 1:
        extra["distributed_config"] = DistributedConfig(tp_plan="auto", tp_size=tensor_parallel)
    with explained(source), quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch_dtype, device_map=device_map, trust_remote_code=trust_remote_code, **extra
        )
    probe(model.eval().requires_grad_(False))
    let_go_of_threads()
    return LoadedModel(source.name, model, tokenizer)


def load_config(
    name: Name,
    *,
    revision: str | None = None,
    gguf_file: str | None = None,
    trust_remote_code: bool = False,
) -> PretrainedConfig:
    """Return a model's config without its weights, having checked that kcache can serve it.

    The demo model's config is built in, so nothing is fetched for it; of a hub model only its small files are. A
    ``config.json`` by itself will do, too.

    Raises
    ------
    ModelNotFoundError, UnsupportedModelError, DownloadError, InputError
        As in :func:`load`.
    """
    expect((str, os.PathLike), "name", name, "the name or path of a model")
    file = Path(name).expanduser()
    if file.suffix == ".json" and not file.exists():
        raise ModelNotFoundError(f"{name}: no such file; give a config.json, a model's folder or a hub id")
    is_config = file.suffix == ".json" and file.is_file() and revision is None and gguf_file is None
    source = (
        Source(str(file), "local", file) if is_config else find_source(name, revision=revision, gguf_file=gguf_file)
    )
    if source.kind == "demo":
        return SMOLLM2.config()
    folder = source.fetch(weights=False, code=trust_remote_code)
    extra = {"gguf_file": source.gguf_file} if source.gguf_file else {}
    with explained(source), quiet_transformers():
        config = AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code, **extra)
    check_supported(config, source.name, trust_remote_code=trust_remote_code)
    return config


def parse_dtype(dtype: torch.dtype | str) -> torch.dtype | str:
    """Return ``"auto"`` or the torch dtype of a name such as ``bfloat16``, ``torch.float16`` or ``fp32``.

    Raises
    ------
    InputError
        If it is not a floating-point dtype.
    """
    if isinstance(dtype, str) and dtype != "auto":
        short = dtype.strip().lower().removeprefix("torch.")
        found = getattr(torch, _DTYPE_ALIASES.get(short, short), None)
    else:
        found = dtype
    if found == "auto" or (isinstance(found, torch.dtype) and found.is_floating_point):
        return found
    raise InputError(f"not a floating-point dtype: {dtype!r}; use auto, bfloat16, float16 or float32")


def _check_device_map(device_map: DeviceMap) -> None:
    if isinstance(device_map, dict):
        check_device_map(device_map, "device_map")
        return
    if device_map is None or device_map in SPREADS:
        return
    try:
        device = torch.device(device_map)
    except (RuntimeError, TypeError, ValueError) as error:
        raise InputError(f"not a device: {device_map!r}; use auto, cpu, cuda or cuda:0") from error
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(f"device {device} asked for, and torch sees {count} CUDA devices here; use auto or cpu")
    elif device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device mps asked for, and torch has none here; use auto or cpu")


def _check_parallel(device_map: DeviceMap) -> None:
    """Raise unless each process is left to take the device that is its own."""
    own = "cuda" if torch.cuda.is_available() else "cpu"
    if device_map is not None and str(device_map) not in ("auto", own):
        raise InputError(f"the processes of tensor parallelism take a device each; leave out device {device_map}")


def _faster_than_bf16(device_map: DeviceMap) -> torch.dtype | None:
    """What to take instead where there are no instructions for bfloat16, which is several times slower then."""
    if str(device_map) != "cpu" and torch.accelerator.is_available():
        old = torch.cuda.is_available() and is_too_old(torch.device("cuda", torch.cuda.current_device()))
        return torch.float16 if old else None
    try:
        return None if torch.ops.mkldnn._is_mkldnn_bf16_supported() else torch.float32
    except (AttributeError, RuntimeError):
        return torch.float32


def _load_tokenizer(source: Source, folder: Path, trust: bool, extra: dict[str, Any]) -> PreTrainedTokenizerBase:
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust, padding_side="left", **extra)
    except ImportError as error:
        raise UnsupportedModelError(f"the tokenizer of {source.name} needs another package: {short(error)}") from error
    except Exception as error:  # transformers raises nearly anything when files are missing or malformed
        raise ModelNotFoundError(
            f"{source.name} has no usable tokenizer ({short(error)}); put its tokenizer files beside config.json"
        ) from error
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer

"""Say from a config alone whether kcache can serve a model, and if not, why.

The check runs before any weights are fetched or loaded. What it lets through is a causal language model whose forward
takes a cache of K and V; which of its layers can be tiered is decided later, layer by layer, by a probe.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import re
from typing import TYPE_CHECKING, Any, get_args

from kcache.errors import UnsupportedModelError
from kcache.models.arguments import CACHE_NAMES

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

NEWEST_TRIED = (5, 24)
"""The newest transformers that all tests have run with, which constraints.txt names."""

_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


def untried(version: str | None = None) -> tuple[str, str] | None:
    """Where transformers is newer than what kcache was tested with: a clause that says so, and the way back.

    Parameters
    ----------
    version : str, optional
        By default the one that is installed.
    """
    if version is None:
        try:
            version = importlib.metadata.version("transformers")
        except importlib.metadata.PackageNotFoundError:  # it came without what says so
            return None
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if numbers is None or tuple(map(int, numbers.groups())) <= NEWEST_TRIED:
        return None
    major, minor = NEWEST_TRIED
    return (
        f"transformers {version} is newer than {major}.{minor}, the newest that kcache was tested with",
        f"pip install 'transformers<{major}.{minor + 1}'",
    )


def check_supported(config: PretrainedConfig, name: str, *, trust_remote_code: bool = False) -> None:
    """Raise if the model of ``config`` is not a decoder with a KV cache.

    Parameters
    ----------
    config : PretrainedConfig
    name : str
        What the user calls the model, for the message.
    trust_remote_code : bool
        Whether a class that comes with the model may serve it; such a class is taken at its word.

    Raises
    ------
    UnsupportedModelError
        With the reason: encoder-decoder, an encoder, another task's head, no KV cache, or attention of its own.
    """
    kind = f"{name} is a {config.model_type or type(config).__name__} model"
    if config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{kind}, an encoder-decoder; kcache serves decoder-only (causal) language models, choose one of those"
        )
    if trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {}):
        return
    model_class = _causal_class(config)
    if model_class is None:
        raise UnsupportedModelError(
            f"{kind}, which transformers does not know as a causal language model; choose a text-generation model"
        )
    heads = list(config.architectures or [])
    if heads and not any(head.endswith(_CAUSAL_ENDINGS) for head in heads):
        raise UnsupportedModelError(
            f"{kind} saved as {heads[0]}, not as a causal language model; choose its text-generation checkpoint"
        )
    if _is_encoder(config):
        raise UnsupportedModelError(
            f"{kind}, an encoder that attends in both directions; kcache serves causal language models, choose one"
        )
    if not _keeps_kv(model_class, config):
        raise UnsupportedModelError(
            f"{kind}, which keeps no KV cache, so there is nothing to tier; run it with transformers as it is"
        )
    is_whole = config.get_text_config(decoder=True) is config  # else attention of its own may be that of its eyes
    if is_whole and not _takes_registry(model_class):
        raise UnsupportedModelError(
            f"{kind}, which attends in code of its own, outside transformers' attention registry; run it with "
            "transformers as it is"
        )


def check_model(model: PreTrainedModel) -> None:
    """Raise for a model that is no decoder with a KV cache, as far as it can be said without running it.

    Raises
    ------
    UnsupportedModelError
        With the reason.
    """
    name = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(f"{name} is an encoder-decoder model; kcache serves decoder-only causal models")
    parameters = inspect.signature(model.forward).parameters
    anything = any(each.kind is each.VAR_KEYWORD for each in parameters.values())
    if not anything and not any(cache_name in parameters for cache_name in CACHE_NAMES):
        raise UnsupportedModelError(f"{name} takes no {' and no '.join(CACHE_NAMES)}, so there is no KV cache to tier")


def context_length(config: PretrainedConfig) -> int | None:
    """Return the most tokens the model was made for, or None where its config does not say."""
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(length) if isinstance(length, int) and length > 0 else None


def _causal_class(config: PretrainedConfig) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return known[0] if isinstance(known, (tuple, list)) else known


def _keeps_kv(model_class: Any, config: PretrainedConfig) -> bool:
    """Whether the class takes a cache of transformers' making, and not for recurrent states alone, as Mamba does."""
    parameters = inspect.signature(model_class.forward).parameters
    taken = next((parameters[name] for name in CACHE_NAMES if name in parameters), None)
    if taken is None or any(kind.__module__ == model_class.__module__ for kind in get_args(taken.annotation)):
        return False  # nothing, or a class of its own
    kinds = getattr(config.get_text_config(decoder=True), "layer_types", None)
    return set(kinds or ()) != {"linear_attention"}


def _takes_registry(model_class: Any) -> bool:
    """Whether the class asks transformers' registry for its attention, as far as transformers itself can tell."""
    asks = getattr(model_class, "_can_set_attn_implementation", None)
    return asks is None or bool(asks())


def _is_encoder(config: PretrainedConfig) -> bool:
    """Whether the model is of a family that also fills masks, and is not set up as a decoder (BERT and its kin)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)

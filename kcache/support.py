"""Say from a config alone whether kcache can serve a model, and if not, why.

The check runs before any weights are fetched or loaded. What it lets through is a causal language model whose forward
takes ``past_key_values``; which of its layers can be tiered is decided later, layer by layer, by a probe.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

from kcache.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_CAUSAL_ENDINGS = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")


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
    if "past_key_values" not in inspect.signature(model_class.forward).parameters:
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
    if "past_key_values" not in parameters and not any(each.kind is each.VAR_KEYWORD for each in parameters.values()):
        raise UnsupportedModelError(f"{name} takes no past_key_values, so it has no KV cache and nothing to tier")


def context_length(config: PretrainedConfig) -> int | None:
    """Return the most tokens the model was made for, or None where its config does not say."""
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    return int(length) if isinstance(length, int) and length > 0 else None


def _causal_class(config: PretrainedConfig) -> Any:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    return known[0] if isinstance(known, (tuple, list)) else known


def _takes_registry(model_class: Any) -> bool:
    """Whether the class asks transformers' registry for its attention, as far as transformers itself can tell."""
    asks = getattr(model_class, "_can_set_attn_implementation", None)
    return asks is None or bool(asks())


def _is_encoder(config: PretrainedConfig) -> bool:
    """Whether the model is of a family that also fills masks, and is not set up as a decoder (BERT and its kin)."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    return type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False)

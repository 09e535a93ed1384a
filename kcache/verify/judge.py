"""Judge one architecture or one model: tiny or as it is, refused or run, and what came of it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from kcache.attaching import attach
from kcache.attention.probe import probe
from kcache.cache import KCache
from kcache.errors import KCacheError, UnsupportedModelError
from kcache.models.support import check_supported
from kcache.verify.shrink import shrink
from kcache.verify.trial import TOLERANCE, compare
from kcache.verify.unusual import DEFAULTS
from kcache.verify.verdict import Verdict

SMALL_PARAMETERS = 30_000_000
"""A user's model of up to this size is run as it is, with its weights; a larger one is shrunk."""
_VISIBLE = 100 * TOLERANCE


def model_types() -> list[str]:
    """All entries of transformers' causal-LM mapping, in its order."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def judge_type(model_type: str) -> Verdict:
    """Judge an entry of the mapping by a tiny random model of its class."""
    names: Any = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    start = Verdict(model_type, names if isinstance(names, str) else names[0], "crashed")
    return _timed(start, lambda: _judge_default(start))


def judge_model(name: str, *, trust_remote_code: bool = False) -> Verdict:
    """Judge a model by its name, folder or file: with its own weights where it is small, shrunk where it is not."""
    start = Verdict(name, "", "crashed")
    return _timed(start, lambda: _judge_named(start, name, trust_remote_code))


def _timed(start: Verdict, judge: Callable[[], Verdict]) -> Verdict:
    began = time.perf_counter()
    try:
        verdict = judge()
    except UnsupportedModelError as error:
        verdict = replace(start, kind="refused", reason=_short(error))
    except KCacheError as error:
        verdict = replace(start, kind="crashed", reason=_short(error))
    except ImportError as error:
        verdict = replace(start, kind="refused", reason=f"needs another package: {_first_sentence(error)}")
    except Exception as error:  # whatever escapes from kcache or transformers is a verdict, too
        verdict = replace(start, kind="crashed", reason=f"{type(error).__name__}: {_short(error)}")
    return replace(verdict, seconds=round(time.perf_counter() - began, 2))


def _judge_default(start: Verdict) -> Verdict:
    config = CONFIG_MAPPING[start.model_type](**DEFAULTS.get(start.model_type, {}))
    refusal = _refusal(config, start.model_type)
    if refusal is None:
        try:
            return _run(start, _build(shrink(config)))
        except KCacheError as error:
            refusal = error
    decoder = _as_decoder(config)
    model = _tiny(decoder)
    if model is None or _refusal(decoder, start.model_type) is not None:
        if model is not None and (taker := _who_takes(model)):
            return replace(start, kind="crashed", reason=f"loading refuses it and {taker} does not: {refusal}")
        raise refusal
    verdict = _run(start, model)
    note = "as a decoder alone; with an encoder, or as one, refused"
    return replace(verdict, reason="; ".join(filter(None, (note, verdict.reason)))) if verdict.exact else verdict


def _judge_named(start: Verdict, name: str, trust: bool) -> Verdict:
    from kcache.loading import load, load_config

    config = load_config(name, trust_remote_code=trust)
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    count = sum(parameter.numel() for parameter in whole.parameters())
    start = replace(start, model_class=type(whole).__name__)
    if count <= SMALL_PARAMETERS and not name.endswith(".json"):
        return _run(start, load(name, device_map="cpu", dtype="float32", trust_remote_code=trust).model)
    return _run(start, _build(shrink(config), trust))


def _refusal(config: PreTrainedConfig, name: str) -> KCacheError | None:
    try:
        check_supported(config, name)
    except KCacheError as error:
        return error
    return None


def _as_decoder(config: PreTrainedConfig) -> PreTrainedConfig:
    """The config of the decoder alone, for classes that can also be or have an encoder."""
    data = config.to_dict()
    decoder = {"is_decoder": True} if "is_decoder" in data else {}
    return type(config)(**{**data, **decoder, "is_encoder_decoder": False})


def _tiny(config: PreTrainedConfig) -> PreTrainedModel | None:
    """A tiny model; None for a class that cannot be made of a config that is refused anyway."""
    try:
        return _build(shrink(config))
    except Exception:
        return None


def _build(config: PreTrainedConfig, trust: bool = False) -> PreTrainedModel:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32, trust_remote_code=trust
        ).eval()
        for name, parameter in model.named_parameters():
            if "sinks" in name:  # transformers makes them without values
                torch.nn.init.normal_(parameter)
    return model


def _who_takes(model: PreTrainedModel) -> str:
    for name, use in (("KCache", KCache), ("attach", lambda model: attach(model).__enter__())):
        try:
            use(model)
        except KCacheError:
            continue
        return name
    return ""


def _run(start: Verdict, model: PreTrainedModel) -> Verdict:
    try:
        found = probe(model)
    except KCacheError:
        if taker := _who_takes(model):
            return replace(start, kind="crashed", reason=f"the probe refuses it and {taker} does not")
        raise
    difference = compare(model)
    verdict = replace(
        start,
        kind="exact" if difference.tiered == difference.layers else "exact, stock layers",
        reason="; ".join(found.reasons),
        tiered=difference.tiered,
        layers=difference.layers,
        difference=difference.logits,
        tokens=difference.tokens,
    )
    if not difference.tiered:
        return (
            replace(verdict, reason=f"no layer is tiered: {verdict.reason}") if difference.exact else _differs(verdict)
        )
    if not difference.exact:
        return _differs(verdict)
    if not difference.rows_fetched:
        return replace(verdict, kind="crashed", reason="no row came from the host tier")
    if not math.isfinite(difference.few):
        return replace(verdict, kind="crashed", reason="with TopN below the context the logits are not finite")
    if difference.few < _VISIBLE:
        return replace(verdict, kind="crashed", reason="two rows instead of all change nothing, so this says nothing")
    return verdict


def _differs(verdict: Verdict) -> Verdict:
    how = f"{verdict.difference:.1e} of the largest, with {'the same' if verdict.tokens else 'other'} greedy tokens"
    return replace(
        verdict,
        kind="differs",
        reason=f"logits differ by {how}; {verdict.reason}",
    )


def _short(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 240 else f"{text[:239]}…"


def _first_sentence(error: object) -> str:
    return _short(error).split(". ")[0]

"""From what was measured to rows: medians, percentiles, shares, floors, and ratios within the case."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from kcache.bench.cases import Case
from kcache.bench.engines import Engine
from kcache.bench.fidelity import Fidelity
from kcache.bench.floor import Bandwidths, floor_of
from kcache.bench.rows import Row, Status
from kcache.bench.runner import Measured
from kcache.bench.spec import Spec
from kcache.cache import settled
from kcache.errors import in_short
from kcache.models.weights import Weights
from kcache.planning.plan import predict

if TYPE_CHECKING:
    from kcache.models.loaded import LoadedModel


@dataclass(frozen=True)
class Problem:
    """Why an engine has no figures."""

    status: Status
    reason: str

    @classmethod
    def of(cls, error: BaseException) -> Problem:
        """Tell running out of memory from other failures."""
        text = in_short(error, 300)
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "not enough memory" in text
        return cls("does not fit" if full else "failed", text)


def make_rows(
    lm: LoadedModel,
    spec: Spec,
    case: Case,
    measured: Mapping[Engine, Measured],
    problems: Mapping[Engine, Problem],
    fidelity: Mapping[Engine, Fidelity],
    machine: Bandwidths,
    env: dict[str, Any],
) -> list[Row]:
    """Return one row per engine of a case, in the order they were asked for."""
    base = base_of(case, measured, problems)
    rows = []
    for engine in case.engines:
        row = blank_row(lm, spec, case, engine, env)
        problem = problems.get(engine)
        if problem is not None:
            rows.append(replace(row, status=problem.status, reason=problem.reason))
            continue
        row = _with_times(row, measured[engine], machine)
        if spec.check_plan and engine.planned_as is not None:
            row = _with_prediction(row, lm, spec, engine, machine)
        if base is not None:
            row = _with_ratio(row, measured[engine], base.name, measured[base])
        if engine in fidelity:
            row = replace(row, kl=fidelity[engine].kl, top1=fidelity[engine].top1)
        rows.append(row)
    return rows


def base_of(case: Case, measured: Mapping[Engine, Measured], problems: Mapping[Engine, Problem]) -> Engine | None:
    """Whom ratios refer to: the first engine that is not ours and ran, or our full attention."""
    ran = [engine for engine in case.engines if engine in measured and engine not in problems]
    others = [engine for engine in ran if not engine.ours]
    dense = [engine for engine in ran if engine.name == "dense"]
    return next(iter(others + dense), None)


def blank_row(lm: LoadedModel, spec: Spec, case: Case, engine: Engine, env: dict[str, Any]) -> Row:
    """Make the row of an engine before anything is measured."""
    context, policy = lm.context_length, None if engine.policy is None else settled(engine.policy, lm.model)
    return Row(
        engine=engine.name,
        model=lm.name,
        ctx=case.ctx,
        batch=case.batch,
        topn=engine.topn,
        dtype=str(lm.model.dtype).removeprefix("torch."),
        device=str(lm.device),
        speed_only=context is not None and case.ctx > context,
        context_from="text" if spec.real_prefill else "random",
        repeats=spec.repeats,
        steps=spec.steps,
        policy=None if policy is None else policy.to_dict(),
        env=env,
    )


def _with_times(row: Row, measured: Measured, machine: Bandwidths) -> Row:
    times = [ms for turn in measured.turns for ms in turn]
    medians = [statistics.median(turn) for turn in measured.turns]
    median = statistics.median(times)
    assert measured.traffic is not None
    floor = floor_of(measured.traffic, machine)
    ttft = statistics.median(measured.ttft_ms) if measured.ttft_ms else None
    return replace(
        row,
        mode=measured.mode,
        graph=measured.graph,
        turns=len(medians),
        steps_timed=len(times),
        decode_ms_p50=median,
        decode_ms_p99=float(np.percentile(times, 99)),
        decode_ms_low=min(medians),
        decode_ms_high=max(medians),
        decode_tok_s=row.batch * 1e3 / median,
        ttft_ms=ttft,
        prefill_tok_s=None if ttft is None else row.batch * row.ctx * 1e3 / ttft,
        device_kv_bytes=measured.stats.device_bytes,
        host_kv_bytes=measured.stats.host_bytes,
        peak_memory_bytes=measured.peak_bytes,
        link_bytes_per_token=measured.link_bytes / row.batch,
        link_share=floor.link_ms / median,
        memory_share=floor.memory_ms / median,
        hit_rate=measured.hot_hits / measured.rows_fetched if measured.rows_fetched else None,
        floor_ms=floor.ms,
        floor_multiple=median / floor.ms,
    )


def _with_ratio(row: Row, measured: Measured, name: str, base: Measured) -> Row:
    """Turn beside turn: what slowed the machine down for a while slowed both. Of two in the middle, the lower."""
    pairs = zip(base.turns, measured.turns, strict=True)
    ratios = [statistics.median(theirs) / statistics.median(ours) for theirs, ours in pairs]
    return replace(
        row, ratio=statistics.median_low(ratios), ratio_low=min(ratios), ratio_high=max(ratios), ratio_to=name
    )


def _with_prediction(row: Row, lm: LoadedModel, spec: Spec, engine: Engine, machine: Bandwidths) -> Row:
    assert engine.planned_as is not None and row.decode_tok_s is not None
    config, dtype = lm.model.config, lm.model.dtype
    policy, weights = settled(engine.policy or spec.policy, lm.model), Weights.of_model(lm.model)
    predicted = predict(config, row.ctx, row.batch, policy, machine, weights=weights, dtype=dtype)
    tok_s = predicted[engine.planned_as].tok_s
    return replace(row, predicted_tok_s=tok_s, prediction_error=tok_s / row.decode_tok_s - 1)

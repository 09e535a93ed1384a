"""From the flags of ``kcache generate`` to its results."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kcache.errors import InputError
from kcache_cli.exits import note, warn
from kcache_cli.options import ModelOptions, PolicyOptions, SamplingOptions
from kcache_cli.watching import WatchOptions, watching

if TYPE_CHECKING:
    from kcache.policy import Policy
    from kcache_cli.batch.inputs import BadLine, Inputs
    from kcache_cli.batch.journal import Journal
    from kcache_cli.batch.plan import Sizes
    from kcache_cli.batch.progress import Meter
    from kcache_cli.batch.run import Job, Work
    from kcache_cli.engine import Engine

DEFAULT_MAX_TOKENS = 256
_SHOWN_BAD_LINES = 20


@dataclass(frozen=True)
class Request:
    """What was asked for; None is for the settings or kcache to choose."""

    model: ModelOptions
    sampling: SamplingOptions
    policy: PolicyOptions
    watch: WatchOptions
    source: str
    target: str
    max_tokens: int | None
    stop: tuple[str, ...]
    batch_size: int | None
    overwrite: bool
    keep: bool
    strict: bool


def run(engine: Engine, request: Request) -> None:
    """Read, plan, and run what is left of the job.

    Raises
    ------
    KCacheError
    """
    from kcache_cli.batch.journal import Header, Journal
    from kcache_cli.batch.run import Job, prepare
    from kcache_cli.console import download_bar
    from kcache_cli.policies import build_policy
    from kcache_cli.settings import fill, load_settings

    settings = load_settings()
    model, sampling = fill(request.model, settings), fill(request.sampling, settings)
    policy, overflow = build_policy(request.policy, settings), request.policy.allow_overflow
    max_tokens = request.max_tokens or settings.max_tokens or DEFAULT_MAX_TOKENS
    batch_size = request.batch_size or settings.batch_size
    path = _check(request)
    model.check()
    inputs = _read(request)
    header = Header(
        inputs.sha256, _settings_of(model, sampling, policy, max_tokens, request.stop, overflow, batch_size)
    )
    with contextlib.ExitStack() as stack:
        journal: Journal | None = None
        if path is not None and (path.is_file() or not path.exists()):
            journal = stack.enter_context(Journal(path, header, request.overwrite, request.keep))
            if journal.skipped is not None and _is_whole(path, inputs, journal.skipped):
                note(f"{path} is complete; nothing to do (--overwrite runs it again)")
                return
        with download_bar(f"reading prompts for {model.name}") as progress:
            drawn = engine.sampling(sampling), sampling.seed or 0
            job = Job(engine, model, policy, *drawn, max_tokens, overflow, request.stop)
            work, bad = prepare(job, engine.reader(model, progress), inputs.entries)
        _report_bad(bad, request.strict)
        if not work:
            raise InputError("none of the prompts can be used, so there is nothing to do")
        sizes = _plan(job, work, request.policy.ctx or settings.ctx, batch_size)
        _run(job, work, [*inputs.bad, *bad], path, journal, sizes, request.sampling, request.watch)


def _check(request: Request) -> Path | None:
    """Raise if flags contradict each other or the results cannot be written; returns where they go."""
    from kcache_cli.batch.output import check_target

    if request.source == "-" and sys.stdin is not None and sys.stdin.isatty():
        raise InputError("no prompts: name a file with -i, or pipe lines into standard input")
    if not all(request.stop):
        raise InputError("--stop: is empty; name the text that ends an answer")
    if request.overwrite and request.keep:
        raise InputError("--overwrite and --keep contradict each other; use one")
    path = check_target(request.target, request.source)
    request.watch.check()
    return path


def _read(request: Request) -> Inputs:
    """Read the prompts, and say what is wrong with them."""
    from kcache_cli.batch.inputs import parse_inputs, read_source

    inputs = parse_inputs(read_source(request.source), request.source)
    _report_bad(inputs.bad, request.strict)
    for remark in inputs.remarks:
        warn(remark)
    if not inputs.entries:
        raise InputError(f"-i {request.source}: holds no prompts")
    return inputs


def _plan(job: Job, work: list[Work], asked: int | None, batch_size: int | None) -> Sizes:
    """See whether the longest prompt and its answer fit, and how many are decoded at a time."""
    from kcache_cli.batch.plan import Sizes
    from kcache_cli.console import working

    need = max(len(item.ids) for item in work) + job.max_tokens
    if asked is not None and asked < need:
        note(f"the longest prompt and its answer may be {need:,} tokens; more memory is taken than for {asked:,}")
    with working(f"loading {job.model.name}"):
        plan = job.engine.plan(
            job.model,
            job.policy,
            ctx=asked,
            need=need,
            batch_size=batch_size,
            allow_overflow=job.allow_overflow,
        )
    if batch_size is not None and (least := plan.batch_sizes[-1][1]) < batch_size:
        note(f"of the longest prompts {least:,} are decoded at a time, not {batch_size:,}: that is what fits")
    return Sizes(plan.batch_sizes)


def _run(
    job: Job,
    work: list[Work],
    left_out: list[BadLine],
    path: Path | None,
    journal: Journal | None,
    sizes: Sizes,
    sampling_options: SamplingOptions,
    watch_options: WatchOptions,
) -> None:
    """Load the model, run what is left, and say what was done."""
    from kcache_cli.batch.cluster import decoder_of
    from kcache_cli.batch.output import STDOUT, OrderedOutput, mend, opened
    from kcache_cli.batch.progress import Meter, Published, Watch, progress_bar
    from kcache_cli.batch.run import plan_work, run_batches
    from kcache_cli.engine import load_with_bar
    from kcache_cli.tui.beside import Beside
    from kcache_cli.tui.start import dashboard

    lm = load_with_bar(job.engine, job.model)
    for remark in job.engine.remarks(lm, sampling_options, job.sampling):
        note(remark)
    ids = [item.entry.id for item in work]
    if journal is not None and journal.sizes is None:
        journal.begin(sizes)
    written = mend(path, ids) if path is not None and journal is not None else 0
    todo = plan_work(work, (journal and journal.sizes) or sizes, job.max_tokens, journal, written)
    left = sum(len(todo.batches[number]) for number in todo.remaining)
    if left < len(work):
        note(f"continuing {path}: {len(work) - left:,} of {len(work):,} prompts are done")
    if journal is not None:
        note(f"results so far are in {journal.path}; they reach {path} in input order")
    unread = sum(len(work[position].ids) for number in todo.remaining for position in todo.batches[number])
    meter = Meter(len(work), len(work) - left, job.max_tokens, unread)
    with contextlib.ExitStack() as stack:
        output = OrderedOutput(ids, stack.enter_context(opened(path)), written, path or STDOUT)
        beside = Beside(meter, lambda: progress_bar(meter)) if watch_options.dashboard else None
        told: Watch = stack.enter_context(progress_bar(meter)) if beside is None else beside
        publication = stack.enter_context(watching(job.engine, lm, "generate", watch_options))
        watch = told if publication is None else Published(told, publication, meter)

        def decode() -> None:
            with publication or contextlib.nullcontext():  # for those who watch the job ends here, whoever still looks
                run_batches(job, lm, work, todo, output, journal, watch, decoder_of(job.engine))

        try:
            if beside is not None and publication is not None:
                beside.run(decode, partial(dashboard, publication.source()))
            else:
                decode()
        except KeyboardInterrupt:
            if journal is not None:
                _say_stopped(journal, recorded=watch_options.record is not None)
            raise
        if journal is not None:
            output.sync()
            journal.close_job([line.line for line in left_out])
    _say_done(meter, left, job.max_tokens, len(left_out))


def _say_stopped(journal: Journal, recorded: bool) -> None:
    anew = ", with another --record" if recorded else ""
    if journal.holds_results:
        note(f"stopped; the same command goes on from the last finished batch{anew}")
    else:
        note(
            f"stopped before a batch was finished; the same command begins again{anew} (a smaller --batch-size loses "
            "less)"
        )


def _say_done(meter: Meter, prompts: int, max_tokens: int, left_out: int) -> None:
    note(
        f"{prompts:,} prompt{'' if prompts == 1 else 's'}, {meter.tokens:,} new tokens in {meter.elapsed_s:.1f} s "
        f"(job average {meter.tok_s:.1f} tok/s)"
        + (f"; {meter.cut:,} cut at {max_tokens:,} tokens, -n allows more" if meter.cut else "")
        + (f"; {left_out:,} bad line{'s' if left_out > 1 else ''} left out" if left_out else "")
    )


def _settings_of(
    model: ModelOptions,
    sampling: SamplingOptions,
    policy: Policy,
    max_tokens: int,
    stop: tuple[str, ...],
    overflow: bool,
    batch_size: int | None,
) -> dict[str, Any]:
    """Everything the results depend on, as plain values."""
    return {
        **asdict(model),
        "device_map": None if model.device_map is None else str(model.device_map),
        **asdict(sampling),
        "seed": sampling.seed or 0,
        "max_tokens": max_tokens,
        **({"stop": list(stop)} if stop else {}),
        "allow_overflow": overflow,
        "batch_size": batch_size or "auto",
        **{f"policy.{name}": value for name, value in policy.to_dict().items()},
    }


def _report_bad(bad: Sequence[BadLine], strict: bool) -> None:
    if bad and strict:
        raise InputError(f"{bad[0]} (--strict stops here)")
    for line in bad[:_SHOWN_BAD_LINES]:
        warn(f"{line}; left out")
    if len(bad) > _SHOWN_BAD_LINES:
        warn(f"... and {len(bad) - _SHOWN_BAD_LINES} more bad lines: {_numbers(bad[_SHOWN_BAD_LINES:])}")


def _numbers(bad: Sequence[BadLine]) -> str:
    return ", ".join(str(line.line) for line in bad)


def _is_whole(path: Path, inputs: Inputs, skipped: list[int]) -> bool:
    """Whether the output has a line for every prompt but those that were left out."""
    from kcache_cli.batch.output import mend

    ids = [entry.id for entry in inputs.entries if entry.line not in set(skipped)]
    return mend(path, ids) == len(ids)

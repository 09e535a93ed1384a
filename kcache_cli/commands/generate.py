"""``kcache generate``: run many prompts, safe to kill and to continue."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from kcache.errors import InputError
from kcache_cli.exits import note, warn
from kcache_cli.options import ModelOptions, PolicyOptions, SamplingOptions, with_options
from kcache_cli.watching import WatchOptions, watching

if TYPE_CHECKING:
    from kcache.policy import Policy
    from kcache_cli.batch.inputs import BadLine, Inputs
    from kcache_cli.batch.journal import Journal
    from kcache_cli.batch.plan import Sizes
    from kcache_cli.batch.run import Job, Work
    from kcache_cli.engine import Engine

EngineName = Literal["local", "ray"]
DEFAULT_MAX_TOKENS = 256
_SHOWN_BAD_LINES = 20


@with_options
def generate(
    context: typer.Context,
    model_options: ModelOptions,
    source: Annotated[
        str,
        typer.Option("-i", "--input", metavar="FILE", help="Prompts, a line each; - is standard input."),
    ] = "-",
    target: Annotated[
        str,
        typer.Option("-o", "--output", metavar="FILE", help="Results, in input order; - is standard output."),
    ] = "-",
    max_tokens: Annotated[
        int | None,
        typer.Option("-n", "--max-tokens", min=1, metavar="INTEGER", help="Longest answer.", show_default="256"),
    ] = None,
    stop: Annotated[
        list[str] | None,
        typer.Option("--stop", metavar="TEXT", help="Ends an answer, without being part of it. May be repeated."),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            "--batch-size",
            min=1,
            metavar="INTEGER",
            help="Prompts decoded together, at most: those of like length are, and of long ones no more than fit.",
            show_default="what fits",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Throw away an output that is there.")] = False,
    keep: Annotated[
        bool, typer.Option("--keep", help="Go on with other settings than before; what is finished stays.")
    ] = False,
    strict: Annotated[bool, typer.Option("--strict", help="Stop at a bad line instead of leaving it out.")] = False,
    engine_name: Annotated[
        EngineName,
        typer.Option("--engine", help="Who runs the batches: this process, or the workers of a Ray cluster."),
    ] = "local",
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="ADDRESS",
            help="A running Ray cluster: auto, or its address.",
            show_default="a new one here",
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option("--workers", min=1, metavar="INTEGER", help="Ray workers.", show_default="one per GPU, or node"),
    ] = None,
    *,
    sampling_options: SamplingOptions,
    policy_options: PolicyOptions,
    watch_options: WatchOptions,
) -> None:
    r"""Generate from a file of prompts, several at a time.

    A line is {"id", "prompt"} (continued as it stands), {"id", "messages"} (through the chat template), or plain text;
    where no id is given it is the line's number. A result is {"id", "text", "finish_reason", "prompt_tokens",
    "completion_tokens"}.

    Killed at any moment and run again with the same -o, it goes on where it was. FILE.kcache beside the output
    remembers what it was made from; an output of another input or other settings is refused without --overwrite. A
    bad line is reported by its number and left out; two lines with one id are refused. Sampling uses seed 0 unless
    --seed says otherwise, so a run can be repeated.

    With --engine ray each worker holds the model and runs whole batches; one that dies is replaced, and its batch is
    run again. Started by torchrun, the processes share one model's heads and rank 0 reads and writes.

    Examples
    --------
      kcache generate -i prompts.jsonl -o out.jsonl
      kcache generate Qwen/Qwen3-0.6B -i prompts.jsonl -o out.jsonl \
          --topn 64 -n 512
      cat questions.txt | kcache generate -i - -o - --temperature 0
      kcache generate -i prompts.jsonl -o out.jsonl --engine ray --workers 4
      torchrun --nproc-per-node 2 -m kcache_cli generate \
          -i prompts.jsonl -o out.jsonl
    """
    from kcache_cli.batch.cluster import on_ray
    from kcache_cli.engine import engine_of
    from kcache_cli.ranks import launched, together

    if engine_name == "ray":
        if launched() > 1:
            raise InputError("--engine ray and torchrun exclude each other; start kcache by itself")
        watch_options.refuse("the workers of --engine ray are not watched from outside")
        running = on_ray(address, workers)
    elif address is not None or workers is not None:
        raise InputError("--address and --workers are for --engine ray; add that, or leave them out")
    else:
        running = together(engine_of(context))
    with running as engine:
        _generate(
            engine,
            model_options,
            source,
            target,
            max_tokens,
            tuple(stop or ()),
            batch_size,
            overwrite,
            keep,
            strict,
            sampling_options,
            policy_options,
            watch_options,
        )


def _generate(
    engine: Engine,
    model_options: ModelOptions,
    source: str,
    target: str,
    max_tokens: int | None,
    stop: tuple[str, ...],
    batch_size: int | None,
    overwrite: bool,
    keep: bool,
    strict: bool,
    sampling_options: SamplingOptions,
    policy_options: PolicyOptions,
    watch_options: WatchOptions,
) -> None:
    """Read, plan, and run what is left of the job."""
    from kcache_cli.batch.inputs import parse_inputs, read_source
    from kcache_cli.batch.journal import Header, Journal
    from kcache_cli.batch.output import check_target
    from kcache_cli.batch.plan import Sizes
    from kcache_cli.batch.run import Job, prepare
    from kcache_cli.console import download_bar, working
    from kcache_cli.policies import build_policy
    from kcache_cli.settings import fill, load_settings

    settings = load_settings()
    model, sampling = fill(model_options, settings), fill(sampling_options, settings)
    policy = build_policy(policy_options, settings)
    max_tokens = max_tokens or settings.max_tokens or DEFAULT_MAX_TOKENS
    batch_size = batch_size or settings.batch_size
    if source == "-" and sys.stdin is not None and sys.stdin.isatty():
        raise InputError("no prompts: name a file with -i, or pipe lines into standard input")
    if not all(stop):
        raise InputError("--stop: is empty; name the text that ends an answer")
    if overwrite and keep:
        raise InputError("--overwrite and --keep contradict each other; use one")
    path = check_target(target, source)
    watch_options.check()
    inputs = parse_inputs(read_source(source), source)
    _report_bad(inputs.bad, strict)
    for remark in inputs.remarks:
        warn(remark)
    if not inputs.entries:
        raise InputError(f"-i {source}: holds no prompts")

    overflow = policy_options.allow_overflow
    settings_now = _settings_of(model, sampling, policy, max_tokens, stop, overflow, batch_size)
    header = Header(inputs.sha256, settings_now)
    with contextlib.ExitStack() as stack:
        journal: Journal | None = None
        if path is not None and (path.is_file() or not path.exists()):
            journal = stack.enter_context(Journal(path, header, overwrite, keep))
            if journal.skipped is not None and _is_whole(path, inputs, journal.skipped):
                note(f"{path} is complete; nothing to do (--overwrite runs it again)")
                return
        with download_bar(f"reading prompts for {model.name}") as progress:
            job = Job(engine, model, policy, engine.sampling(sampling), sampling.seed or 0, max_tokens, overflow, stop)
            work, bad = prepare(job, engine.reader(model, progress), inputs.entries)
        _report_bad(bad, strict)
        if not work:
            raise InputError("none of the prompts can be used, so there is nothing to do")
        asked, need = policy_options.ctx or settings.ctx, max(len(item.ids) for item in work) + max_tokens
        if asked is not None and asked < need:
            note(f"the longest prompt and its answer may be {need:,} tokens; more memory is taken than for {asked:,}")
        with working(f"loading {model.name}"):
            plan = engine.plan(
                model,
                policy,
                ctx=asked,
                need=need,
                batch_size=batch_size,
                allow_overflow=overflow,
            )
        if batch_size is not None and (least := plan.batch_sizes[-1][1]) < batch_size:
            note(f"of the longest prompts {least:,} are decoded at a time, not {batch_size:,}: that is what fits")
        left_out = [*inputs.bad, *bad]
        _run(job, work, left_out, path, journal, Sizes(plan.batch_sizes), sampling_options, watch_options)


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
    from kcache_cli.console import download_bar
    from kcache_cli.tui.beside import Beside
    from kcache_cli.tui.start import dashboard

    with download_bar(f"loading {job.model.name}") as progress:
        lm = job.engine.load(job.model, progress)
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

        def run() -> None:
            with publication or contextlib.nullcontext():  # for those who watch the job ends here, whoever still looks
                run_batches(job, lm, work, todo, output, journal, watch, decoder_of(job.engine))

        try:
            if beside is not None and publication is not None:
                beside.run(run, partial(dashboard, publication.source()))
            else:
                run()
        except KeyboardInterrupt:
            if journal is not None:
                anew = ", with another --record" if watch_options.record is not None else ""
                if journal.holds_results:
                    note(f"stopped; the same command goes on from the last finished batch{anew}")
                else:
                    note(f"stopped before a batch was finished; the same command begins again{anew} (a smaller "
                         "--batch-size loses less)")  # fmt: skip
            raise
        if journal is not None:
            output.sync()
            journal.close_job([line.line for line in left_out])
    note(
        f"{left:,} prompt{'' if left == 1 else 's'}, {meter.tokens:,} new tokens in {meter.elapsed_s:.1f} s "
        f"(job average {meter.tok_s:.1f} tok/s)"
        + (f"; {meter.cut:,} cut at {job.max_tokens:,} tokens, -n allows more" if meter.cut else "")
        + (f"; {len(left_out):,} bad line{'s' if len(left_out) > 1 else ''} left out" if left_out else "")
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

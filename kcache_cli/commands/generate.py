"""``kcache generate``: run many prompts, safe to kill and to continue."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from kcache.errors import InputError
from kcache_cli.options import ModelOptions, PolicyOptions, SamplingOptions, with_options
from kcache_cli.watching import WatchOptions

EngineName = Literal["local", "ray"]


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
    from kcache_cli.engine import engine_of, make_way
    from kcache_cli.generate_run import Request, run
    from kcache_cli.ranks import launched, together

    if engine_name == "ray":
        if launched() > 1:
            raise InputError("--engine ray and torchrun exclude each other; start kcache by itself")
        watch_options.refuse("the workers of --engine ray are not watched from outside")
        running = on_ray(address, workers)
    elif address is not None or workers is not None:
        raise InputError("--address and --workers are for --engine ray; add that, or leave them out")
    else:
        make_way()
        running = together(engine_of(context))
    request = Request(
        model=model_options,
        sampling=sampling_options,
        policy=policy_options,
        watch=watch_options,
        source=source,
        target=target,
        max_tokens=max_tokens,
        stop=tuple(stop or ()),
        batch_size=batch_size,
        overwrite=overwrite,
        keep=keep,
        strict=strict,
    )
    with running as engine:
        run(engine, request)

"""``kcache plan``: what a model, a context and a policy take and how fast they should go, before anything is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from kcache_cli.completion import complete_gpu
from kcache_cli.options import ModelOptions, PolicyOptions, Without, with_options


@with_options
def plan(
    model_options: Annotated[ModelOptions, Without(("device_map",))],
    batch: Annotated[
        str | None,
        typer.Option(
            "--batch",
            metavar="N|auto",
            help="Sequences; auto is the fastest that fits.",
            show_default="auto, on a CPU 1",
        ),
    ] = None,
    gpu: Annotated[
        str | None,
        typer.Option(
            "--gpu",
            metavar="NAME",
            help="Plan for this card: h100, h200, a100, rtx4090, ...",
            show_default="this machine, measured",
            autocompletion=complete_gpu,
        ),
    ] = None,
    hbm: Annotated[
        str | None,
        typer.Option(
            "--hbm", metavar="SIZE", help="Memory of the whole card, weights included.", show_default="the card's"
        ),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option("--host", metavar="SIZE", help="RAM for V.", show_default="what is free here"),
    ] = None,
    hit_rate: Annotated[
        float,
        typer.Option(
            "--hit-rate",
            metavar="FLOAT",
            min=0,
            max=1,
            help="Part of the picked rows that is on the device already.",
            show_default="0",
        ),
    ] = 0.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[
        str | None, typer.Option("--plot", metavar="FILE", help="Draw tok/s against context: a .png, .svg or .pdf.")
    ] = None,
    *,
    policy_options: Annotated[PolicyOptions, Without(("allow_overflow",))],
) -> None:
    """Say what fits and how fast it should be, from a model's config alone.

    MODEL may also be a config.json. Memory is counted: weights, K, V, activations and what the policy adds, in either
    tier, for a full KV cache and for KCache; the largest batch and context that fit; the layers whose V stays on the
    device. Speed is predicted, by the bytes a decode step has to move; measure it with kcache bench. --hbm is the
    whole card, --kv-budget the cache alone. Exit code 3 if KCache does not fit.

    Examples
    --------
      kcache plan Qwen/Qwen3-8B --ctx 128k --gpu h100 --host 512GiB
      kcache plan config.json --ctx 64k --batch 8 --gpu rtx4090 --topn 64 --json
      kcache plan smollm2
    """
    from kcache.errors import DoesNotFitError
    from kcache_cli.console import working
    from kcache_cli.placing import planning_device
    from kcache_cli.plan_run import Question, answer, read_batch, read_card, read_size
    from kcache_cli.plan_view import draw, show, to_dict
    from kcache_cli.policies import build_policy
    from kcache_cli.rows.chart import chart_file
    from kcache_cli.settings import fill, load_settings
    from kcache_cli.text import json_line

    settings = load_settings()
    model, policy = fill(model_options, settings), build_policy(policy_options, settings)
    chart = chart_file(plot)
    card, device_bytes, host_bytes = read_card(gpu), read_size("--hbm", hbm), read_size("--host", host)
    sequences = read_batch(batch, lambda: card is None and planning_device(model.device or "auto").type == "cpu")
    question = Question(
        model=model,
        policy=policy,
        ctx=policy_options.ctx or settings.ctx,
        batch=sequences,
        card=card,
        hbm=device_bytes,
        host=host_bytes,
        hit_rate=hit_rate,
    )
    with working(f"planning {question.model.name}"):
        found = answer(question)
    if chart is not None:
        draw(found, chart)
    if as_json:
        print(json_line(to_dict(found)))
    else:
        show(found)
    refusal = found.refusal()
    if refusal is not None:
        raise DoesNotFitError(refusal)

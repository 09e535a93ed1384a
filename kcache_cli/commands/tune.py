"""``kcache tune``: the cheapest policy for a model that stays within a distance of full attention, as a profile."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from kcache_cli.completion import complete_policy
from kcache_cli.evaluate.flags import PlacesOptions, ResultOptions, in_float32
from kcache_cli.options import ModelOptions, with_options

_goal = functools.partial(typer.Option, rich_help_panel="What to look for", show_default=False)


@with_options
def tune(
    context: typer.Context,
    model_options: ModelOptions,
    sample: PlacesOptions,
    target_kl: Annotated[
        float,
        _goal(
            "--target-kl",
            help="Mean KL divergence from full attention, in nats, at most.",
            metavar="FLOAT",
            show_default="0.01",
        ),
    ] = 0.01,
    device_overhead: Annotated[
        float,
        _goal(
            "--device-overhead",
            help="What the policy keeps on the device beside K (V of dense layers, the tail), as a share of a full KV "
            "cache, at most.",
            metavar="FLOAT",
            show_default="0.07",
        ),
    ] = 0.07,
    policy: Annotated[
        str | None,
        _goal(
            "--policy",
            help="What to start from: N, the number of dense layers and the size of a low-rank tail are looked for, "
            "all else is kept.",
            metavar="NAME|FILE",
            show_default="default",
            autocompletion=complete_policy,
        ),
    ] = None,
    profile: Annotated[
        str | None,
        _goal("--profile", help="Write the policy here, TOML.", metavar="FILE", show_default="the model's name.toml"),
    ] = None,
    overwrite: Annotated[bool, _goal("--overwrite", help="Replace a profile that is there.")] = False,
    *,
    results: ResultOptions,
) -> None:
    r"""Find the cheapest policy for a model on a text, and write it as a profile for --policy.

    Cost is the bytes a decode step brings over the link, as counted after --ctx tokens: rows fetched times the bytes of
    a row, over all layers (bytes_h2d_per_token). What is kept on the device beside K is bounded, not weighed. Of every
    number of dense layers the largest tail within the bound is tried, each with the fewest rows that keep the mean KL
    over all places within --target-kl; what cannot win any more is dropped early. Measured as kcache eval fidelity
    does, in float32 unless --dtype is given; the prefill of every place is held in memory, so use fewer --places or a
    smaller --ctx where that is short.

    What was tried goes to standard output, a line for each measurement to standard error. With --output a file is
    written after each, so a run that was stopped goes on with --resume. Exit code 1 if nothing comes that close.

    Examples
    --------
      kcache tune smollm2 --text essays.txt --target-kl 0.01
      kcache tune Qwen/Qwen3-8B --text essays.txt --ctx 32k --places 2 \
          --profile qwen.toml --output tried.jsonl --resume
      kcache chat smollm2 --policy smollm2.toml
    """
    from kcache.evaluate.tune import Goal
    from kcache_cli.evaluate.profile import profile_file
    from kcache_cli.evaluate.tune import Question, answer
    from kcache_cli.policies import read_policy
    from kcache_cli.settings import load_settings

    settings = load_settings()
    model = in_float32(model_options, settings)
    base = read_policy(policy or settings.policy).replace(offload="all", kv_budget=None, resident_layers=None)
    target = profile_file(profile, model.name, overwrite)
    answer(context, Question(model, sample, Goal(target_kl, device_overhead), base, target, results))

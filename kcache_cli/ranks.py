"""``torchrun -m kcache_cli generate``: one command, several processes, each with a share of the model's heads.

Rank 0 runs the command: it alone reads the prompts and writes results, notes and the journal. What it asks of the
engine it asks of the other ranks too, and they do nothing but follow. Sampled tokens are rank 0's
(:mod:`kcache.machine.parallel`).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from kcache.errors import DoesNotFitError, InputError, KCacheError
from kcache.models.progress import Progress, ignore_progress
from kcache.policy import Policy
from kcache_cli import exits
from kcache_cli.engine import KCacheEngine, Plan
from kcache_cli.options import ModelOptions, SamplingOptions

if TYPE_CHECKING:
    from kcache import Sampling, TokenEvent

_LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")
_PATIENCE = timedelta(days=30)  # followers wait for rank 0, which may wait for its input


def launched(environ: Mapping[str, str] = os.environ) -> int:
    """How many processes torchrun (or another launcher) has started this command in; 1 without one."""
    return int(environ["WORLD_SIZE"]) if all(environ.get(name) for name in _LAUNCH) else 1


def speaks(environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this process says what is to be said: one that was started alone, and of several rank 0."""
    return launched(environ) == 1 or environ["RANK"] == "0"


def check_command(name: str | None, environ: Mapping[str, str] = os.environ) -> None:
    """Refuse commands that do not know how to run in several processes.

    Raises
    ------
    InputError
        On rank 0; the others leave without a word.
    """
    if launched(environ) == 1 or name == "generate":
        return
    if not speaks(environ):
        raise SystemExit(exits.USAGE)
    raise InputError(f"torchrun runs `kcache generate` and no other command; run `kcache {name}` by itself")


@contextmanager
def together(engine: Any) -> Iterator[Any]:
    """Yield the engine to use. Under torchrun that is one that leads the other ranks; those never get out of here."""
    if launched() == 1:
        yield engine
        return
    import torch.distributed as dist

    control = _join()
    if dist.get_rank() != 0:
        code = _follow(_share(), control)
        dist.destroy_process_group()
        raise SystemExit(code)
    leader = Leader(_share(), control)
    try:
        yield leader
    finally:
        leader.end()


class Leader(KCacheEngine):
    """The engine of rank 0: what it does, the others do with it."""

    def __init__(self, split: Any, control: Any) -> None:
        super().__init__(split)
        self._control = control
        self._busy = False

    def plan(self, model: ModelOptions, policy: Policy, **wanted: Any) -> Plan:
        """The plan of the rank with the least room."""
        _tell(("plan", model, policy, wanted), self._control)
        return _plan_together(self, (model, policy, wanted), self._control)

    def load(self, model: ModelOptions, progress: Progress) -> Any:
        """Load a share of the model, as all do."""
        _tell(("load", model), self._control)
        self._busy = True
        with _none_may_go():
            lm = super().load(model, progress)
        self._busy = False
        return lm

    def remarks(self, lm: Any, asked: SamplingOptions, sampling: Sampling) -> list[str]:
        """None: to look at the model is to run it, which all ranks would have to."""
        return []

    def generate(self, lm: Any, prompts: list[list[int]], policy: Policy, **options: Any) -> Iterator[TokenEvent]:
        """Decode a batch, all ranks together."""
        _tell(("generate", prompts, policy, {**options, "read": None}), self._control)  # one of them tells
        self._busy = True
        with _none_may_go():
            yield from super().generate(lm, prompts, policy, **options)
        self._busy = False

    def end(self) -> None:
        """Let the others go; those that are in the middle of something see that this process has gone."""
        if not self._busy:
            import torch.distributed as dist

            _tell(("end",), self._control)
            dist.destroy_process_group()


def _follow(split: Any, control: Any) -> int:
    """Do as rank 0 does until it ends; returns the exit code.

    What rank 0 itself will tell is no failure here: torchrun would end rank 0 for it, perhaps before it has spoken.
    """
    try:
        with _none_may_go():
            _obey(KCacheEngine(split), control)
        return 0
    except KeyboardInterrupt:
        return exits.INTERRUPTED
    except DoesNotFitError:
        return 0  # decided by all ranks together, and told by rank 0
    except Exception as error:
        print(f"kcache: rank {os.environ['RANK']}: {exits.describe(error)}", file=sys.stderr)
        return exits.exit_code(error)


def _obey(engine: KCacheEngine, control: Any) -> None:
    """Do what rank 0 says, until it says that this is the end."""
    lm: Any = None
    while True:
        command, *values = _hear(control)
        if command == "end":
            return
        if command == "plan":
            _plan_together(engine, values, control)
        elif command == "load":
            lm = engine.load(values[0], ignore_progress)
        else:
            prompts, policy, options = values
            for _ in engine.generate(lm, prompts, policy, **options):
                pass


@contextmanager
def _none_may_go() -> Iterator[None]:
    """Say in our words that another process has gone: what the body waits for will not come."""
    import torch.distributed as dist

    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo/" not in str(error):  # gloo's have no type of their own
            raise
        raise KCacheError(
            "another of the processes has ended; what it said, or torchrun's report, tells why; "
            "the same command goes on from the last finished batch"
        ) from error


def _plan_together(engine: KCacheEngine, values: Any, control: Any) -> Plan:
    """Every rank's plan, and of those the smallest batches; the first refusal is everyone's."""
    import torch.distributed as dist

    model, policy, wanted = values
    mine: Plan | Exception
    try:
        mine = KCacheEngine.plan(engine, model, policy, **wanted)
    except Exception as error:
        mine = error
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, mine, group=control)
    problem = next((each for each in found if isinstance(each, Exception)), None)
    if problem is None:
        sizes = zip(*(plan.batch_sizes for plan in found), strict=True)
        return replace(found[0], batch_sizes=tuple(min(each) for each in sizes))
    if dist.get_rank() == 0:
        raise problem
    return found[0]


def _join() -> Any:
    """Meet the other processes; returns the group through which rank 0 says what to do."""
    import torch
    import torch.distributed as dist

    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        if device.index >= torch.cuda.device_count():
            raise InputError(
                f"process {device.index + 1} of this machine has no GPU of its own: torch sees "
                f"{torch.cuda.device_count()}; use that as --nproc-per-node"
            )
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device, timeout=timedelta(hours=2))
    else:
        dist.init_process_group("gloo", timeout=timedelta(hours=2))
    return dist.new_group(backend="gloo", timeout=_PATIENCE)


def _share() -> Any:
    from kcache.planning.fitting import Split

    ranks = launched()
    return Split(ranks=ranks, sharers=int(os.environ.get("LOCAL_WORLD_SIZE", ranks)))


def _tell(command: tuple[Any, ...], control: Any) -> None:
    import torch.distributed as dist

    dist.broadcast_object_list([command], src=0, group=control)


def _hear(control: Any) -> tuple[Any, ...]:
    import torch.distributed as dist

    heard: list[Any] = [None]
    dist.broadcast_object_list(heard, src=0, group=control)
    return tuple(heard[0])

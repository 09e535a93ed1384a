"""``kcache generate --engine ray``: batches run by the workers of a Ray cluster.

This process reads the prompts, turns them into tokens, forms the same batches with the same seeds as it would by
itself, and writes journal and output as results come back; it loads no weights. Each worker is an actor that holds the
model, and Ray Data hands it one batch at a time. A worker that dies is started again and its batch run again; a batch
gives the same text wherever it is run.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import secrets
import socket
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from kcache.errors import InputError, KCacheError, in_short
from kcache.policy import Policy
from kcache_cli.batch.journal import Result
from kcache_cli.batch.progress import Watch
from kcache_cli.batch.run import Batches, Decoder, Job, one_by_one
from kcache_cli.batch.share import Share
from kcache_cli.batch.worker import Attempts, Planning, Worker, pack, results_of
from kcache_cli.ending import kept
from kcache_cli.engine import KCacheEngine, Plan
from kcache_cli.exits import note
from kcache_cli.options import ModelOptions, SamplingOptions

if TYPE_CHECKING:
    from kcache import Sampling, TokenEvent
    from kcache.models.progress import Progress

_MOST_TASKS = 10_000


def on_ray(address: str | None, workers: int | None) -> AbstractContextManager[RayEngine]:
    """Make an engine whose batches run on Ray, for a ``with`` block; a cluster it has started ends with that."""
    return contextlib.closing(RayEngine(address, workers))


def decoder_of(engine: Any) -> Decoder:
    """Who runs the batches of an engine."""
    return engine.decode if isinstance(engine, RayEngine) else one_by_one


class RayEngine(KCacheEngine):
    """Plans, reads and writes here; runs on the workers.

    Parameters
    ----------
    address : str or None
        Of a running cluster; None starts one on this machine, which nobody else can reach.
    workers : int or None
        How many; by default one per GPU, or per node where there are none.
    """

    def __init__(self, address: str | None, workers: int | None) -> None:
        super().__init__()
        self._address, self._workers = address, workers
        self._share: Share | None = None
        self._until_closed = contextlib.ExitStack()

    def plan(self, model: ModelOptions, policy: Policy, **wanted: Any) -> Plan:
        """Plan for one worker, where a worker will run."""
        share = self._started(model)
        planning = Planning(KCacheEngine(share.split), model, policy, wanted)
        found = planning() if self._address is None and not share.gpus else _there(planning, share)
        if isinstance(found, KCacheError):
            raise found
        return found

    def load(self, model: ModelOptions, progress: Progress) -> Any:
        """Load what reads prompts; fetch the weights too if the workers are on this machine."""
        from kcache.models.names import find_source

        if self._address is None:
            source = find_source(model.name, revision=model.revision, gguf_file=model.gguf_file)
            source.fetch(progress, code=model.trust_remote_code)
        return self.reader(model, progress)

    def remarks(self, lm: Any, asked: SamplingOptions, sampling: Sampling) -> list[str]:
        """None: the model is where the workers are."""
        return []

    def publish(self, lm: Any, **options: Any) -> None:
        """Nothing runs here that could be watched."""

    def decode(self, job: Job, lm: Any, batches: Batches, watch: Watch) -> Iterator[tuple[int, list[Result]]]:
        """Run batches on the workers; each comes back as soon as it is done.

        Ray Data's own ``preserve_order`` stays off: the output is ordered where it is written, and until then a batch
        that is done is safer in the journal than waiting in the cluster for one before it.

        Raises
        ------
        KCacheError
            If a worker cannot run its batch, or too many have died of it.
        """
        import ray
        import ray.data

        share = self._share
        if share is None or not batches:
            return
        rows = [{"number": number, "work": pack(work)} for number, work in batches]
        threads = None if "OMP_NUM_THREADS" in os.environ else share.threads
        attempts = ray.remote(num_cpus=0)(Attempts).remote()
        told = ray.data.from_items(rows, override_num_blocks=min(len(rows), _MOST_TASKS)).map_batches(
            Worker,
            fn_constructor_args=(replace(job, engine=KCacheEngine(share.split)), threads, share.gpus, attempts),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=min(share.workers, len(rows)), max_tasks_in_flight_per_actor=1),
            num_cpus=share.cpus,
            num_gpus=share.gpus or None,
        )
        missing = {number for number, _ in batches}
        try:
            for row in told.iter_batches(batch_size=1, prefetch_batches=0):
                number = int(row["number"][0])
                attempt, results = results_of(str(row["told"][0]))
                if attempt > 1:
                    note(f"a worker died; batch {number} has been run again")
                if number not in missing:
                    continue
                missing.remove(number)
                for index, result in enumerate(results):
                    watch.count(_last_event(index, result), int(result["completion_tokens"]))
                yield number, results
        except ray.exceptions.RayError as error:
            raise KCacheError(
                f"Ray gave up on a batch: {in_short(error, 160)}; the same command goes on from here"
            ) from error

    def close(self) -> None:
        """Leave the cluster, or end the one that was started."""
        self._until_closed.close()

    def _started(self, model: ModelOptions) -> Share:
        """Join the cluster, or start one, and share it out."""
        device = model.device or "auto"
        if device not in ("auto", "cpu", "cuda"):
            raise InputError(f"--device {device}: Ray gives each worker GPUs of its own; use auto or cpu")
        if self._address is None:
            _keep_to_this_machine()
        with kept():  # Ray has its own ideas of SIGTERM
            return self._join(_import_ray(), on_cpu=device == "cpu")

    def _join(self, ray: Any, on_cpu: bool) -> Share:
        options: dict[str, Any] = {"address": self._address}
        if self._address is None:
            options = {"address": "local", "include_dashboard": False}
        else:
            _check_reachable(self._address)
        self._until_closed.enter_context(contextlib.redirect_stdout(_ResultsOnly(sys.stdout)))
        try:
            with _unheard():
                ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
        except (ConnectionError, ValueError) as error:
            raise InputError(f"--address {self._address}: no Ray cluster there ({in_short(error, 160)})") from None
        self._until_closed.callback(ray.shutdown)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._share = Share.of(nodes, self._workers, on_cpu=on_cpu)
        return self._share


def _there(planning: Planning, share: Share) -> Plan | KCacheError:
    """Make a plan on a node that has room for a worker."""
    import ray

    def plan() -> Plan | KCacheError:
        return planning()

    task = ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_retries=3)(plan)
    found: Plan | KCacheError = ray.get(task.remote())
    return found


def _import_ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")  # its remarks go past Python to standard error
    try:
        import ray
        import ray.data
    except ImportError:
        raise InputError("--engine ray needs Ray; install it with pip install 'kcache-llm[ray]'") from None
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray


def _keep_to_this_machine() -> None:
    """Have a new cluster listen on the loopback address alone, to those who hold a token of this run's own."""
    os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # Ray's name for leaving the network alone
    os.environ.setdefault("RAY_AUTH_MODE", "token")
    os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))  # else Ray leaves one in the home folder


def _check_reachable(address: str) -> None:
    """Raise if nobody listens at ``host:port``: Ray itself would go on asking for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host:
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
    except (OSError, ValueError) as error:
        raise InputError(f"--address {address}: no Ray cluster there ({in_short(error, 160)})") from None


class _ResultsOnly(io.TextIOBase):
    """Standard output while Ray runs, which prints remarks there: bytes, which are results, pass, and text does not."""

    def __init__(self, stream: Any) -> None:
        self.buffer = stream.buffer

    def write(self, text: str) -> int:
        """Let it go."""
        return len(text)


@contextmanager
def _unheard() -> Iterator[None]:
    """Let what Ray's libraries write to standard error past Python go nowhere."""
    sys.stderr.flush()
    stderr = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


def _last_event(index: int, result: Result) -> TokenEvent:
    """The event a prompt ended with, as far as its result tells."""
    from kcache import TokenEvent

    return TokenEvent(
        index, 0, "", result["finish_reason"], result["prompt_tokens"], result["completion_tokens"], 0.0, 0.0
    )

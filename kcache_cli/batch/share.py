"""What each worker of a Ray cluster gets of it: GPUs, CPUs, threads, and its part of a machine's memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from kcache.errors import InputError

if TYPE_CHECKING:
    from kcache.planning.fitting import Split


@dataclass(frozen=True)
class Share:
    """One worker's part.

    Attributes
    ----------
    workers : int
        How many there are.
    gpus, cpus : float
        Of each worker: a whole number, or a part of one.
    threads : int
        CPU threads that compute.
    neighbours : int
        Workers on one machine at most, which share its RAM.
    """

    workers: int
    gpus: float
    cpus: float
    threads: int
    neighbours: int

    @classmethod
    def of(cls, nodes: Sequence[dict[str, float]], workers: int | None, on_cpu: bool) -> Share:
        """Share out the resources of a cluster's nodes: GPUs where there are some, and CPUs.

        Some CPU of each node is left for reading and for Ray itself, without which a job would wait for ever.

        Raises
        ------
        InputError
            If there is no room for so many.
        """
        gpus = [0.0 if on_cpu else node.get("GPU", 0.0) for node in nodes]
        cpus = [node.get("CPU", 1.0) for node in nodes]
        spare = [max(count - 1, count / 2) for count in cpus]
        workers = workers or int(sum(gpus)) or len(nodes)
        own_gpus = largest_share(gpus, workers) if any(gpus) else 0.0
        own_cpus = min(1.0, largest_share(spare, workers)) if own_gpus else largest_share(spare, workers)
        room = [
            min(_fitting(cpu, own_cpus), _fitting(gpu, own_gpus) if own_gpus else workers)
            for cpu, gpu in zip(spare, gpus, strict=True)
        ]
        if sum(room) < workers:
            raise _no_room(workers)
        neighbours = min(workers, max(room))
        return cls(workers, own_gpus, own_cpus, max(1, int(max(cpus)) // neighbours), neighbours)

    @property
    def split(self) -> Split:
        """The part of a machine that is one worker's own, for planning memory."""
        from kcache.planning.fitting import Split

        return Split(sharers=self.neighbours, gpus=max(1, int(self.gpus)), gpu_share=min(1.0, self.gpus or 1.0))


def largest_share(nodes: Sequence[float], workers: int) -> float:
    """The most of a resource that each of so many workers can have: a whole number, or else a part of one.

    ``nodes`` says how much each node has; a worker is on one of them.

    Raises
    ------
    InputError
        If there is no room for so many.
    """
    shares = [float(whole) for whole in range(int(max(nodes)), 0, -1)]
    shares += [int(10_000 / parts) / 10_000 for parts in range(2, 101)]  # as fine as Ray counts
    for share in shares:
        if sum(_fitting(count, share) for count in nodes) >= workers:
            return share
    raise _no_room(workers)


def _fitting(count: float, share: float) -> int:
    return int(count / share + 1e-9)


def _no_room(workers: int) -> InputError:
    return InputError(f"--workers {workers}: the cluster has no room for so many; use fewer")

"""The threads that torch's operators run on, which belong to the thread that calls them."""

from __future__ import annotations

import ctypes
import os
import sys

import psutil

_SOFT = 1  # omp_pause_soft
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
_LOOK_S = 0.1
_MUCH = 0.4
"""Cores that other programs keep busy and that the threads would need, too."""


def make_way_for_others() -> float | None:
    """Have threads sleep while they wait for each other, where other programs compute, too; before torch is imported.

    By themselves GNU's spin for milliseconds, and where one has lost its core to another program the rest spin until it
    is back: decoding on two cores with others at work took 2 to 50 times as long (docs/log.md). With the cores to
    themselves threads that sleep are slower, by a third.

    Returns
    -------
    float or None
        How many cores others use; None where nothing was changed, as where the environment says how to wait.
    """
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if "torch" in sys.modules or wanted == "1" or any(name in os.environ for name in _WAITING):
        return None
    cores = psutil.cpu_count() or 1
    used = psutil.cpu_percent(_LOOK_S) / 100 * cores
    if used + (int(wanted) if wanted.isdecimal() else cores) < cores + _MUCH:
        return None
    os.environ["OMP_WAIT_POLICY"] = "passive"
    return used


def let_go_of_threads() -> None:
    """Give back the threads that operators of the calling thread have run on; the next operator gets new ones.

    OpenMP keeps a team for each thread that has ever computed. With more threads in all than cores, GNU's puts those to
    sleep that wait for the next operator, and waking them at each makes decoding 0.6 times as fast (docs/log.md). So
    who has loaded a model lets go, and another thread may compute with it.
    """
    try:
        pause = ctypes.CDLL(None).omp_pause_resource_all
    except (AttributeError, OSError, TypeError):  # another runtime, or one before OpenMP 5.0
        return
    pause(_SOFT)

"""The threads that torch's operators run on, which belong to the thread that calls them."""

from __future__ import annotations

import ctypes

_SOFT = 1  # omp_pause_soft


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

"""A process that judges architectures: a name a line on standard input, a verdict in JSON a line on standard output.

Models print, warn, and may die of memory or worse. So the verdicts have the original standard output to themselves, and
whoever started the process takes its silence or its end for a verdict.
"""

from __future__ import annotations

import json
import os
import sys
import warnings

_MEMORY_BYTES = 8 * 2**30


def main() -> None:
    """Serve until standard input ends."""
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    _bound_memory()
    warnings.simplefilter("ignore")

    import torch
    from transformers.utils import logging

    from kcache.verify.judge import judge_model, judge_type

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    for line in sys.stdin:
        job = json.loads(line)
        if job["named"]:
            verdict = judge_model(job["name"], trust_remote_code=job["trust"])
        else:
            verdict = judge_type(job["name"])
        out.write(json.dumps(verdict.to_dict()) + "\n")


def _bound_memory() -> None:
    """Refuse this process more than it may need, where the system can."""
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    except (ImportError, OSError, ValueError):
        return


if __name__ == "__main__":
    main()

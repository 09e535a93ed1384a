"""Decode steps of llama.cpp on request; ``benchmarks/beside_llama.py`` starts it with a Python that has it.

    python benchmarks/llama_peer.py MODEL.gguf CTX THREADS FLASH STATE

It prefills CTX tokens, or reads STATE if an earlier run left it there, says ``{"ready": ...}`` and then, for every line
``N`` on standard input, decodes N tokens and answers with their milliseconds, a JSON list on one line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from ctypes import c_size_t
from pathlib import Path

import llama_cpp

BATCH = 512


def main() -> None:
    """Serve until standard input ends."""
    model, ctx, threads, flash, state = sys.argv[1], *map(int, sys.argv[2:5]), Path(sys.argv[5])
    llama = llama_cpp.Llama(
        model, n_ctx=ctx + 1024, n_batch=BATCH, n_threads=threads, n_threads_batch=threads, flash_attn=bool(flash),
        verbose=False,
    )  # fmt: skip
    vocabulary = llama.n_vocab()
    tokens = [17 + (7919 * place) % (vocabulary - 100) for place in range(ctx)]
    context = llama.ctx
    if state.exists():
        array, count = (llama_cpp.llama_token * ctx)(), c_size_t(0)
        if not llama_cpp.llama_state_load_file(context, os.fsencode(state), array, ctx, count):
            raise SystemExit(f"{state} is not a state of this model; remove it")
        llama.n_tokens = ctx
    else:
        llama.eval(tokens)
        new = state.with_suffix(".new")
        array = (llama_cpp.llama_token * ctx)(*tokens)
        llama_cpp.llama_state_save_file(context, os.fsencode(new), array, ctx)
        new.replace(state)
    info = llama_cpp.llama_print_system_info().decode()
    print(json.dumps({"ready": llama_cpp.__version__, "system": info}), flush=True)
    at = 0
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            at += 1
            began = time.perf_counter()
            llama.eval([17 + (104729 * at) % (vocabulary - 100)])
            llama_cpp.llama_synchronize(context)
            llama.ctx and llama_cpp.llama_get_logits_ith(context, -1)
            times.append((time.perf_counter() - began) * 1e3)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()

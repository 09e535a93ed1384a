"""Decode steps of llama.cpp on request; ``benchmarks/beside_llama.py`` starts it with a Python that has it.

    python benchmarks/llama_peer.py MODEL.gguf CTX THREADS FLASH

The context is a prefill of a few thousand tokens, copied until there are CTX, each copy's positions moved on: what a
step costs does not depend on what the rows hold. It says ``{"ready": ...}`` and then, for every line ``N`` on standard
input, decodes N tokens and answers with their milliseconds, a JSON list on one line.
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from typing import Any

import llama_cpp as llama

PIECE = 2048


def feed(context: Any, tokens: list[int]) -> None:
    """Run tokens through the model, behind what the first sequence holds."""
    array = (llama.llama_token * len(tokens))(*tokens)
    for start in range(0, len(tokens), 512):
        part = tokens[start : start + 512]
        at = ctypes.cast(ctypes.byref(array, start * ctypes.sizeof(llama.llama_token)), llama.llama_token_p)
        if llama.llama_decode(context, llama.llama_batch_get_one(at, len(part))) != 0:
            raise SystemExit("llama_decode failed")
    llama.llama_synchronize(context)


def fill(context: Any, vocabulary: int, ctx: int) -> None:
    """Fill the first sequence with ``ctx`` tokens."""
    memory, copies = llama.llama_get_memory(context), ctx // PIECE
    feed(context, [17 + (7919 * place) % (vocabulary - 100) for place in range(PIECE)])
    size = llama.llama_state_seq_get_size(context, 0)
    rows = (ctypes.c_uint8 * size)()
    llama.llama_state_seq_get_data(context, rows, size, 0)
    for copy in range(1, copies):
        if llama.llama_state_seq_set_data(context, rows, size, copy) == 0:
            raise SystemExit(f"no room for {ctx} tokens")
        llama.llama_memory_seq_add(memory, copy, -1, -1, copy * PIECE)
        llama.llama_memory_seq_cp(memory, copy, 0, -1, -1)


def main() -> None:
    """Serve until standard input ends."""
    ctx, threads, flash = map(int, sys.argv[2:5])
    llama.llama_backend_init()
    silence = llama.llama_log_callback(lambda *_: None)
    llama.llama_log_set(silence, ctypes.c_void_p(0))
    model = llama.llama_model_load_from_file(sys.argv[1].encode(), llama.llama_model_default_params())
    params = llama.llama_context_default_params()
    params.n_ctx, params.n_batch, params.n_ubatch, params.n_seq_max = ctx + PIECE, 512, 512, max(1, ctx // PIECE)
    params.kv_unified, params.n_threads, params.n_threads_batch = True, threads, threads
    params.flash_attn_type = 1 if flash else 0
    context = llama.llama_init_from_model(model, params)
    vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
    fill(context, vocabulary, ctx)
    feed(context, [17])
    print(json.dumps({"ready": llama.__version__, "system": llama.llama_print_system_info().decode()}), flush=True)
    at = 0
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            at += 1
            began = time.perf_counter()
            feed(context, [17 + (104729 * at) % (vocabulary - 100)])
            times.append((time.perf_counter() - began) * 1e3)
        print(json.dumps(times), flush=True)


if __name__ == "__main__":
    main()

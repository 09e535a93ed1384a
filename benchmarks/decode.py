"""Time one decode step of the demo model's shape with KCache beside the stock caches, in one process.

Random weights in the model's real shapes (speed does not depend on them; picks without locality do not matter where
both tiers are RAM), a context of random K and V filled straight into each cache, engines taking turns so that the
ratio holds on a noisy machine. Prints median [lowest, highest] milliseconds of a whole step, and ratios.

    python benchmarks/decode.py --ctx 2048,8192,32768 --batch 1 --topn 128 --rounds 5
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache
from transformers.cache_utils import Cache

import kcache
from kcache.attention import attach
from kcache.cache import KCache
from kcache.policy import Policy

STEPS = 6


def model(dtype: torch.dtype) -> LlamaForCausalLM:
    """SmolLM2-135M's shape with random weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2**20,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


def fill(cache: Cache, lm: LlamaForCausalLM, ctx: int, batch: int) -> None:
    """Put a context of random rows into every layer."""
    generator = torch.Generator().manual_seed(1)
    for layer in range(lm.config.num_hidden_layers):
        shape = (batch, lm.config.num_key_value_heads, ctx, 64)
        k, v = (torch.randn(shape, generator=generator).to(lm.dtype) for _ in range(2))
        cache.update(k, v, layer)


@torch.no_grad()
def steps(lm: LlamaForCausalLM, cache: Cache, batch: int) -> list[float]:
    """Milliseconds of each of a few decode steps; the first is a warm-up and not returned."""
    token = torch.zeros(batch, 1, dtype=torch.long)
    times = []
    for _ in range(STEPS + 1):
        began = time.perf_counter()
        lm(input_ids=token, past_key_values=cache, use_cache=True, logits_to_keep=1)
        times.append((time.perf_counter() - began) * 1e3)
    return times[1:]


def compare(lm: LlamaForCausalLM, ctx: int, batch: int, topn: int, rounds: int) -> dict[str, list[float]]:
    """Times per engine, the engines alternating within each round."""
    room = ctx + rounds * (STEPS + 1) + 1
    engines: dict[str, Callable[[], Cache]] = {
        "DynamicCache": lambda: DynamicCache(config=lm.config),
        "StaticCache": lambda: StaticCache(config=lm.config, max_cache_len=room),
        "KCache": lambda: KCache(lm, Policy(topn=topn, offload="all"), max_length=room),
    }
    caches = {}
    with attach(lm):
        for name, make in engines.items():
            caches[name] = make()
            fill(caches[name], lm, ctx, batch)
    times: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, cache in caches.items():
            if name == "KCache":
                with attach(lm):
                    times[name] += steps(lm, cache, batch)
            else:
                times[name] += steps(lm, cache, batch)
    return times


def main() -> None:
    """Parse options, run the cross product, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ctx", default="256,2048,8192,32768")
    parser.add_argument("--batch", default="1")
    parser.add_argument("--topn", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", action="store_true", help="print one JSON object a row instead of a table")
    options = parser.parse_args()
    lm = model(getattr(torch, options.dtype))
    env = {
        "kcache": kcache.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "dtype": options.dtype,
        "topn": options.topn,
        "run": "host-only",
    }
    if not options.json:
        print(" ".join(f"{name}={value}" for name, value in env.items()))
        print("| ctx | batch | engine | ms/step | KCache is faster by |\n|---|---|---|---|---|")
    for ctx in map(int, options.ctx.split(",")):
        for batch in map(int, options.batch.split(",")):
            times = compare(lm, ctx, batch, options.topn, options.rounds)
            ours = statistics.median(times["KCache"])
            for name, values in times.items():
                median = statistics.median(values)
                if options.json:
                    row = {"ctx": ctx, "batch": batch, "engine": name, "ms": values, "ratio": median / ours}
                    print(json.dumps(row | {"env": env}))
                else:
                    spread = f"{median:.1f} [{min(values):.1f}, {max(values):.1f}]"
                    print(f"| {ctx:,} | {batch} | {name} | {spread} | {median / ours:.2f}x |", flush=True)
            gc.collect()


if __name__ == "__main__":
    main()

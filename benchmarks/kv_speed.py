"""How fast tokens are decoded with a KV cache of 8 bits beside one of 16, by how many stand before.

    python benchmarks/kv_speed.py [--model M] [--depths 0,2048,7168] [--exit-layer 3] [--rounds 9]

Two native engines with the same weights decode in turn; speeds are medians of the rounds, ratios
medians of the rounds' ratios [quartiles]. The context is keys and values of zero, which take the
time of any others.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch

from river_llm import ExitPolicy, RiverLM
from river_llm.engines import CpuEngine

TOKENS = 24  # of a round


def tokens_per_second(engine: CpuEngine, policy: ExitPolicy, depth: int) -> float:
    """Of some tokens after `depth` others, after two to warm up."""
    engine.policy = policy
    engine.truncate(depth)
    if engine.length < depth:
        engine.lengthen(depth)
    token = torch.zeros(1, dtype=torch.long)
    if depth == 0:
        token = engine.prefill(token.unsqueeze(0)).best_tokens
    for place in range(-2, TOKENS):
        if place == 0:
            start = time.perf_counter()
        token = engine.decode(token).best_tokens
    return TOKENS / (time.perf_counter() - start)


def load(model: str, kv_bits: int) -> CpuEngine:
    """The native engine of a model, with a KV cache of so many bits."""
    engine = RiverLM.from_pretrained(model, engine="cpu", kv_bits=kv_bits).engine
    assert isinstance(engine, CpuEngine)
    return engine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--depths", default="0,2048,7168")
    parser.add_argument("--exit-layer", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    engines = {bits: load(options.model, bits) for bits in (16, 8)}
    arms = {
        "backbone": ExitPolicy.never(),
        f"exit after {options.exit_layer}": ExitPolicy.fixed(options.exit_layer),
        "full quantisation": ExitPolicy.always(),
    }
    for bits, engine in engines.items():
        print(f"{bits} bits: {engine.position_bytes} bytes a token ({engine.setting})")
    for depth in map(int, options.depths.split(",")):
        for name, policy in arms.items():
            rounds = [
                [tokens_per_second(engine, policy, depth) for engine in engines.values()]
                for _ in range(options.rounds)
            ]
            wide, narrow = (statistics.median(speeds) for speeds in zip(*rounds, strict=True))
            low, ratio, high = statistics.quantiles([one[1] / one[0] for one in rounds], n=4)
            print(
                f"{depth:6} before, {name:17}: {wide:6.1f} tokens/s with 16 bits, {narrow:6.1f} "
                f"with 8, ratio {ratio:.2f} [{low:.2f} - {high:.2f}]"
            )


if __name__ == "__main__":
    main()

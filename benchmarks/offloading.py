"""What offloading costs a token that needs no evicted layer, and one that needs all of them.

    python benchmarks/offloading.py [--shape llama-3.2-1b] [--exit-layer 3] [--context 512]

Two engines with the same random weights, one of them with the layers behind the exit in a file,
decode in turn; figures are medians of the rounds' ratios. The context is keys and values of zero.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

from river_llm import ExitPolicy, RiverConfig
from river_llm.benchmark.random_weights import SHAPES, random_model, random_river
from river_llm.engines import CpuEngine
from river_llm.load.repacked_weights import read_engine, write_engine
from river_llm.residency import OffloadConfig

TOKENS = 16  # of a round


def seconds_of(engine: CpuEngine, policy: ExitPolicy, context: int) -> float:
    """For one token, after two to warm up."""
    engine.policy = policy
    engine.truncate(0)
    engine.lengthen(context)
    token = torch.zeros(1, dtype=torch.long)
    for place in range(-2, TOKENS):
        if place == 0:
            start = time.perf_counter()
        token = engine.decode(token).best_tokens
    return (time.perf_counter() - start) / TOKENS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="llama-3.2-1b", choices=SHAPES)
    parser.add_argument("--exit-layer", type=int, default=3)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    policy = ExitPolicy.fixed(options.exit_layer)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        model = random_model(SHAPES[options.shape])
        river = random_river(model, RiverConfig())
        whole = CpuEngine(model, river, policy, free_model=True)
        del river
        description = write_engine(folder, whole)
        layers = OffloadConfig("layers", layers=options.exit_layer)
        offloaded, _ = read_engine(folder, description, policy, None, layers)
        ratios: dict[str, list[float]] = {"no miss": [], "all evicted layers": []}
        speeds = []
        for _ in range(options.rounds):
            for case, of_case in (("no miss", policy), ("all evicted layers", ExitPolicy.never())):
                plain = seconds_of(whole, of_case, options.context)
                ratios[case].append(plain / seconds_of(offloaded, of_case, options.context))
                if case == "no miss":
                    speeds.append(1 / plain)
    print(f"without offloading: {statistics.median(speeds):.1f} tokens/s")
    for case, of_case in ratios.items():
        low, median, high = statistics.quantiles(of_case, n=4)
        print(f"offloaded, {case}: {median:.3f} of that speed [{low:.3f} - {high:.3f}]")


if __name__ == "__main__":
    main()

"""What a verification of several tokens takes, in steps of the backbone over one.

    python benchmarks/verification.py [--model M] [--river DIR] [--rounds 30]

Every round times a single step and each verification in turn; figures are medians of the rounds'
ratios.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from river_llm import ExitPolicy, RiverLM

LENGTHS = (2, 3, 4, 5, 6, 8, 13)
CONTEXT = 128


def seconds_of(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--river", help="the folder of a saved river")
    parser.add_argument("--rounds", type=int, default=30)
    options = parser.parse_args()
    lm = RiverLM.from_pretrained(options.model, options.river, ExitPolicy.never())
    engine = lm.engine
    tokens = torch.randint(100, 1000, (1, CONTEXT + max(LENGTHS)))
    engine.prefill(tokens[:, :CONTEXT])
    ratios: dict[int, list[float]] = {length: [] for length in LENGTHS}
    steps = []
    for number in range(-2, options.rounds):  # two to warm up
        times = {}
        step = seconds_of(lambda: engine.decode(tokens[:, CONTEXT]))
        engine.rewind([1])
        for length in LENGTHS:
            drafted = tokens[:, CONTEXT : CONTEXT + length]
            times[length] = seconds_of(lambda drafted=drafted: engine.verify(drafted))
            engine.rewind([length])
        if number >= 0:
            steps.append(step)
            for length, seconds in times.items():
                ratios[length].append(seconds / step)
    print(f"one token: {1000 * statistics.median(steps):.2f} ms")
    for length, of_length in ratios.items():
        low, median, high = statistics.quantiles(of_length, n=4)
        print(f"{length:2} tokens: {median:.2f} of it [{low:.2f} - {high:.2f}]")


if __name__ == "__main__":
    main()

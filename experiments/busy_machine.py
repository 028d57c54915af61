"""Decoding on a quiet machine and beside processes that compute, by environment variables: how
OpenMP's threads wait for each other (`cli/imports.py`) and how the native engine's do.

    python experiments/busy_machine.py --engine torch --setting "" --setting GOMP_SPINCOUNT=300000

Each run is `river-llm bench` in a process of its own; all settings run in each round, quiet and
busy. An empty setting is what the command line chooses, GOMP_SPINCOUNT=300000 libgomp's own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from output import describe, print_table, write_json

from river_llm.measure.rounds import Spread, interleaved


@contextmanager
def beside(processes: int) -> Iterator[None]:
    """So many processes that compute meanwhile, one thread each."""
    started = [subprocess.Popen([sys.executable, "-c", "while 1: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in started:
            process.kill()
            process.wait()


def speeds(setting: str, options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second of each variant under variables, `NAME=value` with blanks between."""
    command = [str(Path(sys.executable).parent / "river-llm"), "bench", "--model", options.model]
    command += ["--engine", options.engine, "--prompt-tokens", "0", "--exit-layer", "3", "--json"]
    command += ["--new-tokens", str(options.tokens), "--rounds", "1"]
    variables = {**os.environ, **dict(part.split("=", 1) for part in setting.split())}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True)
    results = json.loads(done.stdout)["results"]
    return {result["variant"]: result["tokens_per_second"]["median"] for result in results}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--setting", action="append")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--engine", default="auto", choices=["auto", "cpu", "torch"])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--beside", type=int, default=1, help="processes that compute")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("-o", "--output", type=Path, help="a JSON file")
    options = parser.parse_args()
    found: dict[tuple[str, str, int], list[float]] = defaultdict(list)
    runs = [(one, busy) for one in options.setting or [""] for busy in (0, options.beside)]
    for order in interleaved(runs, options.rounds):
        for setting, busy in order:
            with beside(busy):
                for variant, speed in speeds(setting, options).items():
                    found[variant, setting or "default", busy].append(speed)
    rows = [
        [variant, setting, str(busy), str(Spread.of(values))]
        for (variant, setting, busy), values in sorted(found.items())
    ]
    print_table(("variant", "setting", "beside", "tokens/s"), rows)
    if options.output:
        results = [{"key": key, "tokens_per_second": values} for key, values in found.items()]
        write_json(options.output, {**describe(), "results": results})


if __name__ == "__main__":
    main()

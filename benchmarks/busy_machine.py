"""The torch engine on a quiet machine and beside processes that compute, by how OpenMP's threads
wait for each other: what `cli/imports.py` sets, beside other values of its variables.

    python benchmarks/busy_machine.py --setting "" --setting GOMP_SPINCOUNT=1000

Each run is a process of its own; all settings run in each round, quiet and busy, forth and back. An
empty setting is what the command line chooses, GOMP_SPINCOUNT=300000 what libgomp does by itself.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from river_llm.benchmark.turns import in_turn

_RIVER_LLM = str(Path(sys.executable).parent / "river-llm")


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


def tokens_per_second(setting: str, model: str, tokens: int) -> float:
    """Of one answer under these environment variables, `NAME=value` with blanks between."""
    command = [_RIVER_LLM, "generate", "--model", model, "--engine", "torch", "--policy", "never"]
    command += ["--max-new-tokens", str(tokens), "--json", "Tell me of rivers."]
    variables = dict(part.split("=", 1) for part in setting.split())
    answer = subprocess.run(
        command, env={**os.environ, **variables}, capture_output=True, text=True, check=True
    )
    return float(json.loads(answer.stdout)["decode_tokens_per_second"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--setting", action="append", required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--beside", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    seen: dict[tuple[str, int], list[float]] = defaultdict(list)
    runs = [(setting, busy) for setting in arguments.setting for busy in (0, arguments.beside)]
    for order in in_turn(runs, arguments.rounds):
        for setting, busy in order:
            with beside(busy):
                speed = tokens_per_second(setting, arguments.model, arguments.tokens)
            seen[setting, busy].append(speed)
            print(f"{setting or 'default'}, beside {busy}: {speed:.1f}", file=sys.stderr)
    for setting, busy in runs:
        speeds = sorted(seen[setting, busy])
        print(
            f"{setting or 'default':40} beside {busy}: {statistics.median(speeds):5.1f} tokens/s "
            f"[{speeds[0]:.1f} - {speeds[-1]:.1f}]"
        )


if __name__ == "__main__":
    main()

"""How much memory backbone, river and offloading take, by the system's own account.

Each arm runs in a process of its own, so that nothing of another one is counted, and starts from
packed weights in a file, as an everyday start does. The context is not computed: its keys and
values are zeros (`CpuEngine.lengthen`), which take the memory and the time of any others.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from river_llm.benchmark.turns import in_turn
from river_llm.engines import CpuEngine
from river_llm.errors import RiverError
from river_llm.exit_policy import ExitPolicy
from river_llm.load.repacked_weights import read_engine, write_engine
from river_llm.memory import peak_memory_bytes, resident_memory_bytes
from river_llm.residency import OffloadConfig

_DESCRIPTION = "engine.json"
_SETTLING_TOKENS = 8  # before memory and speed are read
_Step = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class MemoryArm:
    """What one process holds and runs.

    Attributes:
        name: in tables.
        exit_layer: backbone layers of every token.
        resident_layers: that are in memory; None: all.
        with_river: whether the river is.
    """

    name: str
    exit_layer: int
    resident_layers: int | None = None
    with_river: bool = True


@dataclass(frozen=True, slots=True)
class MemoryResult:
    """What one arm took at one length of context.

    Attributes:
        arm, context: which, in tokens.
        tokens_per_second: of decoding at that length, arms in turn.
        steady_bytes: resident memory of the process after some tokens at that length.
        peak_bytes: the most since the process began.
        base_bytes: resident memory of the process before it held anything of the model: Python and
            its libraries.
        expected_bytes: weights, keys and values that the arm should hold, by arithmetic.
        misses: layers that had to be read back meanwhile.
    """

    arm: str
    context: int
    tokens_per_second: float
    steady_bytes: int
    peak_bytes: int
    base_bytes: int
    expected_bytes: int
    misses: int

    @property
    def held_bytes(self) -> int:
        """Resident memory without Python and its libraries."""
        return self.steady_bytes - self.base_bytes


def memory_arms(num_layers: int, exit_layer: int, bits: int) -> list[MemoryArm]:
    """Backbone, full quantisation, and River at a fixed depth without and with offloading."""
    return [
        MemoryArm("backbone", num_layers, with_river=False),
        MemoryArm(f"full {bits}-bit", 0, 0),
        MemoryArm(f"exit after {exit_layer}", exit_layer),
        MemoryArm(f"exit after {exit_layer}, offloaded", exit_layer, exit_layer),
    ]


def keep_weights(engine: CpuEngine, directory: Path) -> None:
    """Write what the arms' processes start from."""
    description = write_engine(directory, engine)
    (directory / _DESCRIPTION).write_text(json.dumps(description), encoding="utf-8")


def measure_memory(
    directory: Path,
    arms: Sequence[MemoryArm],
    contexts: Sequence[int],
    new_tokens: int,
    rounds: int,
    threads: int,
    kv_bits: int,
    step_done: _Step,
) -> list[MemoryResult]:
    """Run the arms in turn at each length, each time in a process of its own, one at a time.

    Args:
        directory: where `keep_weights` wrote.
        contexts: tokens in the cache.
        new_tokens: that are decoded each time.
        rounds: of all arms at each length; the speed is their median, memory the largest.
        kv_bits: of the KV cache of every arm, 16 or 8.
        step_done: called with (processes done, processes in all).

    Raises:
        RiverError: a process failed, for want of memory for example.
    """
    steps = len(contexts) * rounds * len(arms)
    done = 0
    results = []
    for context in sorted(contexts):
        seen: list[list[MemoryResult]] = [[] for _ in arms]
        for order in in_turn(list(zip(seen, arms, strict=True)), rounds):
            for found, arm in order:
                step_done(done, steps)
                found.append(_measure(directory, arm, context, new_tokens, threads, kv_bits))
                done += 1
        for found in seen:
            speed = median(result.tokens_per_second for result in found)
            largest = max(found, key=lambda result: result.steady_bytes)
            results.append(replace(largest, tokens_per_second=speed))
    step_done(steps, steps)
    return results


def _measure(
    directory: Path, arm: MemoryArm, context: int, new_tokens: int, threads: int, kv_bits: int
) -> MemoryResult:
    task = {
        "directory": str(directory),
        "arm": asdict(arm),
        "context": context,
        "new_tokens": new_tokens,
        "threads": threads,
        "kv_bits": kv_bits,
    }
    process = subprocess.run(
        [sys.executable, "-m", __spec__.name],
        input=json.dumps(task),
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode != 0:
        last = process.stderr.strip().rsplit("\n", 1)[-1] or f"status {process.returncode}"
        raise RiverError(f"{arm.name} at {context} tokens could not be measured: {last}")
    return MemoryResult(**json.loads(process.stdout))


def _run(task: dict[str, Any]) -> MemoryResult:
    """In the arm's own process."""
    arm = MemoryArm(**task["arm"])
    directory = Path(task["directory"])
    torch.set_num_threads(task["threads"])
    description = json.loads((directory / _DESCRIPTION).read_text(encoding="utf-8"))
    offload = None
    if arm.resident_layers is not None:
        offload = OffloadConfig("layers", layers=arm.resident_layers)
    base = resident_memory_bytes()
    engine, _ = read_engine(
        directory,
        description,
        ExitPolicy.fixed(arm.exit_layer),
        task["threads"],
        offload,
        kv_bits=task["kv_bits"],
        with_river=arm.with_river,
    )
    weights = sum(engine.layer_bytes[: engine.resident_layers]) + engine.rest_bytes
    if not arm.with_river:
        embedding = 0 if engine.embedding is None else engine.embedding.nbytes
        weights -= engine.rest_bytes - engine.head_bytes - embedding
    engine.lengthen(task["context"])
    token = torch.zeros(1, dtype=torch.long)
    for _ in range(_SETTLING_TOKENS):
        token = engine.decode(token).best_tokens
    start = time.perf_counter()
    for _ in range(task["new_tokens"]):
        token = engine.decode(token).best_tokens
    seconds = time.perf_counter() - start
    return MemoryResult(
        arm=arm.name,
        context=task["context"],
        tokens_per_second=task["new_tokens"] / seconds,
        steady_bytes=resident_memory_bytes(),
        peak_bytes=peak_memory_bytes(),
        base_bytes=base,
        expected_bytes=weights + engine.cache_bytes,
        misses=engine.offload_statistics.misses,
    )


if __name__ == "__main__":
    print(json.dumps(asdict(_run(json.load(sys.stdin)))))

"""How much memory backbone, river and offloading take, by the system's own account.

Each variant runs in a process of its own, so that nothing of another one is counted, and starts
from packed weights in a file, as an everyday start does. The context is not computed: its keys and
values are zeros (`CpuEngine.write_zeros`), which take the memory and the time of any others.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from river_llm.engines import CpuEngine, Step
from river_llm.errors import ConfigError, RiverError
from river_llm.load.repacked_weights import read_engine, write_engine
from river_llm.measure.environment import describe_run
from river_llm.measure.rounds import Progress, interleaved
from river_llm.memory import peak_memory_bytes, resident_memory_bytes
from river_llm.river.policy import ExitPolicy
from river_llm.river.residency import OffloadConfig

_CONTEXTS = (4096, 8192, 16384, 32768, 65536)
NEW_TOKENS = 32  # decoded at each length
_SETTLING_TOKENS = 8  # before memory and speed are read


@dataclass(frozen=True, slots=True)
class MemoryVariant:
    """What one process holds and runs.

    Attributes:
        exit_layer: backbone layers of every token.
        resident_layers: that are in memory; None: all.
        with_river: whether the river is.
    """

    name: str
    exit_layer: int
    resident_layers: int | None = None
    with_river: bool = True


def memory_variants(num_layers: int, exit_layers: Sequence[int], width: str) -> list[MemoryVariant]:
    """Backbone, full quantisation, and River at fixed depths without and with offloading; at last
    the whole backbone with the layers behind the first depth read back for every token."""
    rivers = [
        MemoryVariant(f"exit after {depth}{suffix}", depth, resident)
        for depth in exit_layers
        for suffix, resident in (("", None), (", offloaded", depth))
    ]
    return [
        MemoryVariant("backbone", num_layers, with_river=False),
        MemoryVariant(f"full {width}-bit", 0, 0),
        *rivers,
        MemoryVariant("backbone, offloaded", num_layers, exit_layers[0]),
    ]


def bench_memory(
    engine: CpuEngine,
    width: str,
    exit_layers: Sequence[int],
    contexts: Sequence[int],
    rounds: int,
    threads: int | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure what the variants of a model take.

    Args:
        engine: what the variants' processes start from; they have KV caches of its width.
        width: of the river, see `RiverConfig`.
        exit_layers: of the variants of River; by default 3.
        contexts: tokens in the cache; without any beside 0, 4K to 64K as far as the model's context
            goes.

    Returns:
        plain JSON values: the run, and the results of each variant at each context (see
        `measure_memory`).

    Raises:
        ConfigError: the model has fewer layers, or a shorter context.
        RiverError: a process failed, for want of memory for example.
    """
    most = (engine.context_length or 1 << 30) - NEW_TOKENS - _SETTLING_TOKENS
    contexts = [n for n in contexts if n] or [n for n in _CONTEXTS if n <= most] or [most]
    if max(contexts) > most:
        raise ConfigError(f"--depth {max(contexts)} leaves no room in the model's context")
    for depth in exit_layers:
        ExitPolicy.fixed(depth).thresholds(engine.num_layers)
    variants = memory_variants(engine.num_layers, exit_layers or [3], width)
    with tempfile.TemporaryDirectory() as name:
        write_engine(Path(name), engine)
        results = measure_memory(
            Path(name), variants, contexts, rounds, threads, engine.kv_bits, progress
        )
    full = {x["context"]: x["steady_bytes"] for x in results if x["variant"] == variants[1].name}
    for result in results:
        result["times_full"] = result["steady_bytes"] / full[result["context"]]
    return {**describe_run(), "rounds": rounds, "results": results}


def measure_memory(
    directory: Path,
    variants: Sequence[MemoryVariant],
    contexts: Sequence[int],
    rounds: int,
    threads: int | None = None,
    kv_bits: int = 16,
    progress: Progress | None = None,
) -> list[dict[str, Any]]:
    """Run the variants in interleaved rounds at each length, one process at a time.

    Args:
        directory: where `write_engine` wrote.
        contexts: tokens in the cache.
        rounds: at each length; the speed is their median, memory the largest.

    Returns:
        plain JSON values of each variant at each length:
        ``tokens_per_second`` of decoding,
        ``steady_bytes``, resident memory of the process after some tokens at that length,
        ``peak_bytes``, the most since the process began,
        ``base_bytes``, before it held anything of the model: Python, its libraries,
        ``expected_bytes``, weights, keys and values that it should hold, by arithmetic,
        ``misses``, layers that had to be read back meanwhile.

    Raises:
        RiverError: a process failed, for want of memory for example.
    """
    seen: dict[tuple[str, int], list[dict[str, Any]]] = {}
    runs = [(x, context) for context in contexts for o in interleaved(variants, rounds) for x in o]
    for done, (variant, context) in enumerate(runs, 1):
        task = (str(directory), asdict(variant), context, threads, kv_bits)
        result = _in_own_process(task, f"{variant.name} at {context}")
        seen.setdefault((variant.name, context), []).append(result)
        if progress:
            progress(done, len(runs))
    return [
        max(found, key=lambda result: result["steady_bytes"])
        | {"tokens_per_second": median(result["tokens_per_second"] for result in found)}
        for found in seen.values()
    ]


def _in_own_process(task: tuple[object, ...], name: str) -> dict[str, Any]:
    command = [sys.executable, "-m", __spec__.name, json.dumps(task)]
    process = subprocess.run(command, capture_output=True, text=True, check=False)
    if process.returncode != 0:
        last = process.stderr.strip().rsplit("\n", 1)[-1] or f"status {process.returncode}"
        raise RiverError(f"{name} tokens could not be measured: {last}")
    result: dict[str, Any] = json.loads(process.stdout)
    return result


def _run(
    directory: str, variant: MemoryVariant, context: int, threads: int | None, kv_bits: int
) -> dict[str, Any]:
    """In the variant's own process."""
    resident = variant.resident_layers
    base = resident_memory_bytes()
    engine, _ = read_engine(
        Path(directory),
        ExitPolicy.fixed(variant.exit_layer),
        threads,
        None if resident is None else OffloadConfig("layers", layers=resident),
        kv_bits=kv_bits,
        with_river=variant.with_river,
    )
    weights = sum(engine.layer_bytes[: engine.resident_layers]) + engine.rest_bytes
    if not variant.with_river:
        embedding = 0 if engine.embedding is None else engine.embedding.nbytes
        weights -= engine.rest_bytes - engine.head_bytes - embedding
    sequence = engine.add_sequence()
    engine.write_zeros(sequence, context)
    thresholds = torch.tensor(ExitPolicy.fixed(variant.exit_layer).thresholds(engine.num_layers))
    tokens = [0]
    for place in range(-_SETTLING_TOKENS, NEW_TOKENS):
        if place == 0:
            start = time.perf_counter()
        step = Step(tokens, [sequence], thresholds, [0])
        tokens = engine.forward(step).best_tokens.tolist()
    seconds = time.perf_counter() - start
    return {
        "variant": variant.name,
        "context": context,
        "tokens_per_second": NEW_TOKENS / seconds,
        "steady_bytes": resident_memory_bytes(),
        "peak_bytes": peak_memory_bytes(),
        "base_bytes": base,
        "expected_bytes": weights + engine.cache_bytes,
        "misses": engine.offload_statistics.misses,
    }


if __name__ == "__main__":
    directory, variant, *numbers = json.loads(sys.argv[1])
    print(json.dumps(_run(directory, MemoryVariant(**variant), *numbers)))

"""`river-llm bench --memory`: what backbone, river and offloading take."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from river_llm.cli.streams import print_json
from river_llm.cli.usage import usage_error

if TYPE_CHECKING:
    from river_llm.benchmark.memory import MemoryResult
    from river_llm.benchmark.subject import Subject

_CONTEXTS = (4096, 8192, 16384, 32768, 65536)
_NEW_TOKENS = 32
_MEGA = 1e6


def bench_memory(
    load: Callable[[], Subject],
    name: str,
    exit_layers: Sequence[int],
    contexts: Sequence[int],
    rounds: int,
    threads: int,
    lm_head_bits: int,
    kv_bits: int,
    json_output: bool,
) -> None:
    """Measure, and print a table or JSON.

    Args:
        load: the model and its river.
        contexts: tokens; none: 4K to 64K, as far as the model's context goes.

    Raises:
        typer.Exit: the model has fewer layers, or a shorter context.
        RiverError: the native engine can't run the model, or a process failed.
    """
    from river_llm.benchmark.environment import describe_environment
    from river_llm.benchmark.memory import keep_weights, measure_memory, memory_arms
    from river_llm.cli.progress import LoadingProgress
    from river_llm.engines import CpuEngine
    from river_llm.exit_policy import ExitPolicy

    with LoadingProgress(f"loading {name}"):
        subject = load()
        room = (subject.context_length or 1 << 30) - 2 * _NEW_TOKENS
        num_layers = len(subject.river.exit_layers)
        if max(contexts, default=0) > room:
            raise usage_error(f"--depth {max(contexts)} doesn't leave room in the model's context")
        if not contexts:
            contexts = [context for context in _CONTEXTS if context <= room] or [room]
        if max(exit_layers) > num_layers:
            raise usage_error(f"--exit-layer {max(exit_layers)}: the model has {num_layers} layers")
        config = subject.river.config
        engine = CpuEngine(
            subject.model,
            subject.river,
            ExitPolicy.never(),
            threads=threads,
            lm_head_bits=lm_head_bits,
            free_model=True,
        )
    output = {
        **describe_environment(),
        "model": subject.name,
        "random_weights": subject.is_random,
        "num_layers": num_layers,
        "river": config.to_dict(),
        "lm_head_bits": lm_head_bits,
        "kv_bits": kv_bits,
        "threads": threads,
        "rounds": rounds,
        "new_tokens": _NEW_TOKENS,
    }
    arms = memory_arms(num_layers, exit_layers[0], config.bits)
    for exit_layer in exit_layers[1:]:
        arms += memory_arms(num_layers, exit_layer, config.bits)[2:]
    with tempfile.TemporaryDirectory() as folder:
        keep_weights(engine, Path(folder))
        del engine, subject
        with LoadingProgress(f"measuring {name}") as progress:
            results = measure_memory(
                Path(folder),
                arms,
                contexts,
                _NEW_TOKENS,
                rounds,
                threads,
                kv_bits,
                progress.steps_done,
            )
    if json_output:
        output["results"] = [_as_json(result) for result in results]
        print_json(output)
    else:
        _print(results, output)


def _as_json(result: MemoryResult) -> dict[str, Any]:
    from dataclasses import asdict

    return {**asdict(result), "held_bytes": result.held_bytes}


def _print(results: Sequence[MemoryResult], output: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from river_llm.cli.render import stdout

    river = output["river"]
    stdout.print(
        f"{output['model']}, {output['num_layers']} layers, river of {river['bits']} bits in "
        f"groups of {river['group_size']} ({river['quantizer']}), LM head of "
        f"{output['lm_head_bits']} bits, KV cache of {output['kv_bits']}"
    )
    stdout.print(f"{output['processor']}, {output['date']}")
    table = Table(box=None, pad_edge=False)
    table.add_column("arm", no_wrap=True)
    columns = ("context", "steady MB", "x full", "peak MB", "model MB", "expected MB", "tokens/s")
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    full = {result.context: result.steady_bytes for result in results if "full" in result.arm}
    for result in results:
        sizes = (result.peak_bytes, result.held_bytes, result.expected_bytes)
        cells = [
            result.arm,
            str(result.context),
            f"{result.steady_bytes / _MEGA:.0f}",
            f"{result.steady_bytes / full[result.context]:.2f}",
            *(f"{size / _MEGA:.0f}" for size in sizes),
            f"{result.tokens_per_second:.1f}",
        ]
        table.add_row(*map(Text, cells))
    Console(width=200, highlight=False, markup=False).print(table)
    base = results[0].base_bytes
    stdout.print(
        "steady: resident memory while decoding, the whole process; x full: over the fully "
        "quantised model's; peak: the most since its start; model: steady without Python and its "
        f"libraries ({base / _MEGA:.0f} MB); expected: weights, keys and values by arithmetic"
    )

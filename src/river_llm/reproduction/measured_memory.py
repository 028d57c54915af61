"""Memory by the system's own account, each arm in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from river_llm.benchmark.environment import processor_name
from river_llm.benchmark.memory import keep_weights, measure_memory, memory_arms
from river_llm.engines import CpuEngine
from river_llm.report.arms import BACKBONE, full
from river_llm.report.models import Models, Progress
from river_llm.report.saved import Values, measured_once
from river_llm.reproduction.paper import BITS
from river_llm.reproduction.plan import Plan

_NEW_TOKENS = 32
_KV_BITS = 16  # as the paper's
_SPARE_TOKENS = 64  # of the context, for them


def measured_context(context: int, room: int | None) -> int:
    """As many tokens as are wanted and as leave room to decode some."""
    return context if room is None else min(context, room - _SPARE_TOKENS)


def measure_arms(
    plan: Plan,
    models: Models,
    described: Mapping[str, Any],
    exit_layer: int,
    context: int,
    folder: Path,
    threads: int,
    progress: Progress | None,
) -> Values:
    """Measure backbone, full quantisation, River and River offloaded, once, all at a fixed depth:
    an evicted layer is never missed.

    Args:
        models: on the native engine; they are let go of.
        described: what runs.
        exit_layer: backbone layers of every token.
        context: tokens in the cache.

    Returns:
        for each arm, under the name of the other tables where it is in them, the fields of
        `MemoryResult` and ``held_bytes``.

    Raises:
        RiverError: a process failed.
    """

    def steps_done(done: int, total: int) -> None:
        if progress:
            progress("memory", done, total)

    def measure() -> Values:
        engine = models.of(BACKBONE).engine
        assert isinstance(engine, CpuEngine)
        backbone, quantised, *river = memory_arms(engine.num_layers, exit_layer, BITS)
        arms = [backbone, replace(quantised, name=full(BITS).name), *river]
        with tempfile.TemporaryDirectory() as directory:
            keep_weights(engine, Path(directory))
            del engine
            models.release()
            results = measure_memory(
                Path(directory),
                arms,
                [context],
                _NEW_TOKENS,
                plan.rounds,
                threads,
                _KV_BITS,
                steps_done,
            )
        return {one.arm: {**asdict(one), "held_bytes": one.held_bytes} for one in results}

    return measured_once(
        folder / "measurements" / "memory.json",
        {
            "model": described,
            "full_arm": full(BITS).name,
            "exit_layer": exit_layer,
            "context": context,
            "rounds": plan.rounds,
            "threads": threads,
            "processor": processor_name(),
        },
        measure,
        plan.restart,
    )

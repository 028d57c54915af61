"""Runs the paper's tasks on a model, or goes on with them, and gathers what the report shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from river_llm.benchmark.bandwidth import ReadBandwidth
from river_llm.benchmark.environment import describe_environment
from river_llm.engines import CpuEngine
from river_llm.errors import ConfigError
from river_llm.report.arms import BACKBONE, Arm, decided_depths, full, mean_depth
from river_llm.report.identity import model_identity
from river_llm.report.models import Models, Progress
from river_llm.report.quality import TaskResults, run_task
from river_llm.report.saved import Values
from river_llm.reproduction.measured_memory import measure_arms, measured_context
from river_llm.reproduction.memory import ModelSizes
from river_llm.reproduction.paper import BITS, MEMORY_CONTEXT
from river_llm.reproduction.plan import Plan, is_generated, settings_for
from river_llm.reproduction.task_speed import machine_of, measure_task_speed


@dataclass(frozen=True, slots=True)
class Memory:
    """Backbone, full quantisation and River at one length of context.

    Attributes:
        context: tokens.
        expected: bytes by arithmetic, by arm.
        offload_depths: for each River arm, the backbone layers that stay with offloading: its mean
            depth over the tasks, rounded up.
        measured: see `measure_arms`; None if it was not measured.
        measured_context: tokens.
    """

    context: int
    expected: dict[str, int]
    offload_depths: dict[str, int]
    measured: Values | None = None
    measured_context: int | None = None


@dataclass(frozen=True, slots=True)
class Reproduction:
    """What came of it.

    Attributes:
        plan: what was wanted.
        model: see `describe_model`, without a policy.
        machine: the processor or the accelerator that computed.
        setting: of the engine.
        environment: command, versions.
        results: of each task that ran.
        speeds: see `measure_speed`; of the tasks with generated answers.
        left_out: what was not run, and why.
        memory: what the arms hold.
    """

    plan: Plan
    model: dict[str, Any]
    machine: str
    setting: str
    environment: dict[str, Any]
    results: dict[str, TaskResults]
    speeds: dict[str, Values]
    left_out: dict[str, str]
    memory: Memory


def reproduce(
    plan: Plan,
    models: Models,
    sizes: ModelSizes,
    folder: Path,
    read_bandwidth: ReadBandwidth,
    threads: int,
    progress: Progress | None = None,
) -> Reproduction:
    """Run what isn't there yet in `folder`, and gather it all.

    Args:
        models: of one variant; they are let go of before memory is measured.
        sizes: of the model and its river.
        read_bandwidth, threads: see `measure_rounds`.

    Raises:
        ConfigError: the river has other than 4 bits; memory is to be measured and can't be.
        RiverError: see `run_task`.
    """
    lm = models.of(BACKBONE)
    assert lm.river_config is not None
    if lm.river_config.bits != BITS:
        raise ConfigError(
            f"the river has {lm.river_config.bits} bits, the paper's has {BITS}; give another one"
        )
    if plan.measures_memory and not isinstance(lm.engine, CpuEngine):
        raise ConfigError("memory is measured on the native engine; leave out --measure-memory")
    results: dict[str, TaskResults] = {}
    speeds: dict[str, Values] = {}
    not_measured: dict[str, str] = {}
    for task in plan.tasks:
        results[task.name] = run_task(
            models,
            task.name,
            plan.arms,
            settings_for(task, plan.settings),
            folder / "results",
            with_fixed=False,
            with_random=False,
            batch_size=plan.batch_size,
            restart=plan.restart,
            progress=progress,
        )
        if plan.with_speed and is_generated(task):
            try:
                speeds[task.name] = measure_task_speed(
                    plan,
                    models,
                    task,
                    results[task.name],
                    folder,
                    read_bandwidth,
                    threads,
                    progress,
                )
            except ConfigError as error:
                not_measured[f"the speed of {task.name}"] = str(error)
    about = model_identity(lm, plan.settings.model)
    machine, setting = machine_of(lm.engine), lm.engine.setting
    depths = {arm.name: task_mean_depth(arm, results) for arm in plan.arms}
    memory = _arithmetic(plan, sizes, depths)
    if plan.measures_memory:
        context = measured_context(memory.context, lm.engine.context_length)
        depth = next(iter(memory.offload_depths.values()))
        del lm
        measured = measure_arms(plan, models, about, depth, context, folder, threads, progress)
        memory = Memory(memory.context, memory.expected, memory.offload_depths, measured, context)
    return Reproduction(
        plan,
        about,
        machine,
        setting,
        describe_environment(),
        results,
        speeds,
        {**plan.left_out, **not_measured},
        memory,
    )


def task_mean_depth(arm: Arm, results: Mapping[str, TaskResults]) -> float:
    """An arm's mean exit depth, the mean over the tasks."""
    depths = [mean_depth(decided_depths(found.results[arm.name])) for found in results.values()]
    return sum(depths) / len(depths)


def offloaded(arm: str) -> str:
    """What a River arm with evicted backbone layers is called."""
    return f"{arm}, offloaded"


def _arithmetic(plan: Plan, sizes: ModelSizes, depths: Mapping[str, float]) -> Memory:
    context = min(MEMORY_CONTEXT, sizes.context_length or MEMORY_CONTEXT)
    expected = {
        BACKBONE.name: sizes.held(context, sizes.num_layers, with_river=False),
        full(BITS).name: sizes.held(context, 0),
    }
    stay = {arm.name: math.ceil(depths[arm.name]) for arm in plan.river_arms}
    for name, layers in stay.items():
        expected[name] = sizes.held(context, sizes.num_layers)
        expected[offloaded(name)] = sizes.held(context, layers)
    return Memory(context, expected, stay)

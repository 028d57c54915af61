"""Runs a whole comparison, or goes on with it, and gathers what the report is written from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from river_llm.attachment import AttachedRiver
from river_llm.benchmark.bandwidth import ReadBandwidth
from river_llm.benchmark.environment import describe_environment, processor_name
from river_llm.benchmark.workload import PROSE, SHORT_CONTEXT
from river_llm.config import Strategy
from river_llm.engines import TorchEngine
from river_llm.errors import ConfigError
from river_llm.evaluation.harness import compare_results
from river_llm.evaluation.requests import TaskSettings
from river_llm.evaluation.tasks import TASKS
from river_llm.evaluation.tasks.task import GenerationTask
from river_llm.report import findings
from river_llm.report.arms import (
    BACKBONE,
    Arm,
    decided_depths,
    on_torch,
    planned_arms,
    random_like,
)
from river_llm.report.identity import model_identity, tokens_digest
from river_llm.report.models import Models, Progress
from river_llm.report.quality import TaskResults, run_task
from river_llm.report.reading import read_exits, read_layers, windows_of
from river_llm.report.saved import measurement
from river_llm.report.speed import measure_speed
from river_llm.text.utf8 import read_text

_KIND_ORDER = ("backbone", "full", "fixed", "similarity", "random", "strategy")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to compare.

    Attributes:
        tasks: with answers.
        settings: of the tasks; with a text, the divergence on it is measured too.
        windows: of the text, at most.
        thresholds: of the similarity arms, rising.
        exit_layers: of the fixed arms.
        strategies: see `planned_arms`.
        with_random: see `run_task`.
        with_speed: measure it.
        speed_tokens: that each pass decodes.
        rounds: of speed that count.
        seed: of random routing.
        batch_size: items that run together.
        restart: begin everything anew.
    """

    tasks: Sequence[str]
    settings: TaskSettings
    windows: int
    thresholds: Sequence[float]
    exit_layers: Sequence[int]
    strategies: Sequence[Strategy] = ()
    with_random: bool = True
    with_speed: bool = True
    speed_tokens: int = 256
    rounds: int = 5
    seed: int = 0
    batch_size: int = 8
    restart: bool = False

    @property
    def shown_threshold(self) -> float:
        """The one that figures of a single policy show: the middle one."""
        return self.thresholds[len(self.thresholds) // 2]


@dataclass(frozen=True, slots=True)
class Comparison:
    """What came of it.

    Attributes:
        plan: what was wanted.
        arms: of any task, in the order of tables.
        torch_names: where there are strategies beside the river's: what each arm that they are to
            be held against in speed is called there when the torch engine runs it; its own name
            where that is the engine anyway.
        tasks: the results.
        speed: see `measure_speed`; None if it was not measured.
        reading: see `read_layers`, with `exits` as of `read_exits`.
        contests: see `findings`.
        model: see `describe_model`, of the river that the user named.
        environment: command, machine, versions of the run that gathers it.
        text: what speed and layers were measured on.
        parts: of ``speed``, if it was measured, and ``layers``: when and where, maybe in a run
            before; see `Measurement`.
    """

    plan: Plan
    arms: dict[str, Arm]
    torch_names: dict[str, str]
    tasks: list[TaskResults]
    speed: dict[str, Any] | None
    reading: dict[str, Any]
    contests: list[findings.Contest]
    model: dict[str, Any]
    environment: dict[str, Any]
    text: str
    parts: dict[str, dict[str, Any]]

    @property
    def full_arms(self) -> list[str]:
        """Names of the fully quantised arms."""
        return [name for name, arm in self.arms.items() if arm.kind == "full"]

    def agreement(self, task: TaskResults, arm: str) -> dict[str, Any] | None:
        """An arm beside the backbone on a task with answers."""
        if "accuracy" not in task.summary(arm):
            return None
        return compare_results(task.results[arm], task.results[BACKBONE.name])


def compare(
    plan: Plan,
    models: Models,
    load_attached: Callable[[], AttachedRiver],
    folder: Path,
    read_bandwidth: ReadBandwidth,
    threads: int,
    progress: Progress | None = None,
) -> Comparison:
    """Run what isn't there yet in `folder`, and gather it all.

    Args:
        load_attached: loads the model for PyTorch, which reads keys and values.
        read_bandwidth, threads: see `measure_rounds`.

    Raises:
        ConfigError: a layer is named that the model doesn't have, or the context is too short.
        RiverError: see `run_task`.
    """
    lm = models.of(BACKBONE)
    assert lm.river_config is not None  # the backbone's variant has the river
    planned = planned_arms(lm.river_config.bits, plan.thresholds, plan.exit_layers, plan.strategies)
    for arm in planned:
        arm.policy.thresholds(lm.engine.num_layers)
    settings, room = plan.settings, lm.engine.context_length
    if plan.with_speed and room is not None and plan.speed_tokens + SHORT_CONTEXT > room:
        raise ConfigError(
            f"--speed-tokens is {plan.speed_tokens}; the model's context has room for "
            f"{room - SHORT_CONTEXT}"
        )
    token_ids, text = _token_ids(plan, models)
    wanted = [(task, _settings_for(task, settings)) for task in plan.tasks]
    if settings.text is not None:
        wanted.append(("kld", replace(settings, limit=plan.windows)))
    tasks = [
        run_task(
            models,
            task,
            planned,
            own,
            folder / "results",
            seed=plan.seed,
            with_random=plan.with_random,
            batch_size=plan.batch_size,
            restart=plan.restart,
            progress=progress,
        )
        for task, own in wanted
    ]
    arms = _all_arms(tasks, plan.seed)
    twins = _on_torch(arms, lm.engine.name) if plan.strategies else {}
    timed = {**arms, **{twin.name: twin for twin in twins.values()}} if plan.with_speed else arms
    described = {
        arm.variant: model_identity(models.of(arm), settings.model) for arm in timed.values()
    }
    speed = None
    if plan.with_speed:
        speed = measurement(
            folder / "measurements" / "speed.json",
            {
                "models": [described[variant] for variant in described],
                "settings": [models.of(arm).engine.setting for arm in timed.values()],
                "arms": {name: arm.policy.to_dict() for name, arm in timed.items()},
                "text": tokens_digest(token_ids),
                "tokens": plan.speed_tokens,
                "rounds": plan.rounds,
                "threads": threads,
                "processor": processor_name(),
            },
            lambda: measure_speed(
                models,
                list(timed.values()),
                token_ids,
                tokens=plan.speed_tokens,
                rounds=plan.rounds,
                threads=threads,
                read_bandwidth=read_bandwidth,
                progress=progress,
            ),
            plan.restart,
        )
    window = settings.window if room is None else min(settings.window, room)
    windows = windows_of(token_ids, window, plan.windows)
    policies = {name: arm.policy for name, arm in arms.items() if arm.kind == "similarity"}

    def read() -> dict[str, Any]:
        if progress:
            progress("reading the layers", 0, 1)
        engine = lm.engine
        exits = read_exits(engine, policies, windows)
        if twins:  # loaded for the strategies' sake, if it isn't the same
            engine = models.of(twins[BACKBONE.name]).engine
        attached = engine.attached if isinstance(engine, TorchEngine) else load_attached()
        return {**read_layers(attached, windows), "exits": exits}

    reading = measurement(
        folder / "measurements" / "layers.json",
        {
            "model": described[BACKBONE.variant],
            "policies": {name: policy.to_dict() for name, policy in policies.items()},
            "text": tokens_digest([token for window in windows for token in window]),
            "windows": len(windows),
        },
        read,
        plan.restart,
    )
    full_arms = [name for name, arm in arms.items() if arm.kind == "full"]
    return Comparison(
        plan,
        arms,
        {name: twin.name for name, twin in twins.items()},
        tasks,
        speed.values if speed else None,
        reading.values,
        findings.contests(tasks, full_arms),
        described[BACKBONE.variant],
        describe_environment(),
        text,
        {"layers": reading.part} | ({"speed": speed.part} if speed else {}),
    )


def _settings_for(task: str, settings: TaskSettings) -> TaskSettings:
    """Without those that are for tasks with generated answers, where it has none."""
    generates = isinstance(TASKS[task], GenerationTask)
    return settings if generates else replace(settings, max_new_tokens=None)


def _token_ids(plan: Plan, models: Models) -> tuple[list[int], str]:
    """What speed and layers are measured on, and its name."""
    lm, path = models.of(BACKBONE), plan.settings.text
    words, name = PROSE, "the benchmark's own prose"
    if path is not None:
        words, name = read_text(path), path.name
    most = max(plan.windows * plan.settings.window, 2 * plan.speed_tokens)
    token_ids = list(lm.tokenizer(words, add_special_tokens=False).input_ids)[:most]
    if len(token_ids) < 2:
        raise ConfigError(f"{name} has fewer than two tokens; give a longer text")
    return token_ids, name


def _all_arms(tasks: Sequence[TaskResults], seed: int) -> dict[str, Arm]:
    """Of all tasks, in the order of tables; random ones draw from the depths of all tasks."""
    arms = {name: arm for task in tasks for name, arm in task.arms.items()}
    for name, arm in list(arms.items()):
        if arm.kind == "similarity":
            depths: Counter[int] = Counter()
            for task in tasks:
                depths.update(decided_depths(task.results[name]))
            random = random_like(arm, depths, seed)
            if random.name in arms:
                arms[random.name] = random
    in_order = sorted(
        arms.values(),
        key=lambda arm: (_KIND_ORDER.index(arm.kind), arm.policy.exit_layer or 0),
    )
    return {arm.name: arm for arm in in_order}


def _on_torch(arms: Mapping[str, Arm], engine: str) -> dict[str, Arm]:
    """The arms that strategies beside the river's are held against in speed, as the torch engine
    runs them: those without exit, of one depth and of the similarity rule, with the river that the
    user named."""
    held = {
        name: arm
        for name, arm in arms.items()
        if arm.kind not in ("random", "strategy") and arm.variant.bits is None
    }
    return held if engine == "torch" else {name: on_torch(arm) for name, arm in held.items()}

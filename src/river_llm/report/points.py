"""The arms in the plane of speed and quality.

The strategies that the river is compared with run on the torch engine alone, so they stand in a
plane of their own, beside backbone and river as that engine runs them.
"""

from __future__ import annotations

from collections.abc import Mapping

from river_llm.report import figures
from river_llm.report.compare import Comparison
from river_llm.report.findings import (
    Measure,
    Point,
    mean_accuracy,
    mean_accuracy_errors,
    quality,
    quality_error,
)
from river_llm.report.quality import TaskResults

ON_TORCH = " on the torch engine"


def speed_names(comparison: Comparison, with_strategies: bool) -> dict[str, str]:
    """The arms of one plane, and under what name each was timed.

    Args:
        with_strategies: the plane of the torch engine; else that of the engine that the user named,
            with all arms but the strategies.
    """
    strategies = {name: name for name, arm in comparison.arms.items() if arm.kind == "strategy"}
    if with_strategies:
        return {**comparison.torch_names, **strategies}
    return {name: name for name in comparison.arms if name not in strategies}


def quality_points(
    comparison: Comparison, with_strategies: bool = False
) -> list[tuple[Measure, list[Point]]]:
    """Mean accuracy over the tasks, and divergence, of every arm that has them, against speed;
    nothing for a plane of strategies where there are none."""
    if with_strategies and not comparison.plan.strategies:
        return []
    speeds = _speeds(comparison)
    found: list[tuple[Measure, list[Point]]] = []
    accuracies = mean_accuracy(comparison.tasks)
    if accuracies:
        errors = mean_accuracy_errors(comparison.tasks)
        found.append(("accuracy", _points(comparison, speeds, accuracies, with_strategies, errors)))
    found += [
        (
            "kld",
            _points(
                comparison,
                speeds,
                _task_quality(task),
                with_strategies,
                {arm: quality_error(task.summary(arm)) for arm in task.arms},
            ),
        )
        for task in comparison.tasks
        if task.task == "kld"
    ]
    return found


def panels(
    comparison: Comparison, with_strategies: bool = False
) -> tuple[list[figures.Panel], str]:
    """One for each task, before them their mean; and what the axis of speed shows.

    Without speed it shows the layers that are spared, which say nothing of strategies: recomputed
    layers and propagated projections aren't among them.
    """
    assert comparison.speed is not None or not with_strategies
    answered = [task for task in comparison.tasks if task.task != "kld"]
    found = []
    if comparison.speed is not None:
        speeds = _speeds(comparison)
        label = "tokens per second, decoding" + (ON_TORCH if with_strategies else "")
        if len(answered) > 1:
            accuracies = mean_accuracy(comparison.tasks)
            points = _points(comparison, speeds, accuracies, with_strategies)
            found.append(figures.Panel(f"mean of {len(answered)} tasks", "accuracy", points))
    else:
        label = "backbone layers spared a token (no speed was measured)"
    for task in comparison.tasks:
        if comparison.speed is None:
            speeds = {
                arm: task.summary(arm)["num_layers"] - task.summary(arm)["mean_exit_layer"]
                for arm in task.arms
            }
        points = _points(comparison, speeds, _task_quality(task), with_strategies)
        is_kld = task.task == "kld"
        title = f"divergence on {comparison.text}" if is_kld else task.task
        found.append(figures.Panel(title, "minus mean KLD" if is_kld else "accuracy", points))
    return found, label


def _speeds(comparison: Comparison) -> dict[str, float]:
    assert comparison.speed is not None
    arms = comparison.speed["arms"]
    return {name: found["tokens_per_second"]["median"] for name, found in arms.items()}


def _task_quality(task: TaskResults) -> dict[str, float]:
    found = {arm: quality(task.summary(arm)) for arm in task.arms}
    return {arm: value for arm, value in found.items() if value is not None}


def _points(
    comparison: Comparison,
    speeds: dict[str, float],
    qualities: dict[str, float],
    with_strategies: bool,
    errors: Mapping[str, float | None] | None = None,
) -> list[Point]:
    points = []
    for name, timed in speed_names(comparison, with_strategies).items():
        if name in qualities and timed in speeds:
            arm = comparison.arms[name]
            kind = arm.variant.strategy if arm.kind == "strategy" else arm.kind
            error = (errors or {}).get(name)
            points.append(Point(timed, kind, speeds[timed], qualities[name], error))
    return points

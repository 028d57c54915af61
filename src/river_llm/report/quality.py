"""Every arm on one task, and the arms that take their depth from a similarity arm's result."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from river_llm.evaluation.harness import evaluate
from river_llm.evaluation.requests import TaskSettings, make_run
from river_llm.evaluation.result_file import Result, read_result
from river_llm.evaluation.run import describe_model
from river_llm.report.arms import Arm, decided_depths, fixed_like, random_like
from river_llm.report.models import Models, Progress


@dataclass(slots=True)
class TaskResults:
    """What the arms did on one task.

    Attributes:
        task: its name.
        arms: that ran, by name, in order.
        results: of each arm.
        same_depth: for each similarity arm, the fixed arm at the whole number nearest to its mean
            depth here.
        same_mean: for each similarity arm, the arm that draws from its depths here.
        notes: what a reader should know.
    """

    task: str
    arms: dict[str, Arm] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    same_depth: dict[str, str] = field(default_factory=dict)
    same_mean: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def summary(self, arm: str) -> dict[str, Any]:
        """The summary of an arm's result, which is whole."""
        return dict(self.results[arm].summary or {})


def run_task(
    models: Models,
    task: str,
    arms: Sequence[Arm],
    settings: TaskSettings,
    folder: Path,
    *,
    seed: int = 0,
    with_fixed: bool = True,
    with_random: bool = True,
    batch_size: int = 8,
    restart: bool = False,
    progress: Progress | None = None,
) -> TaskResults:
    """Run all arms on a task, or go on where that was cut short.

    Args:
        arms: those that are known beforehand.
        folder: of the result files.
        seed: of random routing.
        with_fixed: let an arm of fixed depth follow each similarity arm.
        with_random: let an arm of random routing follow each similarity arm.
        restart: begin every result file anew.

    Raises:
        RiverError: see `make_run` and `evaluate`.
    """
    found = TaskResults(task)

    def run_arm(arm: Arm) -> None:
        if arm.name in found.results:
            return
        path = folder / f"{task}.{arm.name}.jsonl"

        def steps_done(done: int, total: int) -> None:
            if progress:
                progress(f"{task}, {arm.name}", done, total)

        described = describe_model(models.of(arm), settings.model)
        with models.running(arm) as lm:
            run = make_run(lm, task, settings)
            # that of random routing only drives the engine that computes
            run.identity |= {name: described[name] for name in ("weights", "engine_setting")}
            result = evaluate(
                run,
                path,
                batch_size=1 if arm.kind == "random" else batch_size,
                restart=restart or (arm.kind == "random" and _draws_otherwise(path, arm)),
                settings={"engine_setting": lm.engine.setting},
                progress=steps_done,
            )
        found.arms[arm.name] = arm
        found.results[arm.name] = result
        found.notes += [note for note in run.notes if note not in found.notes]

    for arm in arms:
        run_arm(arm)
    for arm in [arm for arm in arms if arm.kind == "similarity"]:
        depths = decided_depths(found.results[arm.name])
        if with_fixed:
            fixed = fixed_like(depths)
            run_arm(fixed)
            found.same_depth[arm.name] = fixed.name
        if with_random:
            random = random_like(arm, depths, seed)
            run_arm(random)
            found.same_mean[arm.name] = random.name
    return found


def _draws_otherwise(path: Path, arm: Arm) -> bool:
    """Whether a result was drawn from other depths, as those of fewer items, and is of no use."""
    return (
        path.exists()
        and read_result(path).run["policy"].get("depths") != (arm.policy.to_dict()["depths"])
    )

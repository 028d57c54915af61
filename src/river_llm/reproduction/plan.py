"""What a reproduction runs: the paper's tasks and arms, as the user narrows them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from river_llm.evaluation.requests import TaskSettings
from river_llm.evaluation.tasks import TASKS
from river_llm.evaluation.tasks.task import GenerationTask
from river_llm.exit_policy import ExitPolicy, PrefillRule
from river_llm.report.arms import BACKBONE, Arm, full
from river_llm.reproduction.paper import BITS, PaperModel, PaperTask


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What to run.

    Attributes:
        reference: whose figures stand beside ours; None: nobody's.
        is_reference: whether the model is said to be that one.
        tasks: as the paper asks them, those that can run.
        left_out: why the others can't, by name.
        settings: of all tasks, but for their shots.
        thresholds: one River arm each.
        prefill: how the prompts of River's arms run.
        with_speed: measure it.
        speed_tokens: that each pass decodes.
        rounds: that count, of speed and of measured memory.
        measures_memory: by the system's account, beside the arithmetic.
        batch_size: items that run together.
        restart: begin everything anew.
    """

    reference: PaperModel | None
    is_reference: bool
    tasks: Sequence[PaperTask]
    left_out: Mapping[str, str]
    settings: TaskSettings
    thresholds: Sequence[float]
    prefill: PrefillRule = "sequence"
    with_speed: bool = True
    speed_tokens: int = 256
    rounds: int = 5
    measures_memory: bool = False
    batch_size: int = 8
    restart: bool = False

    @property
    def arms(self) -> list[Arm]:
        """Backbone, full quantisation, River."""
        river = [
            Arm(
                f"river-{threshold:g}",
                "similarity",
                ExitPolicy.similarity(threshold, prefill=self.prefill),
            )
            for threshold in self.thresholds
        ]
        return [BACKBONE, full(BITS), *river]

    @property
    def river_arms(self) -> list[Arm]:
        """Those with a threshold."""
        return [arm for arm in self.arms if arm.kind == "similarity"]


def is_generated(task: PaperTask) -> bool:
    """Whether its answers are generated, so that decoding has a speed."""
    return isinstance(TASKS[task.name], GenerationTask)


def settings_for(task: PaperTask, settings: TaskSettings) -> TaskSettings:
    """The paper's shots, as a text to go on from."""
    if is_generated(task):
        return replace(settings, shots=task.shots, chat=False)
    return replace(settings, shots=task.shots, chat=None, max_new_tokens=None)

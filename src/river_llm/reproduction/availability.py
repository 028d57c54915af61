"""Which of the paper's tasks can run here, seen before a model is loaded."""

from __future__ import annotations

from pathlib import Path

from river_llm.errors import ConfigError, RiverError
from river_llm.evaluation.code_execution import check_confinement
from river_llm.evaluation.data import data_directory, read_records
from river_llm.evaluation.run import read_examples
from river_llm.evaluation.tasks import TASKS
from river_llm.evaluation.tasks.task import GenerationTask
from river_llm.reproduction.paper import PaperTask


def runnable(
    tasks: list[PaperTask], data_dir: Path | None, allow_code_execution: bool, are_named: bool
) -> tuple[list[PaperTask], dict[str, str]]:
    """The tasks that can run, and why the others can't.

    Args:
        data_dir, allow_code_execution: see `TaskSettings`.
        are_named: the user named the tasks: then one that can't run is an error, but for one that
            runs programs and may not.

    Raises:
        RiverError: none can, or one that was named can't.
    """
    directory = data_directory(data_dir)
    can = []
    left_out: dict[str, str] = {}
    first: RiverError | None = None
    for task in tasks:
        error = _why_not(task, directory, allow_code_execution)
        if error is None:
            can.append(task)
            continue
        if are_named and not isinstance(error, _NotAllowedError):
            raise error
        first = first or error
        left_out[task.name] = str(error).removeprefix(f"{task.name}: ")
    if not can and first is not None:
        raise first
    return can, left_out


class _NotAllowedError(ConfigError):
    """The task runs programs, and that wasn't allowed."""


def _why_not(
    task: PaperTask, directory: Path | None, allow_code_execution: bool
) -> RiverError | None:
    """Why a task can't run; None: it can."""
    ours = TASKS[task.name]
    assert ours is not None
    try:
        if isinstance(ours, GenerationTask) and ours.runs_code:
            if not allow_code_execution:
                return _NotAllowedError(
                    f"{task.name}: it runs programs that the model wrote; --allow-code-execution "
                    "lets it, confined"
                )
            check_confinement()
        read_records(ours.source, directory)
        read_examples(ours.examples, directory, task.shots)
        if isinstance(ours, GenerationTask):
            ours.make_scorer()
    except RiverError as error:
        return type(error)(f"{task.name}: {error}")
    return None

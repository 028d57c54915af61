"""Which run a task's name and settings come to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from river_llm.errors import ConfigError, MissingExtraError
from river_llm.evaluation.choice_run import ChoiceRun
from river_llm.evaluation.data import data_directory
from river_llm.evaluation.generation_run import GenerationRun
from river_llm.evaluation.run import Run
from river_llm.evaluation.tasks import TASKS
from river_llm.evaluation.tasks.task import ChoiceTask
from river_llm.evaluation.text_run import TextRun
from river_llm.river_lm import RiverLM


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSettings:
    """How tasks are run; None for a task's own default.

    Attributes:
        model: its name, for the result files.
        limit: items, or windows of a text, at most.
        shots: solved examples in the prompt.
        chat: ask through the chat template.
        max_new_tokens: of a generated answer.
        text: of perplexity and kld.
        window: tokens of a window of it.
        data_dir: where the items are; None: `$RIVER_LLM_DATA`, else the Hub.
        allow_code_execution: let a task run the model's programs.
    """

    model: str
    limit: int | None = None
    shots: int | None = None
    chat: bool | None = None
    max_new_tokens: int | None = None
    text: Path | None = None
    window: int = 512
    data_dir: Path | None = None
    allow_code_execution: bool = False


def make_run(lm: RiverLM, name: str, settings: TaskSettings) -> Run:
    """The run of the task of that name.

    Raises:
        ConfigError, MissingExtraError: a setting doesn't go with the task, or a package is missing;
            the message names the task.
        RiverError: see the runs.
    """
    try:
        return _make_run(lm, name, settings)
    except ConfigError as error:
        raise ConfigError(f"{name}: {error}") from error
    except MissingExtraError as error:
        raise MissingExtraError(f"{name}: {error}") from error


def _make_run(lm: RiverLM, name: str, settings: TaskSettings) -> Run:
    task = TASKS[name]
    if task is None:
        if settings.text is None:
            raise ConfigError("this task needs a text")
        return TextRun(
            lm,
            settings.text,
            model_name=settings.model,
            with_backbone=name == "kld",
            window=settings.window,
            limit=settings.limit,
        )
    shared: dict[str, Any] = {
        "model_name": settings.model,
        "directory": data_directory(settings.data_dir),
        "shots": settings.shots,
        "limit": settings.limit,
    }
    if isinstance(task, ChoiceTask):
        if settings.chat is not None or settings.max_new_tokens is not None:
            raise ConfigError("--chat and --max-new-tokens are for generated answers")
        return ChoiceRun(lm, task, **shared)
    return GenerationRun(
        lm,
        task,
        **shared,
        chat=settings.chat,
        new_tokens=settings.max_new_tokens,
        allow_code_execution=settings.allow_code_execution,
    )

"""The tasks by name."""

from __future__ import annotations

import difflib

from river_llm.errors import ConfigError
from river_llm.evaluation.tasks.choice import CHOICE_TASKS
from river_llm.evaluation.tasks.generation import GENERATION_TASKS
from river_llm.evaluation.tasks.task import ChoiceTask, GenerationTask

TEXT_TASKS = ("perplexity", "kld")
TASKS: dict[str, GenerationTask | ChoiceTask | None] = {
    **{task.name: task for task in GENERATION_TASKS},
    **{task.name: task for task in CHOICE_TASKS},
    **dict.fromkeys(TEXT_TASKS),
}


def check_task(name: str) -> None:
    """See that there is a task of that name.

    Raises:
        ConfigError: there is none; the message has the nearest names, or all of them.
    """
    if name in TASKS:
        return
    near = difflib.get_close_matches(name.lower().replace("-", "_"), TASKS)
    names = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(TASKS)}"
    raise ConfigError(f"there is no task {name!r}; {names}")

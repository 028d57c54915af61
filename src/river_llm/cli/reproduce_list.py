"""`river-llm reproduce --list`: what the paper reports, as far as it is known."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from river_llm.cli.streams import print_json
from river_llm.reproduction.paper import BITS, SOURCE, TASKS, UNKNOWN, Figures, PaperModel

_FULL = f"full-{BITS}bit"  # as `report.arms` names it, whose imports take seconds
_ARMS = {"backbone": "backbone", "full": _FULL, "river": "River", "awq": "River, AWQ"}


def list_paper(models: Sequence[PaperModel], with_tasks: bool, json_output: bool) -> None:
    """Print models with thresholds and figures, and tasks, for people or as JSON."""
    if json_output:
        listed: dict[str, Any] = {"source": SOURCE}
        if with_tasks:
            listed["tasks"] = [asdict(task) for task in TASKS]
        listed["models"] = [asdict(model) for model in models]
        print_json(listed)
        return
    from river_llm.cli.render import stdout

    stdout.print(SOURCE)
    if with_tasks:
        stdout.print()
    for task in TASKS if with_tasks else ():
        stdout.print(f"{task.name}: {task.title}, {task.shots}-shot")
    for model in models:
        taus = " and ".join(f"{tau:g}" for tau in model.thresholds)
        stdout.print(
            f"\n{model.name}: {model.hub}, {model.num_layers} layers of width "
            f"{model.hidden_size}, thresholds {taus}"
        )
        _print_figures(model)
        if model.memory is not None:
            memory = model.memory
            stdout.print(
                f"  memory at 64K tokens, GB: backbone {memory.backbone}, "
                f"{_FULL} {memory.full}, River with offloading {memory.offloaded}"
            )
    stdout.print("\nAll other figures are unknown.")


def _print_figures(model: PaperModel) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=True, padding=(0, 1, 0, 1))
    table.add_column("task")
    table.add_column("arm")
    for heading in ("accuracy %", "tokens/s", "times backbone"):
        table.add_column(heading, justify="right")
    for task, figures in model.figures.items():
        for field, arm in _ARMS.items():
            found: Figures = getattr(figures, field)
            if found != Figures():
                table.add_row(*map(Text, (task, arm, *_cells(found))))
    Console(width=100, highlight=False, markup=False).print(table)


def _cells(figures: Figures) -> list[str]:
    values = (
        (figures.accuracy, ".1f"),
        (figures.tokens_per_second, ".1f"),
        (figures.speed_up, ".2f"),
    )
    return [UNKNOWN if value is None else f"{value:{form}}" for value, form in values]

"""`river-llm reproduce --list`: what the paper reports, as far as it is known."""

from __future__ import annotations

import json
from dataclasses import asdict

from river_llm.reproduction.paper import MODELS, SOURCE, TASKS, UNKNOWN, Figures, PaperModel

_ARMS = {"backbone": "backbone", "full": "full 4-bit", "river": "River", "awq": "River, AWQ"}


def list_paper(json_output: bool) -> None:
    """Print models, tasks, thresholds and figures, for people or as JSON."""
    if json_output:
        models = [asdict(model) for model in MODELS]
        tasks = [asdict(task) for task in TASKS]
        print(json.dumps({"source": SOURCE, "tasks": tasks, "models": models}, ensure_ascii=False))
        return
    from river_llm.cli.render import stdout

    stdout.print(f"{SOURCE}\n")
    for task in TASKS:
        stdout.print(f"{task.name}: {task.title}, {task.shots}-shot")
    for model in MODELS:
        taus = " and ".join(f"{tau:g}" for tau in model.thresholds)
        stdout.print(
            f"\n{model.name}: {model.hub}, {model.num_layers} layers of width "
            f"{model.hidden_size}, thresholds {taus}"
        )
        _print_figures(model)
        if model.memory is not None:
            memory = model.memory
            stdout.print(
                f"  memory at 64K tokens, GB: backbone {memory.backbone}, full 4-bit "
                f"{memory.full}, River with offloading {memory.offloaded}"
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

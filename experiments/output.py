"""What every script leaves behind: a JSON file that says how it was made, a table, a figure."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from river_llm.measure.environment import describe_run
from river_llm.measure.plots import save_figure

PACKAGES = ("river-llm", "torch", "transformers", "lm-eval")


def describe() -> dict[str, Any]:
    """This run and this machine, as plain JSON values."""
    return {**describe_run(PACKAGES), "command": command()}


def command() -> str:
    """As it was typed."""
    program = Path(sys.argv[0])
    return shlex.join(["python", f"{program.parent.name}/{program.name}", *sys.argv[1:]])


def write_json(path: Path, values: dict[str, Any]) -> None:
    """Write it whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")
    unfinished.replace(path)


def write_figure(path: Path, figure: Figure) -> None:
    """With the command below it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_figure(figure, command(), path)


def print_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """The first column to the left, figures to the right."""
    table = Table(*headings, box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, 140)  # no figure is cut off
    console.print(table)

"""What a command is given that is wrong: one line on stderr, exit code 2."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import typer

from river_llm.errors import DataError
from river_llm.text.utf8 import read_text


def usage_error(message: str) -> typer.Exit:
    """Wrong usage, said on stderr."""
    print(f"river-llm: {message}", file=sys.stderr)
    return typer.Exit(2)


def refuse_idle(context: typer.Context, reason: str, idle: set[str]) -> None:
    """Validate that none of these options is on the command line, where they would say nothing.

    Raises:
        typer.Exit: some are.
    """
    given = [
        option.opts[0]
        for option in context.command.params
        if option.opts[0] in idle
        and (source := context.get_parameter_source(option.name or ""))
        and source.name == "COMMANDLINE"
    ]
    if given:
        raise usage_error(f"{reason}; leave {', '.join(sorted(given))} out")


def is_text(text: str) -> bool:
    """Whether a string can be encoded: bytes that are no UTF-8 come in as lone surrogates."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def check_text(name: str, text: str) -> None:
    """Validate that an argument is UTF-8 text.

    Raises:
        typer.Exit: it is not.
    """
    if not is_text(text):
        raise usage_error(f"{name} is no UTF-8 text; convert it first")


def read_given(path: Path) -> str:
    """The text of a file that an option names.

    Raises:
        typer.Exit: it can't be read, or is no text.
    """
    try:
        return read_text(path)
    except DataError as error:
        raise usage_error(str(error)) from error


def check_plot(plot: Path | None) -> None:
    """Validate that a figure can be drawn there, where one is asked for.

    Raises:
        typer.Exit: it can't.
    """
    if plot is None:
        return
    from river_llm.measure.plots import PLOT_SUFFIXES

    if plot.suffix.lower() not in PLOT_SUFFIXES:
        raise usage_error(f"--plot writes {', '.join(PLOT_SUFFIXES)}, not {plot.name}")
    if not plot.parent.is_dir():
        raise usage_error(f"--plot: there is no directory {plot.parent}")
    if find_spec("matplotlib") is None:
        raise usage_error("--plot needs matplotlib: pip install 'river-llm[plot]'")

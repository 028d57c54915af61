"""What a command is given that is wrong: one line on stderr, exit code 2."""

from __future__ import annotations

import sys

import typer


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

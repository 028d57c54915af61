"""Lists with commas between, as options take them."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from river_llm.cli.usage import usage_error

Number = TypeVar("Number", int, float)


def listed(given: str) -> list[str]:
    """The words of a list with commas between."""
    return [word.strip() for word in given.split(",") if word.strip()]


def numbers(option: str, given: str, kind: Callable[[str], Number]) -> list[Number]:
    """The numbers of such a list, each once.

    Raises:
        typer.Exit: one is none.
    """
    try:
        return list(dict.fromkeys(kind(word) for word in listed(given)))
    except ValueError as error:
        raise usage_error(f"{option} is {given!r}; give numbers with commas between") from error

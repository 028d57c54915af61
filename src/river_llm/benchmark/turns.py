"""In which order arms that are compared take their turns."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

_Arm = TypeVar("_Arm")


def in_turn(arms: Sequence[_Arm], rounds: int) -> Iterator[Sequence[_Arm]]:
    """The arms of each round, every other one from the last arm to the first: where the machine
    changes during a round, no arm is always the later one."""
    for number in range(rounds):
        yield arms if number % 2 == 0 else arms[::-1]

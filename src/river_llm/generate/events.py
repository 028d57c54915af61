"""What a step of a `Generator` has brought, for those who watch it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from river_llm.generate.request import Request

Origin = Literal["backbone", "river", "ngram"]


@dataclass(frozen=True, slots=True)
class NewToken:
    """A token of an answer, and the text that it makes certain.

    Attributes:
        exit_layer: how many backbone layers ran to produce it.
        origin: what had guessed it before the backbone chose it; ``"backbone"`` if nothing had.
        looked_twice: whether the token before it ran again, through the backbone.
    """

    token: int
    text: str
    exit_layer: int
    origin: Origin
    looked_twice: bool = False


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a step has brought one request.

    Attributes:
        prompt_tokens: tokens of its prompt that ran.
        drafted: tokens that were guessed and verified, up to the answer's end.
        accepted: of these, those that the answer has taken.
    """

    prompt_tokens: int
    drafted: int
    accepted: int
    tokens: list[NewToken]


@dataclass(frozen=True, slots=True)
class StepEvent:
    """A step, its times in seconds of `time.perf_counter`."""

    start: float
    drafted_at: float
    end: float
    outcomes: dict[Request, Outcome]

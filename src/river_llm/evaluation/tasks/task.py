"""What a task is: its items, how a model is asked, how its answers are scored."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from river_llm.evaluation.data import DataSource, Record


@dataclass(frozen=True, slots=True)
class Question:
    """One item of a choice task.

    Attributes:
        contexts: the text before each choice; the same for all of them in most tasks.
        choices: the texts whose likelihoods are compared, a leading blank among them.
        answer: the place of the right one.
        group: a part of the task that it belongs to: a subject, a phenomenon.
        heading: a text before the examples, the same within a group.
    """

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    answer: int
    group: str | None = None
    heading: str = ""


@dataclass(frozen=True, slots=True)
class ChoiceTask:
    """A task that is scored by likelihood.

    Attributes:
        name: what the command line calls it.
        source: its items.
        question: an item's question.
        by_length: whether the answer is the choice of the largest likelihood *per character* of
            the choice (``acc_norm``) or of the largest one (``acc``). Both are told.
        examples: items with their answers, for few-shot prompts; None where it has none.
        shots: how many there are by default.
    """

    name: str
    source: DataSource
    question: Callable[[Record], Question]
    by_length: bool = False
    examples: DataSource | None = None
    shots: int = 0


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a scorer says of an answer.

    Attributes:
        prediction: what the answer comes to, which is compared between arms; None for nothing.
        correct: whether it is right.
        metrics: further verdicts, by name: true or false, or a list of them.
        details: more for the result file.
    """

    prediction: str | None
    correct: bool
    metrics: dict[str, bool | list[bool]] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)


class Scorer(ABC):
    """Scores the answers of one task."""

    @abstractmethod
    def score(self, record: Record, answer: str, is_chat: bool) -> Verdict:
        """Score the answer to an item, given as a chat or as a text that goes on."""

    def cannot_score(self, record: Record) -> str | None:
        """Why an item has to be left out, as where a file that its check needs is missing."""
        return None


@dataclass(frozen=True, slots=True)
class GenerationTask:
    """A task whose answers are generated.

    Attributes:
        name: what the command line calls it.
        source: its items.
        prompt: the text to go on from, without examples.
        request: the user's message of the chat form.
        make_scorer: what scores the answers; may raise MissingExtraError.
        solution: an example's answer, in the text form; None where there are no examples.
        examples: items for few-shot prompts: where they are, or themselves.
        shots: how many there are by default in the text form; none in the chat form.
        stop: strings that end an answer of the text form.
        new_tokens: at most, by default.
        is_chat: whether the chat form is the default.
        runs_code: whether scoring runs programs that the model wrote.
    """

    name: str
    source: DataSource
    prompt: Callable[[Record], str]
    request: Callable[[Record], str]
    make_scorer: Callable[[], Scorer]
    solution: Callable[[Record], str] | None = None
    examples: DataSource | tuple[Record, ...] | None = None
    shots: int = 0
    stop: tuple[str, ...] = ()
    new_tokens: int = 512
    is_chat: bool = False
    runs_code: bool = False

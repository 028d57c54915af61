"""What drafts come from, and what is learnt about each: how likely its tokens are accepted, and
whether they pay.

Gains and costs are counted in tokens: a cost of one is the time in which plain decoding gives one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from river_llm.engines.drafting import margin_class

MOST_DRAFTED = 12  # the tokens of one draft; with the token before them they are a small pass
_MARGIN_PARTS = 10
_MEMORY = 200.0  # trials that a chance remembers; the older half weighs less and less
_DRAFTS = 200  # over which gain and cost of a way to draft are taken
_CREDIT = 0.75  # tokens that drafts may lose before they have brought any
_MOST_CREDIT = 3.0
_LEAST_CREDIT = -8.0  # whatever a draft cost, a while later there is another one
_ALLOWANCE = 0.012  # credit for every token
_OVERDRAWN = 1.5  # times the credit that a draft may cost


class Chances:
    """How often a drafted token was accepted, by the class of tokens that it belongs to."""

    def __init__(self, guesses: Sequence[float], weight: float = 4.0) -> None:
        """`guesses` are each class's chance without trials, and count like `weight` trials."""
        self._guesses = list(guesses)
        self._weight = weight
        self.tried = [0.0] * len(guesses)
        self.accepted = [0.0] * len(guesses)

    def __len__(self) -> int:
        return len(self._guesses)

    def note(self, place: int, is_accepted: bool) -> None:
        """A token of class `place`, all tokens before it accepted, was or was not."""
        self.tried[place] += 1
        self.accepted[place] += is_accepted
        if self.tried[place] > _MEMORY:
            self.tried[place] /= 2
            self.accepted[place] /= 2

    def of(self, place: int) -> float:
        """The chance of a token of this class."""
        accepted = self.accepted[place] + self._weight * self._guesses[place]
        return accepted / (self.tried[place] + self._weight)

    def all(self) -> tuple[float, ...]:
        """The chance of every class."""
        return tuple(self.of(place) for place in range(len(self)))

    def mean(self) -> float:
        """The chance of a token whose class isn't known yet."""
        tried = sum(self.tried) + self._weight
        guessed = self._weight * sum(self._guesses) / len(self)
        return (sum(self.accepted) + guessed) / tried

    def to_dict(self) -> dict[str, list[float]]:
        """The counts, as plain JSON values."""
        return {
            "tried": [round(value, 3) for value in self.tried],
            "accepted": [round(value, 3) for value in self.accepted],
        }

    def restore(self, counts: dict[str, Any]) -> None:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: these are no such counts.
        """
        tried = [number_within(value, 0, 2 * _MEMORY) for value in counts["tried"]]
        accepted = [number_within(value, 0, 2 * _MEMORY) for value in counts["accepted"]]
        if not len(tried) == len(accepted) == len(self) or any(
            a > t for a, t in zip(accepted, tried, strict=True)
        ):
            raise ValueError("these are no counts of accepted drafts")
        self.tried, self.accepted = tried, accepted


class Account:
    """Bounds what drafts may lose, in tokens of each sequence.

    Every token pays a little in, every draft what it has brought beyond its cost, and there are no
    drafts while it is empty. So drafts that keep failing are tried now and then, and cost a share
    of the time that is known beforehand.
    """

    def __init__(self) -> None:
        self.credit = _CREDIT

    @property
    def allows(self) -> bool:
        """Whether to draft now."""
        return self.credit > 0

    def affords(self, each: float) -> int:
        """How many tokens there may be in a draft of which each costs so much; 1 at least."""
        return max(1, int(_OVERDRAWN * self.credit / max(each, 1e-6)))

    def note_tokens(self, count: float) -> None:
        """Each answer has so many tokens more."""
        self.credit = max(self.credit, min(self.credit + _ALLOWANCE * count, _CREDIT))

    def note_draft(self, gain: float) -> None:
        """A draft has brought so many tokens beyond its cost, in each sequence on the mean."""
        self.credit = max(_LEAST_CREDIT, min(self.credit + gain, _MOST_CREDIT))

    def kept(self) -> float:
        """For another run, in which all may be different: no more than that may lose again."""
        return round(min(self.credit, 2 * _CREDIT), 3)

    def restore(self, credit: Any) -> None:
        """Begin with what another run has kept.

        Raises:
            ValueError: it had no such credit.
        """
        self.credit = number_within(credit, _LEAST_CREDIT, _MOST_CREDIT)


class RiverSource:
    """Drafts of the exit layers after `exit_layer` layers of the backbone, made of the first
    `vocabulary` tokens.

    Attributes:
        way: its number among the ways to draft.
        accepted, cost: of a sequence's draft, running means of accepted tokens and of the time for
            drafting and verifying them, in tokens.
    """

    def __init__(self, way: int, exit_layer: int, vocabulary: int) -> None:
        self.way, self.exit_layer, self.vocabulary = way, exit_layer, vocabulary
        middles = [(part + 0.5) / _MARGIN_PARTS for part in range(_MARGIN_PARTS)]
        self.chances = Chances([0.4 + 0.6 * middle for middle in middles])
        self.accepted = self.cost = 0.0
        self.drafts = 0

    @property
    def name(self) -> str:
        """Under which it is kept."""
        return f"exit {self.exit_layer} of {self.vocabulary} tokens"

    @property
    def speed_up(self) -> float:
        """Of rounds with its drafts, over plain decoding."""
        return (1 + self.accepted) / (1 + self.cost)

    def worth(self, speed_up: float) -> float:
        """Tokens that a draft brings beyond what its time is worth in a run of this speed-up."""
        return self.accepted - speed_up * self.cost

    def note_margins(self, margins: Sequence[float], accepted: int) -> None:
        """The first `accepted` of tokens with these margins were accepted, and no more."""
        for place, margin in enumerate(margins[: accepted + 1]):
            self.chances.note(margin_class(margin, _MARGIN_PARTS), place < accepted)

    def note_draft(self, accepted: float, cost: float) -> None:
        """A draft came to so much, on the mean of the sequences that drafted."""
        self.drafts += 1
        share = max(1 / _DRAFTS, 1 / self.drafts)
        self.accepted += share * (accepted - self.accepted)
        self.cost += share * (cost - self.cost)

    def to_dict(self) -> dict[str, Any]:
        """What was learnt, as plain JSON values."""
        return {
            "drafts": self.drafts,
            "mean_accepted": round(self.accepted, 3),
            "mean_cost": round(self.cost, 3),
            **self.chances.to_dict(),
        }

    def restore(self, learnt: dict[str, Any]) -> None:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        self.chances.restore(learnt)
        self.drafts = int(number_within(learnt["drafts"], 0, 1e12))
        self.accepted = number_within(learnt["mean_accepted"], 0, 64)
        self.cost = number_within(learnt["mean_cost"], 0, 1e4)


class NgramSource:
    """Drafts out of the text itself; their tokens are classed by the length of the match."""

    def __init__(self, longest_match: int) -> None:
        self.chances = Chances([min(0.9, 0.15 * length) for length in range(longest_match + 1)], 2)

    def best_length(
        self, match: int, most: int, cost: Callable[[int], float], speed_up: float = 1.0
    ) -> tuple[int, float]:
        """The length at which a draft brings most tokens beyond what its time is worth, and how
        many those are; (0, 0) where it brings none. `cost` is that of so many drafted tokens."""
        best, best_value = 0, 0.0
        chance, tokens = 1.0, 0.0
        for length in range(1, most + 1):
            chance *= self.chances.of(self._place(match, length - 1))
            tokens += chance
            value = tokens - speed_up * cost(length)
            if value > best_value:
                best, best_value = length, value
        return best, best_value

    def note(self, match: int, drafted: int, accepted: int) -> None:
        """The first `accepted` of so many drafted tokens were accepted, and no more."""
        for place in range(min(drafted, accepted + 1)):
            self.chances.note(self._place(match, place), place < accepted)

    def _place(self, match: int, place: int) -> int:
        return min(match + place, len(self.chances) - 1)


def number_within(value: Any, least: float, most: float) -> float:
    """A number out of a file, seen to be one and within its range, which NaN is not.

    Raises:
        TypeError, ValueError: it isn't.
    """
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is no number")
    if not least <= value <= most:
        raise ValueError(f"{value!r} is not in [{least}, {most}]")
    return float(value)

"""How long to draft, learnt from what was accepted and what it cost.

Time is worth R tokens a second, the rate at which the run goes. One more drafted token costs its
own step and one more row in the verification; it brings a token if it and all before it are
accepted. So a draft goes on while

    (chance that all tokens so far are accepted) * (chance of the next) >= R * (seconds it takes)

and a source of drafts is worth using while its drafts bring more tokens than R times the seconds
they take. Chances are counted by a token's margin (`DraftRule`), or by the length of the match for
n-gram drafts; seconds are measured.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from river_llm.engines.drafting import DraftRule, margin_class

MOST_DRAFTED = 12  # the tokens of one draft; with the token before them they are a small pass
_MARGIN_PARTS = 10
_MEMORY = 200.0  # trials that a chance remembers; the older half weighs less and less
_KNOTS = (1, 2, 4, 6, 8, 12, 16, 32, 64)  # rows of a verification, and its time before it is known
_FIRST_SHAPE = (1.0, 1.03, 1.08, 1.15, 1.3, 1.6, 2.0, 3.5, 7.0)
_SLOW = 0.05  # weights of a new value in a running mean
_QUICK = 0.15
_SLOWEST = 0.01
_ROUNDS = 30  # over which the rate is taken
_LONGEST = 1e4  # seconds of a pass or a drafted token
_USUAL = 3  # tokens of a draft, over which the price of a row is taken
_FIRST_CHANCE = 0.6  # ends a draft as long as no time is measured
_SECOND_CHANCE = -0.1  # the value after a pause, which one good draft makes positive
_FIRST_PAUSE, _LONGEST_PAUSE = 16, 64  # rounds without a draft, where drafts don't pay


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
            ValueError: these are no such counts.
        """
        tried = [number_within(value, 0, 2 * _MEMORY) for value in counts["tried"]]
        accepted = [number_within(value, 0, 2 * _MEMORY) for value in counts["accepted"]]
        if not len(tried) == len(accepted) == len(self) or any(
            a > t for a, t in zip(accepted, tried, strict=True)
        ):
            raise ValueError("these are no counts of accepted drafts")
        self.tried, self.accepted = tried, accepted


class Rate:
    """Tokens a second of the last rounds: all their tokens over all their time, in which a quick
    round counts for no more than its time."""

    def __init__(self, before: float = 0.0) -> None:
        """`before` is that of an earlier run; 0 if there was none."""
        self._before = before
        self._tokens = self._seconds = 0.0

    @property
    def value(self) -> float:
        """0 before the first round."""
        return self._tokens / self._seconds if self._seconds else self._before

    def note(self, tokens: int, seconds: float) -> None:
        """A round gave so many tokens."""
        if not self._seconds and self._before:
            self._seconds = _ROUNDS * seconds
            self._tokens = self._before * self._seconds
        kept = 1 - 1 / _ROUNDS
        self._tokens = kept * self._tokens + tokens
        self._seconds = kept * self._seconds + seconds


class PassCost:
    """Seconds of a verification by its rows: a scale, which follows the machine from pass to pass,
    times a shape, which is 1 for one row and is learnt slowly."""

    def __init__(self) -> None:
        self.scale = 0.0  # seconds of one row; 0 before the first pass
        self._shape = list(_FIRST_SHAPE)
        self._seen = [0] * len(_KNOTS)

    def note(self, rows: int, seconds: float) -> None:
        """A pass over so many rows took so long."""
        if not self.scale:
            self.scale = seconds / self._relative(rows)
            return
        seconds = min(seconds, 2 * self.seconds(rows))  # another process may have held it up
        self.scale += _QUICK * (seconds / self._relative(rows) - self.scale)
        low, share = self._between(rows)
        error = seconds / self.scale - self._relative(rows)
        for knot, weight in ((low, 1 - share), (low + 1, share)):
            if knot > 0 and weight > 0:
                self._seen[knot] += 1
                speed = max(_SLOW, 1 / self._seen[knot])
                self._shape[knot] = max(1.0, self._shape[knot] + speed * weight * error)
                self._keep_rising(knot)

    def seconds(self, rows: int) -> float:
        """Of a pass over so many rows."""
        return self.scale * self._relative(rows)

    def more_rows(self, count: int, beside: int = 1) -> float:
        """Seconds that `count` more rows take `beside` others."""
        return self.seconds(beside + count) - self.seconds(beside)

    def to_dict(self) -> dict[str, Any]:
        """What was learnt, as plain JSON values."""
        return {"scale": self.scale, "shape": [round(value, 4) for value in self._shape]}

    def restore(self, learnt: dict[str, Any]) -> None:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        scale = number_within(learnt["scale"], 0, _LONGEST)
        shape = [number_within(value, 1, 1e3) for value in learnt["shape"]]
        if len(shape) != len(_KNOTS) or shape[0] != 1:
            raise ValueError("these are no times of verifications")
        self.scale, self._shape = scale, shape
        self._seen = [round(1 / _SLOW)] * len(_KNOTS)

    def _keep_rising(self, knot: int) -> None:
        """More rows never take less time: what others say gives way to what was just measured."""
        value = self._shape[knot]
        self._shape[:knot] = [min(before, value) for before in self._shape[:knot]]
        self._shape[knot:] = [max(after, value) for after in self._shape[knot:]]

    def _relative(self, rows: int) -> float:
        low, share = self._between(rows)
        high = min(low + 1, len(_KNOTS) - 1)
        return self._shape[low] + share * (self._shape[high] - self._shape[low])

    def _between(self, rows: int) -> tuple[int, float]:
        """The knot below, and how far it is to the next; beyond the last knot the line goes on."""
        low = min(bisect_right(_KNOTS, rows) - 1, len(_KNOTS) - 2)
        return low, (rows - _KNOTS[low]) / (_KNOTS[low + 1] - _KNOTS[low])


class Source:
    """One way to draft: whether it pays, and if not, when to try it again.

    Attributes:
        value: tokens that one of its drafts brings beyond what its time is worth; a running mean
            of the last few, by which it pauses.
        worth: the same over many drafts, by which sources are compared.
    """

    def __init__(self) -> None:
        self.value = self.worth = 0.1
        self._spread = 0.0  # running mean of squared deviations from the value
        self.drafts = 0
        self._pause = _FIRST_PAUSE
        self._waiting = 0

    def is_due(self) -> bool:
        """Whether to draft in this round; to be asked once a round."""
        if self._waiting > 0:
            self._waiting -= 1
            if self._waiting == 0:
                self.value = max(self.value, _SECOND_CHANCE)
            return False
        return True

    def note(self, value: float) -> None:
        """A draft brought so much."""
        self.drafts += 1
        self._spread += _QUICK * ((value - self.value) ** 2 - self._spread)
        self.value += _QUICK * (value - self.value)
        self.worth += max(_SLOWEST, 1 / self.drafts) * (value - self.worth)
        error = math.sqrt(self._spread * _QUICK / (2 - _QUICK))  # of the running mean
        if self.value > 0:
            self._pause = _FIRST_PAUSE
        elif self.value + error < 0:
            self._waiting = self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)


class RiverSource(Source):
    """Drafts of the exit layers after `exit_layer` layers of the backbone."""

    def __init__(self, exit_layer: int) -> None:
        super().__init__()
        self.exit_layer = exit_layer
        middles = [(part + 0.5) / _MARGIN_PARTS for part in range(_MARGIN_PARTS)]
        self.chances = Chances([0.4 + 0.6 * middle for middle in middles])
        self.token_seconds = 0.0  # to draft one, a running mean

    def rule(self, lm_head_bits: int, rate: float, cost: PassCost, beside: int = 1) -> DraftRule:
        """When a draft ends, at `rate` tokens a second, verified beside so many other rows."""
        if rate and self.token_seconds:
            row_seconds = cost.more_rows(_USUAL, beside) / _USUAL
            price = rate * (self.token_seconds + row_seconds)
            least = min(0.999, price / max(self.chances.mean(), 1e-3))
        else:
            least = _FIRST_CHANCE
        return DraftRule(self.exit_layer, lm_head_bits, least, self.chances.all())

    def note_margins(self, margins: Sequence[float], accepted: int) -> None:
        """The first `accepted` of tokens with these margins were accepted, and no more."""
        for place, margin in enumerate(margins[: accepted + 1]):
            self.chances.note(margin_class(margin, _MARGIN_PARTS), place < accepted)

    def note_time(self, tokens: int, seconds: float) -> None:
        """So many tokens took so long to draft."""
        each = seconds / tokens
        if self.token_seconds == 0:
            self.token_seconds = each
        else:  # one that another process held up says nothing
            each = min(each, 2 * self.token_seconds)
            self.token_seconds += _SLOW * (each - self.token_seconds)

    def to_dict(self) -> dict[str, Any]:
        """What was learnt, as plain JSON values."""
        return {
            "value": round(self.value, 3),
            "worth": round(self.worth, 3),
            "drafts": self.drafts,
            "token_seconds": round(self.token_seconds, 7),
            **self.chances.to_dict(),
        }

    def restore(self, learnt: dict[str, Any]) -> None:
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: it is none.
        """
        self.chances.restore(learnt)
        self.token_seconds = number_within(learnt["token_seconds"], 0, _LONGEST)
        self.value = number_within(learnt["value"], -MOST_DRAFTED, MOST_DRAFTED)
        self.worth = number_within(learnt["worth"], -MOST_DRAFTED, MOST_DRAFTED)
        self.drafts = int(number_within(learnt["drafts"], 0, 1e12))


class NgramSource:
    """Drafts out of the text itself; their tokens are classed by the length of the match."""

    def __init__(self, longest_match: int) -> None:
        self.chances = Chances([min(0.9, 0.15 * length) for length in range(longest_match + 1)], 2)

    def best_length(
        self, match: int, most: int, rate: float, cost: PassCost, beside: int = 1
    ) -> tuple[int, float]:
        """The length at which a draft brings most tokens beyond what its time is worth, and how
        many those are; (0, 0) where it brings none."""
        best, best_value = 0, 0.0
        chance, tokens = 1.0, 0.0
        for length in range(1, most + 1):
            chance *= self.chances.of(self._place(match, length - 1))
            tokens += chance
            value = tokens - rate * cost.more_rows(length, beside)
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
    """A number out of a file, seen to be within its range, which NaN is not."""
    if not least <= value <= most:
        raise ValueError(f"{value!r} is not in [{least}, {most}]")
    return float(value)

"""How much may be spent on drafts, by what they have brought and what steps take.

Time is counted in plain steps, those that verify nothing: a draft brings a plain step for every
token of it that is accepted, and costs the drafting and the rows that its verification has more.
"""

from __future__ import annotations

import statistics
from collections import defaultdict, deque
from collections.abc import Hashable

_FIRST_CREDIT = 1.0  # plain steps that drafts may lose before they have brought any
_MOST_CREDIT, _LEAST_CREDIT = 6.0, -3.0
_ALLOWANCE = 0.02  # credit for each token, so that drafts which don't pay are tried now and then
_OVERDRAFT = 1.5  # times the credit that a draft may cost
_KEPT_TIMES = 3
_FIRST_PLAIN_STEPS, _STEPS_BETWEEN_PLAIN = 3, 64


class StepTimes:
    """Medians of the last measured seconds of each kind of work."""

    def __init__(self) -> None:
        self._seconds: dict[Hashable, deque[float]] = defaultdict(lambda: deque(maxlen=_KEPT_TIMES))
        self._drafted: dict[int, int] = defaultdict(int)  # steps since the last plain one

    def note(self, kind: Hashable, seconds: float) -> None:
        """Work of this kind took so long."""
        self._seconds[kind].append(seconds)

    def median(self, kind: Hashable) -> float | None:
        """Seconds of this kind of work; None: it wasn't measured yet."""
        seconds = self._seconds.get(kind)
        return statistics.median(seconds) if seconds else None

    def wants_plain_step(self, rows: int) -> bool:
        """Whether the next step over so many rows had better verify nothing, to be measured."""
        few = len(self._seconds.get(rows, ())) < _FIRST_PLAIN_STEPS
        return few or self._drafted[rows] >= _STEPS_BETWEEN_PLAIN

    def note_step(self, requests: int, rows: int, seconds: float) -> None:
        """A step over the rows of so many requests took so long."""
        self.note(rows, seconds)
        self._drafted[requests] = self._drafted[requests] + 1 if rows > requests else 0


class Budget:
    """Bounds what the drafts of one source may lose, for each of the requests that step together.

    Every token pays a little in, every draft what it has brought beyond its cost, and there are no
    drafts while the credit is used up. So drafts that fail cost a share of the time that is known
    beforehand.
    """

    def __init__(self, token_cost: float) -> None:
        """`token_cost` is a first guess at what a drafted token costs."""
        self.credit = _FIRST_CREDIT
        self._token_cost = token_cost

    def affords(self, most: int) -> int:
        """How many tokens may be drafted."""
        if self.credit <= 0:
            return 0
        return min(most, max(1, int(_OVERDRAFT * self.credit / self._token_cost)))

    def pay_in(self, tokens: float) -> None:
        """The answer has so many tokens more."""
        grown = min(self.credit + _ALLOWANCE * tokens, _FIRST_CREDIT)
        self.credit = max(self.credit, grown)

    def settle(self, drafted: float, accepted: float, cost: float) -> None:
        """So many tokens were drafted and accepted, on the mean of the requests."""
        self.credit = min(max(self.credit + accepted - cost, _LEAST_CREDIT), _MOST_CREDIT)
        self._token_cost = max(0.01, 0.8 * self._token_cost + 0.2 * cost / drafted)

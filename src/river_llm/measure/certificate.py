"""Whether the mean loss of sequences keeps to a budget, by tests that hold at any sample size.

The p-value is that of a bet against the budget (Waudby-Smith and Ramdas 2023, "Estimating means of
bounded random variables by betting"; Bates et al. 2021, "Distribution-Free, Risk-Controlling
Prediction Sets", section 3.1.3), and settings are tested from strict to loose until one fails
(Angelopoulos et al. 2021, "Learn then Test", section 2.3). Sequences have to be independent, and
their losses bounded. A smaller bound makes a sharper test, so **a sequence's loss counts as at most
four times the budget**: what is certified is the mean of losses that are cut there.

The bet adapts to how much losses vary, where Hoeffding's and Bentkus's p-value takes the worst
case: of 128 sequences whose losses vary by 40 %, the bet passes a mean of 0.9 of the budget in six
of ten cases, the other one a mean of 0.7 in one of thirty.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

CUT = 4.0  # times the budget
_BUDGETS = 100.0, 1e-6  # the largest and the smallest that are tried
_FINER = 1.02  # one of them over the next


@dataclass(frozen=True, slots=True)
class Certificate:
    """A test of one setting.

    Attributes:
        budget: of the mean loss.
        confidence: 1 - the largest chance that a setting passes whose mean loss is over the budget.
        sequences: whose losses were looked at.
        bound: where a sequence's loss was cut.
        cut_sequences: whose losses were above it.
        mean_loss: of all sequences, uncut.
        p_value: the largest chance of losses like these where the mean of cut losses is the budget.
    """

    budget: float
    confidence: float
    sequences: int
    bound: float
    cut_sequences: int
    mean_loss: float
    p_value: float

    @property
    def passes(self) -> bool:
        """Whether the budget is kept, with this confidence."""
        return self.p_value <= 1 - self.confidence


def certify(
    losses: Sequence[float], budget: float, confidence: float, largest: float = math.inf
) -> Certificate:
    """Test whether the mean loss keeps to a budget.

    Args:
        losses: of whole sequences, 0 or more, in an order that doesn't depend on them.
        budget: above 0, below `largest`.
        confidence: above 0, below 1.
        largest: that a loss can be.
    """
    bound = min(CUT * budget, largest)
    shares = [min(loss, bound) / bound for loss in losses]
    return Certificate(
        budget,
        confidence,
        len(losses),
        bound,
        sum(loss > bound for loss in losses),
        math.fsum(losses) / len(losses),
        betting_p_value(shares, budget / bound, confidence),
    )


def certify_in_order(
    losses_of_settings: Iterable[Sequence[float]],
    budget: float,
    confidence: float,
    largest: float = math.inf,
) -> Iterator[Certificate]:
    """Fixed-sequence testing: settings in an order that was chosen before these losses were seen,
    up to the first that fails, which comes last. The chance that any of them passes while it is
    over the budget is that of a single test."""
    for losses in losses_of_settings:
        certificate = certify(losses, budget, confidence, largest)
        yield certificate
        if not certificate.passes:
            return


def smallest_budget(losses: Sequence[float], confidence: float) -> Certificate | None:
    """The test at the smallest budget that passes; None if there is none.

    Budgets are tested from large to small, each 2 % below the one before, until one fails.
    Who keeps to one keeps to every larger one, so this is fixed-sequence testing again, and the
    confidence is that of a single test.
    """
    best, budget = None, _BUDGETS[0]
    while budget > _BUDGETS[1]:
        certificate = certify(losses, budget, confidence)
        if not certificate.passes:
            break
        best, budget = certificate, budget / _FINER
    return best


def least_sequences(budget: float, confidence: float, largest: float = math.inf) -> int:
    """How many sequences pass if none of them loses anything."""
    share = budget / min(CUT * budget, largest)
    return next(
        n for n in count(1) if betting_p_value([0.0] * n, share, confidence) <= 1 - confidence
    )


def betting_p_value(values: Sequence[float], expected: float, confidence: float) -> float:
    """The largest chance of numbers like these if their expectation is `expected` or more.

    Somebody who begins with 1 bets before each number that it is below `expected`, at odds that are
    fair if that is the expectation. The chance to ever have w is then at most 1 / w (Ville's
    inequality). The stake is that which pays most at this confidence, by the mean and variance of
    the numbers before.

    Args:
        values: in [0, 1], independent.
        expected: in (0, 1).
    """
    wealth = most = 1.0
    total, squares = 0.5, 0.25  # as if a number had been there before
    growth = -2 * math.log(1 - confidence) / max(1, len(values))
    for place, value in enumerate(values, 1):
        stake = min(math.sqrt(growth * place / squares), 1 / (1 - expected))
        wealth *= 1 - stake * (value - expected)
        most = max(most, wealth)
        total += value
        squares += (value - total / (place + 1)) ** 2
    return 1 / most

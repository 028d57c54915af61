"""How sure an accuracy is, and whether two arms differ on the same items."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

_Z = 1.959964  # the normal distribution's two-sided 95 %


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """The mean with its standard error, that of a sample (n - 1); None for a single value."""
    if not values:
        raise ValueError("there is no mean of nothing")
    mean = math.fsum(values) / len(values)
    if len(values) < 2:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % score interval of a share (Wilson 1927), which holds near 0 and 1 too, where the
    standard error says nothing."""
    if not 0 <= successes <= trials or trials == 0:
        raise ValueError(f"{successes} of {trials}")
    share, z2 = successes / trials, _Z**2
    centre = (share + z2 / (2 * trials)) / (1 + z2 / trials)
    spread = share * (1 - share) / trials + z2 / (4 * trials**2)
    half = _Z * math.sqrt(spread) / (1 + z2 / trials)
    low = 0.0 if successes == 0 else centre - half
    high = 1.0 if successes == trials else centre + half
    return low, high


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p-value of McNemar's exact test: how likely so uneven a split is, if each item
    that one arm alone solves is as likely to be the other's.

    Args:
        only_first, only_second: items that the first arm solves and the second doesn't, and the
            other way round.
    """
    if min(only_first, only_second) < 0:
        raise ValueError(f"{only_first} and {only_second} items")
    discordant = only_first + only_second
    term, tail = 1, 0  # binomial coefficients, exact whole numbers
    for k in range(min(only_first, only_second) + 1):
        tail += term
        term = term * (discordant - k) // (k + 1)
    return min(1.0, 2 * tail / (1 << discordant))


@dataclass(frozen=True, slots=True)
class PairedComparison:
    """Two arms on the same items.

    Attributes:
        items: how many.
        agreement: share of the items that both answer alike, right or wrong, with its standard
            error.
        only_first, only_second: items that only one of them solves.
        accuracy_difference: the first arm's accuracy minus the second's.
        mcnemar_p: the two-sided p-value of McNemar's exact test.
    """

    items: int
    agreement: float
    agreement_error: float | None
    only_first: int
    only_second: int
    accuracy_difference: float
    mcnemar_p: float


def compare_pairs(
    agrees: Sequence[bool], first: Sequence[bool], second: Sequence[bool]
) -> PairedComparison:
    """Compare two arms, item by item.

    Args:
        agrees: whether both give the same answer.
        first, second: whether each is right.
    """
    agreement, error = mean_and_error([float(same) for same in agrees])
    pairs = list(zip(first, second, strict=True))
    only_first = sum(a and not b for a, b in pairs)
    only_second = sum(b and not a for a, b in pairs)
    return PairedComparison(
        items=len(agrees),
        agreement=agreement,
        agreement_error=error,
        only_first=only_first,
        only_second=only_second,
        accuracy_difference=(only_first - only_second) / len(pairs),
        mcnemar_p=mcnemar(only_first, only_second),
    )

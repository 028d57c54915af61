"""The certificate of a budget: how often it is wrong, what it needs, and what it is worth."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from river_llm.measure.certificate import (
    CUT,
    betting_p_value,
    certify,
    certify_in_order,
    least_sequences,
    smallest_budget,
)

BUDGET, RUNS = 0.05, 1000


def losses_of(kind: str, mean: float, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Random losses of this mean, none of them above four times the budget."""
    drawn = np.random.default_rng(seed)
    if kind == "rare":  # all or nothing
        return CUT * BUDGET * (drawn.random(shape) < mean / (CUT * BUDGET))
    if kind == "constant":
        return np.full(shape, mean)
    return CUT * BUDGET * drawn.beta(2, 2 * (CUT * BUDGET / mean - 1), shape)


def allowed(confidence: float) -> float:
    """How often of `RUNS` runs a test may be wrong, four standard errors above its level."""
    level = 1 - confidence
    return level + 4 * math.sqrt(level * confidence / RUNS)


@pytest.mark.parametrize("confidence", [0.8, 0.95])
@pytest.mark.parametrize("count", [12, 60])
@pytest.mark.parametrize("kind", ["rare", "constant", "spread"])
def test_a_loss_that_is_the_budget_passes_as_rarely_as_promised(
    kind: str, count: int, confidence: float
) -> None:
    runs = losses_of(kind, BUDGET * 1.0001, (RUNS, count), seed=0)
    wrong = np.mean([certify(losses, BUDGET, confidence).passes for losses in runs.tolist()])
    assert wrong <= allowed(confidence)


def test_a_loss_below_the_budget_passes_where_its_spread_lets_it() -> None:
    def passes(share: float, count: int) -> float:
        runs = losses_of("spread", share * BUDGET, (200, count), seed=1)
        return float(np.mean([certify(run, BUDGET, 0.95).passes for run in runs.tolist()]))

    assert passes(0.5, 128) == 1
    assert passes(0.8, 512) > 0.8
    assert passes(0.8, 12) < 0.2


def test_settings_in_order_are_as_rarely_wrong_as_one() -> None:
    """All of them are a little over the budget, which is where chance has most to say."""
    wrong = 0
    for run in losses_of("rare", BUDGET * 1.0001, (RUNS, 8, 40), seed=2).tolist():
        wrong += any(one.passes for one in certify_in_order(run, BUDGET, 0.9))
    assert wrong / RUNS <= allowed(0.9)


def test_settings_are_tested_up_to_the_first_that_fails() -> None:
    def settings() -> list[list[float]]:
        yield [0.0] * 40
        yield [0.01] * 40
        yield [0.2] * 40
        raise AssertionError("nobody may look at this one")

    tests = list(certify_in_order(settings(), BUDGET, 0.95))
    assert [one.passes for one in tests] == [True, True, False]
    assert [one.mean_loss for one in tests] == pytest.approx([0, 0.01, 0.2])


def test_a_smallest_budget_is_below_the_true_loss_as_rarely_as_promised() -> None:
    runs = losses_of("spread", BUDGET, (RUNS // 8, 40), seed=3).tolist()
    found = [smallest_budget(losses, 0.8) for losses in runs]
    assert all(one is not None and one.passes for one in found)
    # the cut lowers the true mean at a budget below it, never raises it
    wrong = np.mean([one is not None and one.budget < BUDGET * 0.98 for one in found])
    assert wrong <= 0.2 + 4 * math.sqrt(0.16 / len(runs))
    assert np.mean([one.budget for one in found if one is not None]) < 1.5 * BUDGET


def test_a_smallest_budget_is_near_the_loss_or_there_is_none() -> None:
    found = smallest_budget([0.1] * 200, 0.95)
    assert found is not None
    assert 0.1 < found.budget < 0.12
    nothing_lost = smallest_budget([0.0] * 11, 0.95)
    assert nothing_lost is not None
    assert nothing_lost.budget < 1e-5
    assert smallest_budget([0.0] * 10, 0.95) is None


def test_losses_above_the_bound_are_cut_and_counted() -> None:
    few = certify([0.0] * 98 + [5.0, 7.0], BUDGET, 0.95)
    assert (few.bound, few.cut_sequences) == (CUT * BUDGET, 2)
    assert few.mean_loss == pytest.approx(0.12)  # uncut: above the budget
    assert few.passes
    shares = certify([0.0, 1.0], 0.5, 0.95, largest=1.0)
    assert (shares.bound, shares.cut_sequences) == (1.0, 0)


@pytest.mark.parametrize(("confidence", "least"), [(0.95, 11), (0.99, 17), (0.5, 3)])
def test_so_many_sequences_without_loss_are_needed(confidence: float, least: int) -> None:
    assert least_sequences(BUDGET, confidence) == least
    assert certify([0.0] * least, BUDGET, confidence).passes
    assert not certify([0.0] * (least - 1), BUDGET, confidence).passes
    assert certify([0.0] * (50 * least), BUDGET, confidence).passes


def wealth_by_the_book(values: list[float], expected: float, level: float) -> float:
    """The most that the bet ever has, term by term as the paper writes it."""
    wealth, most = 1.0, 1.0
    for i in range(len(values)):
        before = values[:i]
        means = [(0.5 + sum(before[: j + 1])) / (j + 2) for j in range(i)]
        variance = (0.25 + sum((x - m) ** 2 for x, m in zip(before, means, strict=True))) / (i + 1)
        stake = min(
            math.sqrt(2 * math.log(1 / level) / (len(values) * variance)), 1 / (1 - expected)
        )
        wealth *= 1 - stake * (values[i] - expected)
        most = max(most, wealth)
    return most


@given(
    st.lists(st.floats(0, 1), min_size=1, max_size=30),
    st.floats(0.05, 0.95),
    st.floats(0.5, 0.99),
)
def test_a_p_value_is_that_of_the_paper(
    values: list[float], expected: float, confidence: float
) -> None:
    found = betting_p_value(values, expected, confidence)
    assert 0 < found <= 1
    most = wealth_by_the_book(values, expected, 1 - confidence)
    assert found == pytest.approx(1 / most, rel=1e-9)

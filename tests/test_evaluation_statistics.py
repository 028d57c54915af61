"""Standard errors, intervals and McNemar's test against plain references."""

from __future__ import annotations

import math
from fractions import Fraction
from statistics import mean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st

from river_llm.evaluation.statistics import (
    compare_pairs,
    mcnemar,
    mean_and_error,
    wilson_interval,
)


class TestMeanAndError:
    @given(st.lists(st.booleans(), min_size=2, max_size=50))
    def test_is_that_of_a_sample(self, values: list[bool]) -> None:
        numbers = list(map(float, values))
        found, error = mean_and_error(numbers)
        assert found == pytest.approx(mean(numbers))
        assert error == pytest.approx(stdev(numbers) / math.sqrt(len(numbers)))

    def test_one_value_has_no_error(self) -> None:
        assert mean_and_error([1.0]) == (1.0, None)

    def test_of_nothing_is_refused(self) -> None:
        with pytest.raises(ValueError, match="nothing"):
            mean_and_error([])


class TestWilson:
    @given(st.integers(1, 60), st.data())
    def test_solves_the_score_equation(self, trials: int, data: st.DataObject) -> None:
        successes = data.draw(st.integers(0, trials))
        share = successes / trials
        for bound in wilson_interval(successes, trials):
            # the shares p whose z-score is 1.96: (share - p)^2 = z^2 p (1 - p) / n
            expected = 1.959964**2 * bound * (1 - bound) / trials
            assert (share - bound) ** 2 == pytest.approx(expected, abs=1e-12)

    def test_says_something_where_nothing_was_solved(self) -> None:
        low, high = wilson_interval(0, 100)
        assert low == 0
        assert high == pytest.approx(0.037, abs=1e-3)

    @pytest.mark.parametrize(("successes", "trials"), [(1, 0), (0, 0), (3, 2), (-1, 2)])
    def test_refuses_what_is_no_share(self, successes: int, trials: int) -> None:
        with pytest.raises(ValueError, match="of"):
            wilson_interval(successes, trials)


class TestMcNemar:
    @given(st.integers(0, 12), st.integers(0, 12))
    def test_is_the_exact_binomial_test(self, first: int, second: int) -> None:
        n = first + second
        as_uneven = [k for k in range(n + 1) if abs(2 * k - n) >= abs(first - second)]
        expected = sum(Fraction(math.comb(n, k), 2**n) for k in as_uneven)
        assert mcnemar(first, second) == pytest.approx(float(expected))
        assert mcnemar(first, second) == mcnemar(second, first)

    def test_takes_many_items(self) -> None:
        assert mcnemar(7000, 7000) == 1
        assert 0 < mcnemar(6800, 7200) < 0.001

    def test_refuses_negative_counts(self) -> None:
        with pytest.raises(ValueError, match="-1"):
            mcnemar(-1, 3)


class TestComparePairs:
    def test_counts_items_that_one_arm_alone_solves(self) -> None:
        compared = compare_pairs(
            [True, False, True, False, True],
            [True, True, False, False, True],
            [True, False, False, True, False],
        )
        assert compared.items == 5
        assert compared.agreement == pytest.approx(0.6)
        assert (compared.only_first, compared.only_second) == (2, 1)
        assert compared.accuracy_difference == pytest.approx(0.2)
        assert compared.mcnemar_p == 1

    def test_an_arm_against_itself_agrees_everywhere(self) -> None:
        same = compare_pairs([True] * 3, [True, False, True], [True, False, True])
        assert (same.agreement, same.mcnemar_p, same.accuracy_difference) == (1, 1, 0)

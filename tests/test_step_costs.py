"""What is learnt about the costs of verifications and drafts, from times that are known."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from river_llm.lossless.step_costs import StepCosts

STEP = 0.007  # seconds
SEEN = (3, 4, 6, 9)  # rows that verifications have more than a plain step

counts = st.integers(1, 400)
times = st.floats(0, 1e4)


class Measured:
    """Costs learnt from rounds of a machine on which each row takes a share of a step.

    Attributes:
        drafted: steps of a drafted token of a sequence alone.
    """

    def __init__(self, row: float, seed: int = 0, noise: float = 0.05) -> None:
        self.costs = StepCosts([0.4, 0.5])
        self.row, self.drafted = row, 0.25
        self._random = random.Random(seed)
        self._noise = noise

    def true_rows(self, count: int) -> float:
        return 1 + self.row * (count - 1)

    def rounds(
        self,
        number: int,
        sequences: int = 1,
        plain_each: int = 8,
        drift: float = 0.0,
        more_rows: Sequence[int] = SEEN,
    ) -> None:
        """Every so many rounds a plain one; the step changes from 1 - drift to 1 + drift."""
        for i in range(number):
            step = STEP * (1 + drift * math.sin(i / 40))
            rows = sequences
            if i % plain_each:
                rows += self._random.choice(more_rows)
                together = [sequences] * 3
                draft = sum(self.drafted * self.true_rows(count) for count in together)
                self.costs.note_draft(0, together, self._measured(step * draft))
            seconds = self._measured(step * self.true_rows(rows))
            self.costs.note_verification(rows, seconds)

    def errors(self, sequences: int = 1) -> list[float]:
        """Relative, of a verification beside a plain one, and of a drafted token."""
        plain = self.costs.rows(sequences) / self.true_rows(sequences)
        of_rows = [
            self.costs.rows(sequences + more) / self.true_rows(sequences + more) / plain - 1
            for more in (*SEEN, 7)
        ]
        true_drafted = self.drafted * self.true_rows(sequences)
        return [*of_rows, self.costs.drafted(0, sequences) / true_drafted / plain - 1]

    def _measured(self, seconds: float) -> float:
        return seconds * math.exp(self._random.gauss(0, self._noise))


class TestLearning:
    @pytest.mark.parametrize("sequences", [1, 4, 16])
    @pytest.mark.parametrize("row", [0.01, 0.1, 0.5])
    def test_tells_the_step_from_what_more_rows_take(self, row: float, sequences: int) -> None:
        """Under noise, and while the step changes by 40 %."""
        for seed in range(5):
            measured = Measured(row, seed)
            measured.rounds(300, sequences, drift=0.2)
            assert max(map(abs, measured.errors(sequences))) < 0.07

    def test_needs_some_rounds_only(self) -> None:
        for seed in range(5):
            measured = Measured(0.3, seed)
            measured.rounds(24)
            assert max(map(abs, measured.errors())) < 0.15

    def test_follows_the_step(self) -> None:
        measured = Measured(0.1)
        measured.rounds(100)
        assert measured.costs.seconds == pytest.approx(STEP, rel=0.1)
        for _ in range(40):  # now it is half as long
            measured.costs.note_verification(1, STEP / 2)
        assert measured.costs.seconds == pytest.approx(STEP / 2, rel=0.1)
        assert max(map(abs, measured.errors())) < 0.1

    def test_knows_how_far_it_may_be_wrong(self) -> None:
        measured = Measured(0.1)
        before = measured.costs.uncertainty(5, 1)
        measured.rounds(60)
        assert measured.costs.uncertainty(5, 1) < 0.05 < 0.2 < before
        assert measured.costs.uncertainty(5, 5) == 0
        never_plain = Measured(0.1)
        never_plain.rounds(60, plain_each=1000, more_rows=[4])
        assert never_plain.costs.uncertainty(5, 1) > measured.costs.uncertainty(5, 1)

    def test_of_a_batch_needs_no_step_of_one_row(self) -> None:
        for sequences in (4, 16):
            measured = Measured(0.2)
            measured.rounds(200, sequences)
            assert max(map(abs, measured.errors(sequences))) < 0.07
            assert measured.costs.uncertainty(sequences + 4, sequences) < 0.05
            assert measured.costs.uncertainty(sequences, 1) > 0.15

    def test_is_little_changed_by_a_measurement_that_was_held_up(self) -> None:
        for rows in (1, 5):
            measured = Measured(0.1)
            measured.rounds(100)
            before = [measured.costs.rows(count) for count in (2, 5, 9)]
            measured.costs.note_verification(rows, 100 * STEP)
            measured.costs.note_draft(0, [1, 1], 100 * STEP)
            after = [measured.costs.rows(count) for count in (2, 5, 9)]
            assert after == pytest.approx(before, rel=0.1)
            assert measured.costs.seconds < 8 * STEP
            measured.rounds(50)
            assert max(map(abs, measured.errors())) < 0.07

    @pytest.mark.parametrize("times_as_long", [2, 10])
    def test_recovers_where_the_first_measurement_was_held_up(self, times_as_long: float) -> None:
        measured = Measured(0.1)
        measured.costs.note_verification(1, times_as_long * STEP)
        measured.rounds(100)
        assert max(map(abs, measured.errors())) < 0.15

    def test_of_one_way_to_draft_leaves_the_other_alone(self) -> None:
        measured = Measured(0.1)
        measured.rounds(200)
        assert measured.costs.drafted(0) == pytest.approx(0.25, rel=0.07)
        assert measured.costs.drafted(1) == pytest.approx(0.5, rel=0.1)  # as it was guessed


class TestNumbers:
    def test_of_one_row_are_a_step(self) -> None:
        costs = StepCosts([0.4])
        assert costs.rows(1) == 1
        assert costs.drafted(0) == pytest.approx(0.4)
        costs.note_verification(1, 3.0)
        costs.note_verification(9, 4.0)
        assert costs.rows(1) == 1

    def test_of_more_rows_are_more_before_anything_is_measured(self) -> None:
        costs = StepCosts([0.4])
        rows = [costs.rows(count) for count in range(1, 2000)]
        assert rows == sorted(rows)

    @given(
        notes=st.lists(st.tuples(st.sampled_from(["verify", 0, 1]), counts, times), max_size=60),
        count=st.integers(1, 10_000),
    )
    def test_are_finite_and_positive_whatever_is_measured(
        self, notes: list[tuple[Any, int, float]], count: int
    ) -> None:
        costs = StepCosts([0.4, 0.6])
        for kind, rows, seconds in notes:
            if kind == "verify":
                costs.note_verification(rows, seconds)
            else:
                costs.note_draft(kind, [rows, *[1] * (rows % 5)], seconds)
        values = [costs.rows(count), costs.drafted(0, count), costs.drafted(1), costs.seconds]
        assert all(0 < value < math.inf for value in values)
        assert 0 <= costs.uncertainty(count, 1) < math.inf
        restored = StepCosts([0.4, 0.6])
        restored.restore(costs.to_dict())
        assert restored.rows(count) == pytest.approx(costs.rows(count), rel=1e-3)

    def test_stay_finite_over_a_long_run(self) -> None:
        measured = Measured(0.1)
        measured.rounds(4000, drift=0.2)
        assert max(map(abs, measured.errors())) < 0.07
        assert 0 < measured.costs.uncertainty(200, 1) < 10


class TestRestored:
    def test_are_what_was_learnt(self) -> None:
        measured, restored = Measured(0.3), StepCosts([0.4, 0.5])
        measured.rounds(200)
        restored.restore(measured.costs.to_dict())
        for count in (1, 2, 5, 13, 100, 500):
            assert restored.rows(count) == pytest.approx(measured.costs.rows(count), rel=1e-3)
            drafted = measured.costs.drafted(0, count)
            assert restored.drafted(0, count) == pytest.approx(drafted, rel=1e-3)

    def test_take_another_step_at_once_and_keep_the_rest(self) -> None:
        measured, restored = Measured(0.3), StepCosts([0.4, 0.5])
        measured.rounds(200)
        restored.restore(measured.costs.to_dict())
        rows = restored.rows(5)
        restored.note_verification(1, 20 * STEP)
        assert restored.seconds == pytest.approx(20 * STEP, rel=0.02)
        assert restored.rows(5) == pytest.approx(rows, rel=0.02)

    @pytest.mark.parametrize("name", ["mean", "spread"])
    @pytest.mark.parametrize(
        "damage",
        [math.nan, math.inf, -math.inf, 1e9, 10**400, "x", None, [0.1], {}],
        ids=lambda damage: repr(damage)[:6],
    )
    def test_are_refused_where_they_are_damaged(self, name: str, damage: Any) -> None:
        learnt = StepCosts([0.4, 0.5]).to_dict()
        values: list[Any] = [*learnt[name]]
        values[3] = damage
        for damaged in (values, damage, [*learnt[name], 0.1], learnt[name][:-1], [], "x"):
            with pytest.raises((KeyError, TypeError, ValueError)):
                StepCosts([0.4, 0.5]).restore({**learnt, name: damaged})
        with pytest.raises((KeyError, TypeError, ValueError)):
            StepCosts([0.4, 0.5]).restore({name: learnt[name]})

    def test_of_another_number_of_ways_are_refused(self) -> None:
        with pytest.raises(ValueError, match="no costs"):
            StepCosts([0.4]).restore(StepCosts([0.4, 0.5]).to_dict())

"""What drafts come from, and what is learnt about each."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from river_llm.lossless.ngram_drafts import LONGEST_MATCH, NgramIndex
from river_llm.lossless.sources import (
    MOST_DRAFTED,
    Account,
    Chances,
    NgramSource,
    RiverSource,
    number_within,
)

unit = st.floats(0, 1)


class TestChances:
    @given(
        trials=st.lists(st.tuples(st.integers(0, 2), st.booleans()), max_size=600),
        guesses=st.lists(unit, min_size=3, max_size=3),
    )
    def test_are_chances(self, trials: list[tuple[int, bool]], guesses: list[float]) -> None:
        chances = Chances(guesses)
        assert chances.all() == pytest.approx(guesses)
        for place, is_accepted in trials:
            chances.note(place, is_accepted)
        assert all(0 <= chance <= 1 for chance in chances.all())
        assert 0 <= chances.mean() <= 1
        other = Chances(guesses)
        other.restore(chances.to_dict())
        assert other.all() == pytest.approx(chances.all(), abs=1e-3)

    def test_come_to_what_is_seen_and_then_to_what_is_seen_now(self) -> None:
        chances = Chances([0.5, 0.5])
        pattern = random.Random(0)
        for accepted in (0.9, 0.2):
            for _ in range(1500):
                chances.note(0, pattern.random() < accepted)
            assert chances.of(0) == pytest.approx(accepted, abs=0.1)
        assert chances.of(1) == 0.5

    @pytest.mark.parametrize(
        "counts",
        [
            {"tried": [1.0], "accepted": [0.0]},
            {"tried": [1.0, 1.0], "accepted": [2.0, 0.0]},
            {"tried": [1.0, 1.0], "accepted": [-1.0, 0.0]},
            {"tried": [1e9, 1.0], "accepted": [1.0, 0.0]},
            {"tried": [math.nan, 1.0], "accepted": [0.0, 0.0]},
            {"tried": [1.0, 1.0], "accepted": [math.nan, 0.0]},
        ],
    )
    def test_refuse_what_are_no_counts(self, counts: dict[str, Any]) -> None:
        chances = Chances([0.5, 0.5])
        with pytest.raises(ValueError, match=r"no counts|not in"):
            chances.restore(counts)
        assert chances.all() == (0.5, 0.5)


class TestAccount:
    """In tokens: what drafts have cost more than they brought."""

    @given(
        events=st.lists(st.tuples(st.floats(1, 13), st.floats(0, 1)), max_size=200),
        most=st.floats(0.1, 10),
    )
    def test_bounds_what_is_lost(self, events: list[tuple[float, float]], most: float) -> None:
        """By the first credit, a share of all tokens, and one draft."""
        account = Account()
        bound = account.credit + most
        lost = 0.0
        for tokens, share in events:
            if account.allows:
                account.note_draft(-share * most)
                lost += share * most
            account.note_tokens(tokens)
            bound += tokens * self.allowance()
            assert lost <= bound + 1e-9

    @given(
        events=st.lists(st.tuples(st.floats(1, 13), st.floats(-1, 5)), max_size=200),
        most=st.floats(0.1, 10),
    )
    def test_bounds_what_is_lost_after_gains(
        self, events: list[tuple[float, float]], most: float
    ) -> None:
        """From any time on, however much drafts have brought before."""
        account = Account()
        balance = highest = 0.0  # of gains, and the allowance of the tokens so far
        for tokens, gain in events:
            if account.allows:
                gain = gain if gain > 0 else gain * most
                account.note_draft(gain)
                balance += gain
            highest = max(highest, balance)
            assert highest - balance <= self.most_credit() + most + 1e-9
            account.note_tokens(tokens)
            balance += tokens * self.allowance()

    def test_allows_a_draft_again_after_some_tokens(self) -> None:
        account = Account()
        account.note_draft(-account.credit - 1)
        assert not account.allows
        tokens = 0
        while not account.allows:
            account.note_tokens(1)
            tokens += 1
        assert tokens == pytest.approx(1 / self.allowance(), abs=2)

    def test_of_drafts_that_pay_allows_all(self) -> None:
        account = Account()
        for _ in range(1000):
            account.note_draft(0.1)
            account.note_tokens(2)
            assert account.allows
        assert account.credit == self.most_credit()

    def test_of_tokens_alone_is_no_more_than_at_first(self) -> None:
        account = Account()
        account.note_draft(-1)
        for _ in range(1000):
            account.note_tokens(5)
        assert account.credit == Account().credit
        account.note_draft(1)
        gained = account.credit
        account.note_tokens(1)
        assert account.credit == gained

    def allowance(self) -> float:
        """Of one token."""
        account = Account()
        account.note_draft(-5)
        before = account.credit
        account.note_tokens(1)
        return account.credit - before

    def most_credit(self) -> float:
        account = Account()
        account.note_draft(1e6)
        return account.credit


class TestRiverSource:
    def test_counts_a_token_only_where_those_before_were_accepted(self) -> None:
        source = RiverSource(0, 0, 100)
        source.note_margins([0.95, 0.55, 0.15, 0.05], 2)
        assert sum(source.chances.tried) == 3
        assert sum(source.chances.accepted) == 2
        before = RiverSource(0, 0, 100).chances
        assert source.chances.of(9) > before.of(9)
        assert source.chances.of(5) > before.of(5)
        assert source.chances.of(1) < before.of(1)
        assert source.chances.of(0) == before.of(0)

    def test_expects_more_of_larger_margins_before_anything_is_seen(self) -> None:
        chances = RiverSource(0, 0, 100).chances.all()
        assert list(chances) == sorted(chances)
        assert 0 < chances[0] < chances[-1] < 1

    def test_counts_a_margin_that_is_no_number_as_some_class(self) -> None:
        """A river may overflow where the backbone doesn't."""
        source = RiverSource(0, 0, 100)
        source.note_margins([0.5, math.nan], 1)
        assert sum(source.chances.tried) == 2

    def test_speed_up_is_that_of_its_rounds(self) -> None:
        source = RiverSource(0, 0, 100)
        assert source.speed_up == 1
        for _ in range(20):
            source.note_draft(3, 1)
        assert source.speed_up == pytest.approx(2)
        assert source.worth(1) == pytest.approx(2)
        assert source.worth(2) == pytest.approx(1)

    def test_forgets_drafts_of_long_ago(self) -> None:
        source = RiverSource(0, 0, 100)
        for accepted, cost in ((4, 0.5), (0.2, 1.5)):
            for _ in range(1500):
                source.note_draft(accepted, cost)
            assert source.accepted == pytest.approx(accepted, abs=0.05)
            assert source.cost == pytest.approx(cost, abs=0.05)

    def test_goes_on_from_what_was_kept(self) -> None:
        source, other = RiverSource(1, 2, 100), RiverSource(1, 2, 100)
        for _ in range(30):
            source.note_margins([0.9, 0.4], 1)
            source.note_draft(1.25, 0.5)
        other.restore(source.to_dict())
        assert other.to_dict() == source.to_dict()
        assert other.drafts == 30
        assert other.speed_up == pytest.approx(1.5)

    @pytest.mark.parametrize("name", ["drafts", "mean_accepted", "mean_cost", "tried", "accepted"])
    @pytest.mark.parametrize("damage", [None, "x", -1, math.nan, math.inf, 10**400, [], {}])
    def test_refuses_what_is_none(self, name: str, damage: object) -> None:
        learnt = RiverSource(0, 0, 100).to_dict()
        with pytest.raises((KeyError, TypeError, ValueError)):
            RiverSource(0, 0, 100).restore({**learnt, name: damage})
        del learnt[name]
        with pytest.raises(KeyError):
            RiverSource(0, 0, 100).restore(learnt)


class TestNgramSource:
    def test_drafts_all_where_rows_cost_nothing(self) -> None:
        source = NgramSource(LONGEST_MATCH)
        assert source.best_length(2, MOST_DRAFTED, _rows(0))[0] == MOST_DRAFTED

    def test_drafts_nothing_where_rows_cost_more_than_they_bring(self) -> None:
        source = NgramSource(LONGEST_MATCH)
        assert source.best_length(LONGEST_MATCH, MOST_DRAFTED, _rows(1)) == (0, 0)
        assert source.best_length(LONGEST_MATCH, MOST_DRAFTED, _rows(0.1), 10) == (0, 0)

    @given(
        match=st.integers(2, LONGEST_MATCH),
        most=st.integers(0, 64),
        row=st.floats(0, 1),
        speed_up=st.floats(1, 5),
    )
    def test_drafts_longer_after_a_longer_match(
        self, match: int, most: int, row: float, speed_up: float
    ) -> None:
        source = NgramSource(LONGEST_MATCH)
        length, value = source.best_length(match, most, _rows(row), speed_up)
        assert 0 <= length <= most
        assert (value > 0) == (length > 0)
        longer_length, longer_value = source.best_length(match + 1, most, _rows(row), speed_up)
        assert longer_length >= length
        assert longer_value >= value

    @given(row=st.floats(0, 0.5), speed_ups=st.tuples(st.floats(1, 5), st.floats(1, 5)))
    def test_drafts_shorter_where_time_is_worth_more(
        self, row: float, speed_ups: tuple[float, float]
    ) -> None:
        source = NgramSource(LONGEST_MATCH)
        (long, more), (short, less) = (
            source.best_length(6, MOST_DRAFTED, _rows(row), speed_up)
            for speed_up in sorted(speed_ups)
        )
        assert long >= short
        assert more >= less

    def test_drafts_less_after_drafts_that_failed(self) -> None:
        source = NgramSource(LONGEST_MATCH)
        before = source.best_length(3, MOST_DRAFTED, _rows(0.1))
        for _ in range(50):
            source.note(3, 4, 0)
        after = source.best_length(3, MOST_DRAFTED, _rows(0.1))
        assert after[0] <= before[0]
        assert after[1] < before[1]
        assert source.chances.of(4) == NgramSource(LONGEST_MATCH).chances.of(4)

    def test_learns_of_tokens_up_to_the_first_that_failed(self) -> None:
        source = NgramSource(LONGEST_MATCH)
        source.note(3, 6, 2)
        assert source.chances.tried[3:7] == [1, 1, 1, 0]
        assert source.chances.accepted[3:7] == [1, 1, 0, 0]
        source.note(LONGEST_MATCH, 6, 6)  # no match is longer
        assert source.chances.tried[LONGEST_MATCH] == 6


class TestNgramIndex:
    @given(
        pieces=st.lists(st.lists(st.integers(0, 2), max_size=12), min_size=1, max_size=6),
        most=st.integers(0, 20),
    )
    @settings(max_examples=200)
    def test_continues_as_the_text_did_where_its_end_stood_last(
        self, pieces: list[list[int]], most: int
    ) -> None:
        index = NgramIndex()
        text: list[int] = []
        for piece in pieces:
            text += piece
            assert index.continuation(text, most) == _continuation(text, most)

    @given(
        unit=st.lists(st.integers(0, 5), min_size=1, max_size=5),
        repeats=st.integers(3, 8),
        most=st.integers(1, 30),
    )
    def test_goes_on_with_what_repeats_itself(
        self, unit: list[int], repeats: int, most: int
    ) -> None:
        text = unit * repeats
        _, tokens = NgramIndex().continuation(text, most)
        assert tokens == (unit * most)[:most]

    def test_says_how_long_the_match_is(self) -> None:
        assert NgramIndex().continuation([1, 2, 3, 4, 9, 1, 2, 3], 3) == (3, [4, 9, 1])
        assert NgramIndex().continuation([1, 2, 3, 4, 9, 7, 2, 3], 2) == (2, [4, 9])
        long = list(range(40))
        assert NgramIndex().continuation(long + long[:30], 2) == (LONGEST_MATCH, [30, 31])

    @pytest.mark.parametrize("text", [[], [1], [1, 2], [1, 2, 3], [1, 2, 3, 2, 1]])
    def test_of_what_never_stood_there_is_nothing(self, text: list[int]) -> None:
        assert NgramIndex().continuation(text, 5) == (0, [])


class TestNumbersOfAFile:
    @pytest.mark.parametrize("value", [0, 0.5, 1, True])
    def test_within_the_range_are_taken(self, value: float) -> None:
        assert number_within(value, 0, 1) == float(value)

    @pytest.mark.parametrize("value", [-1e-9, 1.01, math.nan, math.inf, -math.inf, 10**400])
    def test_beyond_it_are_refused(self, value: float) -> None:
        with pytest.raises(ValueError, match="is not in"):
            number_within(value, 0, 1)

    @pytest.mark.parametrize("value", [None, "0.5", [], {}])
    def test_of_another_kind_are_refused(self, value: object) -> None:
        with pytest.raises(TypeError):
            number_within(value, 0, 1)


def _rows(cost: float) -> Callable[[int], float]:
    """Each drafted token costs as much."""
    return lambda count: cost * count


def _continuation(text: list[int], most: int) -> tuple[int, list[int]]:
    """What `NgramIndex` says, by looking everywhere."""
    end = len(text)
    places = [place for place in range(2, end) if text[place - 2 : place] == text[end - 2 :]]
    if not places or most < 1:
        return 0, []
    place = places[-1]
    lengths = range(2, min(LONGEST_MATCH, place) + 1)
    match = max(n for n in lengths if text[place - n : place] == text[end - n :])
    longer = list(text)
    for i in range(most):
        longer.append(longer[place + i])
    return match, longer[end:]

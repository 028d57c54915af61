"""What lossless mode is made of: the engines' drafts, verifications and rewinds, what is learnt
about drafts, and drafts out of the text."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from native_engines import (
    Subject,
    begun,
    cached_states,
    engine_of,
    random_tokens,
    subject_of,
)
from torch import Tensor
from transformers import PreTrainedModel

from river_llm import ContextFullError, DraftConfig, ExitPolicy, River, RiverConfig, RiverError
from river_llm.engines import CpuEngine, DraftRule, Engine, TorchEngine
from river_llm.engines.drafting import likeliest_with_margin
from river_llm.lossless import LosslessDecoder
from river_llm.lossless.draft_control import (
    MOST_DRAFTED,
    Chances,
    NgramSource,
    PassCost,
    RiverSource,
    Source,
)
from river_llm.lossless.learnt_drafts import read_learnt, write_learnt
from river_llm.lossless.ngram_drafts import LONGEST_MATCH, NgramIndex

CONTEXT = 128
NUM_LAYERS = 4
CASES = ("llama", "mistral, window", "gemma3_text")
MIXED = ExitPolicy.similarity(0.9)
LENGTHS = [9, 4, 12]  # of the prompts of a batch

both_engines = pytest.mark.parametrize("kind", ["torch", "cpu"])
every_case = pytest.mark.parametrize("case", CASES)
unit = st.floats(0, 1)


class TestDraft:
    """Of a batch whose prompts have different lengths."""

    @both_engines
    @every_case
    @pytest.mark.parametrize("choose", [None, likeliest_with_margin])
    @pytest.mark.parametrize("exit_layer", [0, 2, NUM_LAYERS])
    def test_leaves_the_cache_exactly_as_it_was(
        self, kind: str, case: str, choose: Any, exit_layer: int
    ) -> None:
        engine, untouched = _engine(kind, case), _engine(kind, case, spare=True)
        tokens = _prefill(engine)
        _prefill(untouched)
        length, states = engine.length, [cached_states(engine, row) for row in range(3)]
        engine.draft([5, 6, 7], [3, 0, 5], DraftRule(exit_layer), choose)
        assert engine.length == length
        assert engine.policy is MIXED
        for row, expected in enumerate(states):
            assert torch.equal(cached_states(engine, row), expected)
        step, expected_step = engine.decode(tokens), untouched.decode(tokens)
        assert torch.equal(step.logits, expected_step.logits)
        assert torch.equal(step.exit_layers, expected_step.exit_layers)

    @both_engines
    @every_case
    @pytest.mark.parametrize("exit_layer", [0, 1, 2, NUM_LAYERS])
    def test_is_decoding_with_a_fixed_exit(self, kind: str, case: str, exit_layer: int) -> None:
        engine = _engine(kind, case)
        tokens = _prefill(engine)
        drafts = engine.draft(tokens.tolist(), [6, 6, 6], DraftRule(exit_layer))
        engine.policy = ExitPolicy.fixed(exit_layer)
        for place in range(6):
            logits = engine.decode(tokens).logits
            for row, draft in enumerate(drafts):
                token, margin = likeliest_with_margin(row, draft.tokens[:place], logits[row])
                assert draft.tokens[place] == token
                assert draft.margins[place] == pytest.approx(margin, abs=1e-5)
            tokens = torch.tensor([draft.tokens[place] for draft in drafts])

    @every_case
    @pytest.mark.parametrize("lm_head_bits", [16, 8, 4])
    def test_of_the_native_core_is_that_of_single_steps(self, case: str, lm_head_bits: int) -> None:
        engine = subject_of(case).engine(MIXED)
        engine.prepare_drafts(lm_head_bits)
        tokens = _prefill(engine).tolist()
        rule = DraftRule(1, lm_head_bits, 0.3, (0.5, 0.7, 0.9, 1.0))
        drafts = engine.draft(tokens, [8, 3, 6], rule)
        steps = engine.draft(tokens, [8, 3, 6], rule, likeliest_with_margin)
        for native, slow in zip(drafts, steps, strict=True):
            assert native.tokens == slow.tokens
            assert native.margins == pytest.approx(slow.margins, abs=1e-5)

    def test_of_narrower_heads_is_another(self) -> None:
        engine = subject_of("llama").engine(MIXED)
        tokens = _prefill(engine).tolist()
        margins = []
        for bits in (16, 8, 4):
            engine.prepare_drafts(bits)
            drafts = engine.draft(tokens, [6, 6, 6], DraftRule(0, bits))
            margins.append(drafts[0].margins)
        assert margins[0] != margins[1] != margins[2] != margins[0]
        assert margins[1][0] == pytest.approx(margins[0][0], abs=0.05)

    def test_has_the_head_that_its_rule_names_whatever_else_was_prepared(self) -> None:
        engine = subject_of("llama").engine(MIXED)
        tokens = _prefill(engine).tolist()
        engine.prepare_drafts(8)
        before = engine.draft(tokens, [6, 6, 6], DraftRule(0, 8))
        engine.prepare_drafts(4)
        engine.prepare_drafts(8)
        again = engine.draft(tokens, [6, 6, 6], DraftRule(0, 8))
        assert [draft.margins for draft in again] == [draft.margins for draft in before]

    def test_decoders_of_several_heads_on_one_engine_draft_with_their_own(self) -> None:
        engine = subject_of("llama").engine(MIXED)
        tokens = _prefill(engine).tolist()
        LosslessDecoder(engine, DraftConfig(lm_head_bits=8))
        before = engine.draft(tokens, [6, 6, 6], DraftRule(0, 8))
        LosslessDecoder(engine, DraftConfig(lm_head_bits=4))
        again = engine.draft(tokens, [6, 6, 6], DraftRule(0, 8))
        assert [draft.margins for draft in again] == [draft.margins for draft in before]

    @both_engines
    @given(
        most=st.lists(st.integers(0, 7), min_size=3, max_size=3),
        chances=st.lists(unit, min_size=1, max_size=8),
        least=unit,
    )
    def test_ends_where_the_product_of_its_chances_falls_below_the_least(
        self, kind: str, most: list[int], chances: list[float], least: float
    ) -> None:
        engine = _engine(kind, "llama")
        tokens = _prefill(engine).tolist()
        whole = engine.draft(tokens, [7, 7, 7], DraftRule(1))
        rule = DraftRule(1, 16, least, tuple(chances))
        drafts = engine.draft(tokens, most, rule)
        for row, draft in enumerate(drafts):
            product, length = 1.0, 0
            while length < most[row] and product >= least:
                product *= rule.chance(whole[row].margins[length])
                length += 1
                if abs(product - least) < 1e-6:  # float32 may see it otherwise
                    return
            assert draft.tokens == whole[row].tokens[:length]
            assert draft.margins == pytest.approx(whole[row].margins[:length], abs=1e-5)

    @both_engines
    def test_of_no_tokens_is_empty(self, kind: str) -> None:
        engine = _engine(kind, "llama")
        tokens = _prefill(engine).tolist()
        drafts = engine.draft(tokens, [0, 0, 0], DraftRule())
        assert [draft.tokens for draft in drafts] == [[], [], []]

    @both_engines
    def test_chooses_by_the_text_so_far(self, kind: str) -> None:
        engine = _engine(kind, "llama")
        tokens = _prefill(engine).tolist()
        seen: list[tuple[int, list[int]]] = []

        def choose(sequence: int, drafted: list[int], logits: Tensor) -> tuple[int, float]:
            seen.append((sequence, list(drafted)))
            return 10 * sequence + len(drafted), 0.5

        drafts = engine.draft(tokens, [2, 0, 3], DraftRule(), choose)
        assert [draft.tokens for draft in drafts] == [[0, 1], [], [20, 21, 22]]
        assert seen == [(0, []), (2, []), (0, [0]), (2, [20]), (2, [20, 21])]

    @both_engines
    def test_that_doesnt_fit_is_an_error_that_changes_nothing(self, kind: str) -> None:
        engine = _engine(kind, "llama")
        engine.prefill(random_tokens(1, CONTEXT - 4, seed=3))
        states = cached_states(engine)
        for choose in (None, likeliest_with_margin):
            with pytest.raises(
                ContextFullError, match=f"don't fit the model's context of {CONTEXT}"
            ):
                engine.draft([5], [5], DraftRule(), choose)
            assert engine.length == CONTEXT - 4
            assert torch.equal(cached_states(engine), states)
        assert len(engine.draft([5], [4], DraftRule())[0].tokens) == 4

    def test_prepares_the_head_that_it_needs(self) -> None:
        drafts = []
        for prepare in (False, True):
            engine = subject_of("llama").engine(MIXED)
            tokens = _prefill(engine).tolist()
            if prepare:
                engine.prepare_drafts(8)
            drafts.append(engine.draft(tokens, [2, 2, 2], DraftRule(0, 8)))
        assert drafts[0] == drafts[1]

    def test_of_another_number_of_sequences_is_an_error(self) -> None:
        engine = _engine("cpu", "llama")
        _prefill(engine)
        for tokens, most in (([5], [1]), ([5, 6, 7], [1, 1]), ([5, 6, 7, 8], [1, 1, 1, 1])):
            with pytest.raises(RiverError, match="but the cache holds 3 sequences"):
                engine.draft(tokens, most, DraftRule())

    @pytest.mark.parametrize(
        ("margin", "place"),
        [(0.0, 0), (0.24, 0), (0.25, 1), (0.99, 3), (1.0, 3), (-0.1, 0), (2, 3)],
    )
    def test_takes_the_chance_of_the_margins_part(self, margin: float, place: int) -> None:
        chances = (0.1, 0.2, 0.3, 0.4)
        assert DraftRule(chances=chances).chance(margin) == chances[place]


class TestVerify:
    @both_engines
    @every_case
    @given(
        counts=st.lists(st.integers(0, 7), min_size=3, max_size=3).filter(any),
        seed=st.integers(0, 100),
    )
    @settings(max_examples=10)
    def test_of_some_tokens_of_each_row_is_that_of_the_rows_alone(
        self, kind: str, case: str, counts: list[int], seed: int
    ) -> None:
        engine = _engine(kind, case)
        last = _prefill(engine)
        tokens = random_tokens(3, 7, seed)
        result = engine.verify(tokens, counts)
        logits, best = result.logits, result.best_tokens
        assert logits.shape[:2] == best.shape == (3, 7)
        assert engine.policy is MIXED
        assert engine.length == max(a + b for a, b in zip(LENGTHS, counts, strict=True))
        after = engine.decode(last).logits
        for row, count in enumerate(counts):
            alone = _engine(kind, case, spare=True)
            _prefill_alone(alone, row)
            if count:
                own = alone.verify(tokens[row : row + 1, :count])
                _check(kind, logits[row, :count], own.logits[0])
                assert best[row, :count].tolist() == own.best_tokens[0].tolist()
                assert result.exit_layers[row, :count].tolist() == [NUM_LAYERS] * count
            assert alone.length == LENGTHS[row] + count
            _check(kind, after[row], alone.decode(last[row : row + 1]).logits[0])

    @both_engines
    def test_of_all_tokens_is_that_without_counts(self, kind: str) -> None:
        engine, other = _engine(kind, "llama"), _engine(kind, "llama", spare=True)
        _prefill(engine)
        _prefill(other)
        tokens = random_tokens(3, 4, seed=7)
        assert torch.equal(engine.verify(tokens, [4, 4, 4]).logits, other.verify(tokens).logits)
        assert torch.equal(cached_states(engine, 2), cached_states(other, 2))

    @both_engines
    def test_that_doesnt_fit_is_an_error_that_changes_nothing(self, kind: str) -> None:
        engine = _engine(kind, "llama")
        engine.prefill(random_tokens(2, CONTEXT - 4, seed=3))
        states = cached_states(engine, 1)
        for counts in (None, [5, 1]):
            with pytest.raises(
                ContextFullError, match=f"don't fit the model's context of {CONTEXT}"
            ):
                engine.verify(random_tokens(2, 5, seed=4), counts)
            assert engine.length == CONTEXT - 4
            assert torch.equal(cached_states(engine, 1), states)
        engine.verify(random_tokens(2, 4, seed=4), [4, 1])
        assert engine.length == CONTEXT

    @pytest.mark.parametrize("counts", [[1, 2], [1, 2, 5], [1, -1, 2], [0, 0, 0]])
    def test_refuses_counts_that_are_none(self, counts: list[int]) -> None:
        engine = _engine("cpu", "llama")
        _prefill(engine)
        states = cached_states(engine, 2)
        with pytest.raises(RiverError, match=r"the counts are|there is nothing to verify"):
            engine.verify(random_tokens(3, 4, seed=7), counts)
        assert torch.equal(cached_states(engine, 2), states)


class TestRewind:
    @both_engines
    @every_case
    @given(counts=st.lists(st.integers(0, 6), min_size=3, max_size=3))
    @settings(max_examples=15)
    def test_of_different_lengths_goes_on_as_the_rows_alone_do(
        self, kind: str, case: str, counts: list[int]
    ) -> None:
        engine = _engine(kind, case, ExitPolicy.fixed(2))
        _prefill(engine)
        tokens = random_tokens(3, 6, seed=12)
        for place in range(6):
            engine.decode(tokens[:, place])
        engine.rewind(counts)
        kept = [6 - count for count in counts]
        assert engine.length >= max(a + b for a, b in zip(LENGTHS, kept, strict=True))
        after = [engine.decode(torch.tensor([7, 8, 9])).logits for _ in range(3)]
        for row in range(3):
            alone = _engine(kind, case, ExitPolicy.fixed(2), spare=True)
            _prefill_alone(alone, row)
            for place in range(kept[row]):
                alone.decode(tokens[row : row + 1, place])
            for logits in after:
                _check(kind, logits[row], alone.decode(torch.tensor([7 + row])).logits[0])

    @both_engines
    def test_of_nothing_changes_nothing(self, kind: str) -> None:
        engine = _engine(kind, "llama")
        _prefill(engine)
        length, states = engine.length, [cached_states(engine, row) for row in range(3)]
        engine.rewind([0, 0, 0])
        assert engine.length == length
        assert all(torch.equal(cached_states(engine, row), states[row]) for row in range(3))

    @pytest.mark.parametrize("counts", [[0, 0, -1], [0, 5, 0], [13, 0, 0]])
    def test_refuses_what_there_is_not(self, counts: list[int]) -> None:
        engine = _engine("cpu", "llama")
        _prefill(engine)
        with pytest.raises(RiverError, match="some sequence hasn't as many"):
            engine.rewind(counts)
        assert engine.length == max(LENGTHS)

    @both_engines
    @every_case
    @given(data=st.data())
    @settings(max_examples=20, suppress_health_check=[HealthCheck.too_slow])
    def test_any_course_of_rounds_is_that_of_the_rows_alone(
        self, kind: str, case: str, data: st.DataObject
    ) -> None:
        batch = data.draw(st.integers(1, 4), label="batch")
        lengths = data.draw(st.lists(st.integers(1, 10), min_size=batch, max_size=batch))
        source = iter(random_tokens(1, 4000, seed=data.draw(st.integers(0, 50)))[0].tolist())
        rows = [list(itertools.islice(source, length)) for length in lengths]
        engine = _engine(kind, case, ExitPolicy.never())
        _prefill_rows(engine, rows)
        for _ in range(data.draw(st.integers(1, 6), label="rounds")):
            verb = data.draw(st.sampled_from(["verify", "rewind", "draft", "decode"]))
            counts = data.draw(st.lists(st.integers(0, 5), min_size=batch, max_size=batch))
            if verb == "draft":
                engine.draft([5 + row for row in range(batch)], counts, DraftRule(1))
                continue
            if verb == "rewind":  # a token at least stays
                counts = [min(n, len(row) - 1) for n, row in zip(counts, rows, strict=True)]
                engine.rewind(counts)
                rows = [row[: len(row) - n] for n, row in zip(counts, rows, strict=True)]
                continue
            if verb == "decode" or not any(counts):
                counts = [1] * batch
            new = [list(itertools.islice(source, max(counts))) for _ in range(batch)]
            if verb == "decode":
                logits = engine.decode(torch.tensor(new).flatten()).logits.unsqueeze(1)
            else:
                logits = engine.verify(torch.tensor(new), counts).logits
            for row in range(batch):
                rows[row] += new[row][: counts[row]]
                if counts[row]:
                    alone = _engine(kind, case, ExitPolicy.never(), spare=True)
                    expected = alone.verify(torch.tensor([rows[row]])).logits[0, -counts[row] :]
                    _check(kind, logits[row, : counts[row]], expected)


class TestNumbersThatAreNone:
    """A river may overflow where the backbone doesn't: its drafts are wrong then, no more."""

    @both_engines
    @pytest.mark.parametrize("choose", [None, likeliest_with_margin])
    def test_in_a_draft_end_nothing(self, kind: str, choose: Any) -> None:
        engine = _engine(kind, _without_numbers())
        tokens = _prefill(engine).tolist()
        rule = DraftRule(0, 16, 0.5, (0.2, 0.4, 0.6, 0.8))
        drafts = engine.draft(tokens, [4, 4, 4], rule, choose)
        assert all(1 <= len(draft.tokens) <= 4 for draft in drafts)

    def test_in_margins_count_as_some_class(self) -> None:
        source = RiverSource(0)
        source.note_margins([0.5, math.nan], 1)
        assert sum(source.chances.tried) == 2
        rule = source.rule(16, 10.0, PassCost())
        assert rule.chance(math.nan) == rule.chances[0]  # as the native core has it


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


class TestPassCost:
    def test_is_nothing_before_the_first_pass(self) -> None:
        cost = PassCost()
        assert [cost.seconds(rows) for rows in (1, 5, 100)] == [0, 0, 0]
        assert cost.more_rows(4) == 0

    @pytest.mark.parametrize(("first", "each"), [(0.01, 0.0003), (0.5, 0.1), (1e-4, 0.0)])
    def test_comes_to_the_line_through_what_is_measured(self, first: float, each: float) -> None:
        cost = PassCost()
        _measure(cost, first, each, passes=5000)
        for rows in (1, 2, 5, 9, 13):
            expected = first + each * (rows - 1)
            assert cost.seconds(rows) == pytest.approx(expected, rel=0.1), rows
        assert cost.more_rows(8) == pytest.approx(8 * each, abs=0.15 * (first + 8 * each))

    def test_of_more_rows_is_never_less_than_nothing(self) -> None:
        cost = PassCost()
        for rows, seconds in [(1, 0.5), (9, 0.1), (1, 0.5), (13, 0.001), (4, 0.0)] * 50:
            cost.note(rows, seconds)
            assert all(cost.more_rows(count) >= 0 for count in range(20))

    def test_is_little_changed_by_a_pass_that_was_held_up(self) -> None:
        cost = PassCost()
        _measure(cost, 0.01, 0.0003, passes=300)
        before = cost.seconds(1)
        cost.note(1, 100.0)
        assert cost.seconds(1) < 1.3 * before
        _measure(cost, 0.01, 0.0003, passes=50)
        assert cost.seconds(1) == pytest.approx(before, rel=0.05)

    def test_goes_on_from_what_was_kept(self) -> None:
        cost, other = PassCost(), PassCost()
        _measure(cost, 0.01, 0.0003, passes=100)
        other.restore(cost.to_dict())
        for rows in (1, 3, 8, 40, 500):
            assert other.seconds(rows) == pytest.approx(cost.seconds(rows), rel=1e-3)


class TestSource:
    def test_pauses_ever_longer_while_it_brings_nothing(self) -> None:
        source = Source()
        assert source.is_due()
        pauses = [_bring(source, -1.0) for _ in range(8)]
        assert pauses[0] >= 8
        assert pauses == sorted(pauses)
        assert pauses[1] == 2 * pauses[0]
        assert pauses[-1] == pauses[-2] <= 300

    def test_never_pauses_while_it_brings_something(self) -> None:
        source = Source()
        for _ in range(200):
            assert source.is_due()
            source.note(0.3)
        assert source.value == pytest.approx(0.3, abs=0.05)
        assert source.drafts == 200

    def test_that_pays_again_is_asked_again_soon(self) -> None:
        source = Source()
        longest = [_bring(source, -1.0) for _ in range(6)][-1]
        while source.value <= 0:
            _bring(source, 2.0)
        for _ in range(20):
            assert source.is_due()
            source.note(2.0)
        assert _bring(source, -30.0) < longest

    def test_stays_away_from_few_rounds_only_where_one_bad_draft_came(self) -> None:
        source = Source()
        for _ in range(50):
            source.note(1.0)
        source.note(-1.0)
        assert source.is_due()


class TestRiverSource:
    @given(
        trials=st.lists(st.tuples(unit, st.booleans()), max_size=80),
        token_seconds=st.floats(1e-5, 1),
        pass_seconds=st.floats(1e-4, 10),
        rates=st.tuples(st.floats(0.1, 1e4), st.floats(0.1, 1e4)).map(sorted),
    )
    def test_drafts_shorter_where_time_is_worth_more(
        self,
        trials: list[tuple[float, bool]],
        token_seconds: float,
        pass_seconds: float,
        rates: list[float],
    ) -> None:
        source, cost = RiverSource(2), PassCost()
        for margin, is_accepted in trials:
            source.note_margins([margin], int(is_accepted))
        source.note_time(3, 3 * token_seconds)
        cost.note(1, pass_seconds)
        low, high = (source.rule(8, rate, cost) for rate in rates)
        assert 0 < low.least_chance <= high.least_chance < 1
        assert low.chances == high.chances == source.chances.all()
        assert (low.exit_layer, low.lm_head_bits) == (2, 8)
        dearer = RiverSource(2)
        dearer.restore({**source.to_dict(), "token_seconds": 2 * token_seconds})
        assert dearer.rule(8, rates[0], cost).least_chance >= 0.999 * low.least_chance

    def test_has_a_rule_before_anything_is_measured(self) -> None:
        rule = RiverSource(0).rule(16, 0.0, PassCost())
        assert 0 < rule.least_chance < 1
        assert list(rule.chances) == sorted(rule.chances)

    def test_counts_a_token_only_where_those_before_were_accepted(self) -> None:
        source = RiverSource(0)
        source.note_margins([0.95, 0.55, 0.15, 0.05], 2)
        assert sum(source.chances.tried) == 3
        assert sum(source.chances.accepted) == 2
        before = RiverSource(0).chances
        assert source.chances.of(9) > before.of(9)
        assert source.chances.of(5) > before.of(5)
        assert source.chances.of(1) < before.of(1)
        assert source.chances.of(0) == before.of(0)

    def test_is_little_changed_by_a_draft_that_was_held_up(self) -> None:
        source = RiverSource(0)
        for _ in range(20):
            source.note_time(4, 0.04)
        source.note_time(1, 60.0)
        assert source.token_seconds < 0.012

    def test_goes_on_from_what_was_kept(self) -> None:
        source, other = RiverSource(1), RiverSource(1)
        for _ in range(30):
            source.note_margins([0.9, 0.4], 1)
            source.note_time(2, 0.02)
            source.note(0.25)
        other.restore(source.to_dict())
        assert other.to_dict() == source.to_dict()
        assert other.token_seconds == pytest.approx(0.01)


class TestNgramSource:
    def test_drafts_all_where_rows_cost_nothing(self) -> None:
        source = NgramSource(LONGEST_MATCH)
        assert source.best_length(2, MOST_DRAFTED, 100.0, PassCost())[0] == MOST_DRAFTED

    def test_drafts_nothing_where_rows_cost_more_than_they_bring(self) -> None:
        source, cost = NgramSource(LONGEST_MATCH), PassCost()
        _measure(cost, 0.02, 0.002, passes=5000)
        assert source.best_length(LONGEST_MATCH, MOST_DRAFTED, 2000.0, cost) == (0, 0)

    @given(match=st.integers(2, LONGEST_MATCH), most=st.integers(0, 64), rate=st.floats(0, 50))
    def test_drafts_longer_after_a_longer_match(self, match: int, most: int, rate: float) -> None:
        source, cost = NgramSource(LONGEST_MATCH), PassCost()
        _measure(cost, 0.02, 0.002, passes=50)
        length, value = source.best_length(match, most, rate, cost)
        assert 0 <= length <= most
        assert (value > 0) == (length > 0)
        longer_length, longer_value = source.best_length(match + 1, most, rate, cost)
        assert longer_length >= length
        assert longer_value >= value

    def test_drafts_less_after_drafts_that_failed(self) -> None:
        source, cost = NgramSource(LONGEST_MATCH), PassCost()
        _measure(cost, 0.02, 0.002, passes=50)
        before = source.best_length(3, MOST_DRAFTED, 40.0, cost)
        for _ in range(50):
            source.note(3, 4, 0)
        after = source.best_length(3, MOST_DRAFTED, 40.0, cost)
        assert after[0] <= before[0]
        assert after[1] < before[1]
        assert source.chances.of(4) == NgramSource(LONGEST_MATCH).chances.of(4)


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


class TestLearntDrafts:
    def test_come_back_under_their_key(self, tmp_path: Path) -> None:
        assert read_learnt(tmp_path, "a") is None
        write_learnt(tmp_path, "a", {"rate": 1.5})
        write_learnt(tmp_path, "b", {"rate": 2.5})
        write_learnt(tmp_path, "a", {"rate": 3.5})
        assert read_learnt(tmp_path, "a") == {"rate": 3.5}
        assert read_learnt(tmp_path, "b") == {"rate": 2.5}
        assert read_learnt(tmp_path, "c") is None
        assert [path.name for path in tmp_path.iterdir()] == ["drafts.json"]

    @pytest.mark.parametrize(
        "damage",
        [
            b"",
            b"{",
            b"\xff\xfe",
            b"null",
            b"[]",
            b'{"format_version": 2, "entries": {"a": {"rate": 1}}}',
            b'{"format_version": 1, "entries": [5]}',
            b'{"format_version": 1, "entries": {"a": 7}}',
            b'{"entries": {"a": {"rate": 1}}}',
        ],
    )
    def test_out_of_a_damaged_file_are_none_and_are_written_anew(
        self, tmp_path: Path, damage: bytes
    ) -> None:
        (tmp_path / "drafts.json").write_bytes(damage)
        assert read_learnt(tmp_path, "a") is None
        write_learnt(tmp_path, "a", {"rate": 1.5})
        assert read_learnt(tmp_path, "a") == {"rate": 1.5}

    def test_stay_as_they_were_where_nothing_can_be_written(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        write_learnt(tmp_path, "a", {"rate": 1.5})

        def refuse(*args: object, **kwargs: object) -> None:
            raise PermissionError("read-only file system")

        for name in ("tempfile.mkstemp", "pathlib.Path.replace"):
            with monkeypatch.context() as patched:
                patched.setattr(name, refuse)
                write_learnt(tmp_path, "a", {"rate": 2.5})
            assert read_learnt(tmp_path, "a") == {"rate": 1.5}
            assert [path.name for path in tmp_path.iterdir()] == ["drafts.json"]
        write_learnt(tmp_path / "nowhere", "a", {"rate": 2.5})
        assert not (tmp_path / "nowhere").exists()

    def test_go_where_the_river_goes(self, tiny_llama: PreTrainedModel, tmp_path: Path) -> None:
        river = River.build(tiny_llama, RiverConfig(group_size=32, quantizer="rtn"))
        river.save(tmp_path / "river")
        write_learnt(tmp_path / "river", "a", {"rate": 1.5})
        River.load(tmp_path / "river")
        river.save(tmp_path / "river")
        assert read_learnt(tmp_path / "river", "a") is None
        assert len(River.load(tmp_path / "river").exit_layers) == NUM_LAYERS

    def test_are_readable_by_those_who_can_read_the_river(
        self, tiny_llama: PreTrainedModel, tmp_path: Path
    ) -> None:
        river = River.build(tiny_llama, RiverConfig(group_size=32, quantizer="rtn"))
        river.save(tmp_path / "river")
        write_learnt(tmp_path / "river", "a", {"rate": 1.5})
        modes = {path.stat().st_mode for path in (tmp_path / "river").iterdir()}
        assert len(modes) == 1


def _engine(
    kind: str, case: str | Subject, policy: ExitPolicy = MIXED, spare: bool = False
) -> CpuEngine | TorchEngine:
    """An engine of a case with an empty cache; `spare` is another than the one without."""
    if isinstance(case, Subject):
        return case.reference(policy) if kind == "torch" else case.engine(policy)
    if kind == "torch":
        return subject_of(case).reference(policy)
    return begun(engine_of(case, threads=2 if spare else 1), policy)


def _without_numbers() -> Subject:
    """A model whose river gives no numbers."""
    subject = Subject("Llama", {"num_hidden_layers": NUM_LAYERS})
    for exit_layer in subject.river.exit_layers:
        exit_layer["mlp.down_proj"].scales.fill_(math.nan)
    return subject


def _prompts() -> list[list[int]]:
    longest = random_tokens(len(LENGTHS), max(LENGTHS), seed=11).tolist()
    return [row[:length] for row, length in zip(longest, LENGTHS, strict=True)]


def _prefill_rows(engine: Engine, rows: list[list[int]]) -> None:
    """Fill the cache with rows of different lengths, in the backbone."""
    longest = max(map(len, rows))
    tokens = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    mask = torch.arange(longest) >= longest - torch.tensor([[len(row)] for row in rows])
    engine.prefill(tokens, None if bool(mask.all()) else mask)


def _prefill(engine: Engine) -> Tensor:
    """Fill the cache with three prompts; a token of each that may come next."""
    _prefill_rows(engine, _prompts())
    return torch.tensor([5, 6, 7])


def _prefill_alone(engine: Engine, row: int) -> None:
    """Fill the cache with one of the three prompts."""
    engine.prefill(torch.tensor([_prompts()[row]]))


def _check(kind: str, actual: Tensor, expected: Tensor) -> None:
    """The same logits `[..., vocabulary]`: on the native engine bit for bit."""
    if kind == "cpu":
        assert torch.equal(actual, expected)
    else:
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def _measure(cost: PassCost, first: float, each: float, passes: int) -> None:
    """Passes of one row and a few more, that take so long, and as long again for each more row."""
    rows = random.Random(1)
    for _ in range(passes):
        count = rows.randint(1, 13)
        cost.note(count, (first + each * (count - 1)) * rows.uniform(0.97, 1.03))


def _bring(source: Source, value: float) -> int:
    """Drafts that bring so much until there is a pause; how long that is. At most 20."""
    for _ in range(20):
        source.note(value)
        pause = 0
        while not source.is_due():
            pause += 1
        if pause:
            return pause
    return 0


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

"""The engines' verbs for lossless mode: draft, verify, rewind."""

from __future__ import annotations

import itertools
import math
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
from tiny_models import VOCABULARY
from torch import Tensor

from river_llm import ContextFullError, DraftConfig, ExitPolicy, RiverError
from river_llm.engines import CpuEngine, DraftRule, Engine, TorchEngine
from river_llm.engines.drafting import likeliest_with_margin
from river_llm.lossless import LosslessDecoder

CONTEXT = 128
NUM_LAYERS = 4
CASES = ("llama", "mistral, window", "gemma3_text")
MIXED = ExitPolicy.similarity(0.9)
LENGTHS = [9, 4, 12]  # of the prompts of a batch

both_engines = pytest.mark.parametrize("kind", ["torch", "cpu"])
every_case = pytest.mark.parametrize("case", CASES)
either_choice = pytest.mark.parametrize(
    "choose", [None, likeliest_with_margin], ids=["natively", "by a function"]
)
unit = st.floats(0, 1)


class TestDraft:
    """Of a batch whose prompts have different lengths."""

    @both_engines
    @every_case
    @either_choice
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
    @given(
        most=st.lists(st.integers(0, 8), min_size=3, max_size=3),
        least=st.lists(unit, min_size=1, max_size=4),
        vocabulary=st.integers(2, VOCABULARY) | st.none(),
        stop_tokens=st.frozensets(st.integers(0, VOCABULARY - 1), max_size=40),
    )
    @settings(max_examples=15)
    def test_of_the_native_core_is_that_of_single_steps(
        self,
        case: str,
        lm_head_bits: int,
        most: list[int],
        least: list[float],
        vocabulary: int | None,
        stop_tokens: frozenset[int],
    ) -> None:
        engine = _engine("cpu", case)
        tokens = _prefill(engine).tolist()
        rule = DraftRule(
            1, lm_head_bits, vocabulary, tuple(least), (0.5, 0.7, 0.9, 1.0), stop_tokens
        )
        drafts = engine.draft(tokens, most, rule)
        steps = engine.draft(tokens, most, rule, likeliest_with_margin)
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

    @either_choice
    @both_engines
    @given(
        most=st.lists(st.integers(0, 7), min_size=3, max_size=3),
        chances=st.lists(unit, min_size=1, max_size=8),
        least=st.lists(unit, min_size=1, max_size=4),
    )
    @settings(max_examples=25)
    def test_ends_where_the_product_of_its_chances_falls_below_the_least(
        self, kind: str, choose: Any, most: list[int], chances: list[float], least: list[float]
    ) -> None:
        """The least that counts is that of as many sequences as still draft."""
        engine = _engine(kind, "llama")
        tokens = _prefill(engine).tolist()
        whole = engine.draft(tokens, [7, 7, 7], DraftRule(1))
        rule = DraftRule(1, least_chances=tuple(least), chances=tuple(chances))
        drafts = engine.draft(tokens, most, rule, choose)
        lengths, products = [0, 0, 0], [1.0, 1.0, 1.0]
        going = {row for row in range(3) if most[row]}
        while going:
            least_now = (least + [least[-1]] * 3)[len(going) - 1]
            for row in sorted(going):
                products[row] *= rule.chance(whole[row].margins[lengths[row]])
                lengths[row] += 1
            if any(abs(products[row] - least_now) < 1e-6 for row in going):
                return  # float32 may see it otherwise
            going = {
                row for row in going if lengths[row] < most[row] and products[row] >= least_now
            }
        for row, draft in enumerate(drafts):
            assert draft.tokens == whole[row].tokens[: lengths[row]]
            assert draft.margins == pytest.approx(whole[row].margins[: lengths[row]], abs=1e-5)

    @either_choice
    @both_engines
    @pytest.mark.parametrize("exit_layer", [0, 2])
    def test_ends_with_a_stop_token(self, kind: str, choose: Any, exit_layer: int) -> None:
        engine = _engine(kind, "llama")
        tokens = _prefill(engine).tolist()
        whole = [row.tokens for row in engine.draft(tokens, [8, 8, 8], DraftRule(exit_layer))]
        seen = set(itertools.chain(*whole))
        assert len(seen) > 3
        for stop in seen:
            rule = DraftRule(exit_layer, stop_tokens=frozenset({stop, VOCABULARY + 1}))
            drafts = engine.draft(tokens, [8, 8, 8], rule, choose)
            ends = [row.index(stop) + 1 if stop in row else 8 for row in whole]
            expected = [row[:end] for row, end in zip(whole, ends, strict=True)]
            assert [draft.tokens for draft in drafts] == expected

    @either_choice
    @both_engines
    @every_case
    @pytest.mark.parametrize("vocabulary", [2, 16, 50, VOCABULARY])
    def test_of_a_part_of_the_vocabulary_is_the_likeliest_of_it(
        self, kind: str, case: str, choose: Any, vocabulary: int
    ) -> None:
        engine = _engine(kind, case)
        tokens = _prefill(engine)
        drafts = engine.draft(
            tokens.tolist(), [4, 4, 4], DraftRule(1, vocabulary=vocabulary), choose
        )
        engine.policy = ExitPolicy.fixed(1)
        for place in range(4):
            logits = engine.decode(tokens).logits.float()[:, :vocabulary]
            for row, draft in enumerate(drafts):
                chances = logits[row].softmax(-1).sort(descending=True).values.tolist()
                assert draft.tokens[place] == int(logits[row].argmax())
                margin = 1 - chances[1] / chances[0]
                assert draft.margins[place] == pytest.approx(margin, abs=1e-4)
            tokens = torch.tensor([draft.tokens[place] for draft in drafts])

    @both_engines
    def test_chooses_by_the_logits_of_its_part_of_the_vocabulary(self, kind: str) -> None:
        engine = _engine(kind, "llama")
        tokens = _prefill(engine).tolist()
        sizes = []

        def choose(sequence: int, drafted: list[int], logits: Tensor) -> tuple[int, float]:
            sizes.append(logits.shape)
            return likeliest_with_margin(sequence, drafted, logits)

        for vocabulary in (50, None):
            engine.draft(tokens, [1, 1, 1], DraftRule(0, vocabulary=vocabulary), choose)
        assert sizes == [(50,)] * 3 + [(VOCABULARY,)] * 3

    @both_engines
    def test_of_a_part_of_the_vocabulary_leaves_all_to_the_next_pass(self, kind: str) -> None:
        engine, untouched = _engine(kind, "llama"), _engine(kind, "llama", spare=True)
        tokens = _prefill(engine)
        _prefill(untouched)
        for choose in (None, likeliest_with_margin):
            engine.draft(tokens.tolist(), [3, 3, 3], DraftRule(0, vocabulary=20), choose)
        assert torch.equal(engine.decode(tokens).logits, untouched.decode(tokens).logits)

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


class TestVocabularies:
    """Of which drafts may be made."""

    @both_engines
    def test_of_a_small_one_are_all(self, kind: str) -> None:
        assert _engine(kind, "llama").draft_vocabularies == (VOCABULARY,)

    def test_of_a_large_one_are_a_part_and_all(self) -> None:
        subject = Subject("Llama", {"vocab_size": 20_000, "num_hidden_layers": 1})
        engine = subject.engine()
        part, whole = engine.draft_vocabularies
        assert 1000 < part < whole == 20_000
        engine.prefill(random_tokens(1, 5, seed=1))
        (draft,) = engine.draft([5], [8], DraftRule(0, vocabulary=part))
        assert max(draft.tokens) < part
        assert subject.reference().draft_vocabularies == (whole,)

    def test_beyond_the_models_are_an_error(self) -> None:
        engine = _engine("cpu", "llama")
        tokens = _prefill(engine).tolist()
        with pytest.raises(RiverError, match="there are fewer tokens"):
            engine.draft(tokens, [1, 1, 1], DraftRule(0, vocabulary=VOCABULARY + 1))


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
    @either_choice
    def test_in_a_draft_end_nothing(self, kind: str, choose: Any) -> None:
        engine = _engine(kind, _without_numbers())
        tokens = _prefill(engine).tolist()
        rule = DraftRule(0, least_chances=(0.5,), chances=(0.2, 0.4, 0.6, 0.8))
        drafts = engine.draft(tokens, [4, 4, 4], rule, choose)
        assert all(1 <= len(draft.tokens) <= 4 for draft in drafts)
        assert rule.chance(math.nan) == rule.chances[0]  # as the native core has it


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

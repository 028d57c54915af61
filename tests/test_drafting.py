"""Drafts of the native engine: what single steps give, and nothing left of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_engines import KERNELS, Subject, engine_of, random_tokens, subject_of
from steps import append, begin, cached_states
from tiny_models import VOCABULARY

from river_llm import ContextFullError, ExitPolicy, RiverError
from river_llm.engines.cpu import CpuEngine
from river_llm.engines.drafting import Draft, DraftRule, argmax_with_margin
from river_llm.engines.step import Drafting

CONTEXT, NUM_LAYERS = 128, 4
LENGTHS = (9, 4, 12)  # of the prompts
NEXT = [5, 6, 7]  # token of each
either_choice = pytest.mark.parametrize(
    "choose", [None, argmax_with_margin], ids=["natively", "by a function"]
)


def filled(engine: CpuEngine) -> list[int]:
    """Sequences with prompts of different lengths."""
    sequences = begin(engine, [0] * 3)
    texts = {s: random_tokens(n, seed=s) for s, n in zip(sequences, LENGTHS, strict=True)}
    append(engine, texts)
    return sequences


def check_same(drafts: list[Draft], expected: list[Draft]) -> None:
    assert [draft.tokens for draft in drafts] == [draft.tokens for draft in expected]
    for draft, other in zip(drafts, expected, strict=True):
        assert draft.margins == pytest.approx(other.margins, abs=1e-5, nan_ok=True)


@given(
    case=st.sampled_from(["llama", "mistral, window", "gemma3_text"]),
    rule=st.builds(
        DraftRule,
        exit_layer=st.integers(0, NUM_LAYERS),
        lm_head_bits=st.sampled_from([16, 8, 4]),
        least_margin=st.floats(0, 0.5, width=32) | st.just(0.0),
        stop_tokens=st.frozensets(st.integers(0, VOCABULARY + 1), max_size=20),
    ),
    chosen=st.permutations(range(3)).flatmap(
        lambda order: st.integers(1, 3).map(lambda n: order[:n])
    ),
    most=st.lists(st.integers(1, 8), min_size=3, max_size=3),
)
@settings(max_examples=60)
def test_are_single_steps_that_leave_the_cache_as_it_was(
    case: str, rule: DraftRule, chosen: list[int], most: list[int]
) -> None:
    engine = engine_of(case, KERNELS[0], 2)
    sequences = [filled(engine)[i] for i in chosen]
    tokens, most = [NEXT[i] for i in chosen], [most[i] for i in chosen]
    states = [cached_states(engine, s) for s in engine.sequences()]
    drafts = engine.draft(sequences, tokens, most, rule)
    check_same(engine.draft(sequences, tokens, most, rule, argmax_with_margin), drafts)
    for expected, sequence in zip(states, engine.sequences(), strict=True):
        assert torch.equal(cached_states(engine, sequence), expected)
    if rule.lm_head_bits != 16:
        return
    for sequence, token, count, draft in zip(sequences, tokens, most, drafts, strict=True):
        length, text, margins = engine.length(sequence), [token], []
        while len(margins) < count and not (margins and rule.ends_with(text[-1], margins[-1])):
            step = append(engine, {sequence: text[-1:]}, ExitPolicy.fixed(rule.exit_layer))
            last, margin = argmax_with_margin(0, [], step.logits[0])
            if abs(margin - rule.least_margin) < 1e-6:
                break  # rounding may see it otherwise
            text.append(last)
            margins.append(margin)
        else:
            check_same([draft], [Draft(text[1:], margins)])
        engine.truncate(sequence, length)


def test_of_each_head_are_its_own_whatever_else_was_prepared() -> None:
    engine = subject_of("llama").engine()
    assert isinstance(engine, Drafting)
    sequences = filled(engine)
    margins = {}
    for bits in (16, 8, 4, 8, 16):
        for prepared in (8, 4)[: 2 * (len(margins) > 2)]:
            engine.prepare_drafts(prepared)
        draft = engine.draft(sequences, NEXT, [6, 6, 6], DraftRule(0, bits))[0]
        assert margins.setdefault(bits, draft.margins) == draft.margins
    assert len({tuple(of) for of in margins.values()}) == 3
    assert margins[8][0] == pytest.approx(margins[16][0], abs=0.05)


def test_are_chosen_by_the_text_so_far() -> None:
    engine = engine_of("llama", KERNELS[0], 2)
    sequences, seen = filled(engine)[::2], []

    def choose(which: int, drafted: list[int], logits: torch.Tensor) -> tuple[int, float]:
        assert logits.shape == (VOCABULARY,)
        seen.append((which, list(drafted)))
        return 10 * which + len(drafted), 0.5

    drafts = engine.draft(sequences, NEXT[::2], [2, 3], DraftRule(), choose)
    assert [draft.tokens for draft in drafts] == [[0, 1], [10, 11, 12]]
    assert seen == [(0, []), (1, []), (0, [0]), (1, [10]), (1, [10, 11])]


@either_choice
def test_where_the_river_overflows_are_wrong_and_no_more(choose: Any) -> None:
    subject = Subject("Llama", {"num_hidden_layers": NUM_LAYERS})
    for exit_layer in subject.river.exit_layers:
        exit_layer["mlp.down_proj"].scales.fill_(math.nan)
    engine = subject.engine()
    drafts = engine.draft(filled(engine), NEXT, [4] * 3, DraftRule(least_margin=0.1), choose)
    assert [len(draft.tokens) for draft in drafts] == [1] * 3
    assert len(engine.draft([0], [5], [4], DraftRule(), choose)[0].tokens) in (1, 4)


@either_choice
def test_that_cannot_be_change_nothing(choose: Any) -> None:
    engine = subject_of("llama").engine()
    sequences = filled(engine)
    append(engine, {sequences[0]: random_tokens(CONTEXT - 4 - LENGTHS[0], seed=3)})
    states = cached_states(engine, sequences[0])
    for arguments, message in (
        ((sequences[:1], [5], [5], DraftRule()), f"don't fit the model's context of {CONTEXT}"),
        (([7], [5], [1], DraftRule()), "no such sequence"),
        ((sequences, [5, -1, 6], [1] * 3, DraftRule()), "there is no token -1"),
    ):
        with pytest.raises((ContextFullError, RiverError), match=message):
            engine.draft(*arguments, choose)
        assert engine.length(sequences[0]) == CONTEXT - 4
        assert torch.equal(cached_states(engine, sequences[0]), states)
    assert len(engine.draft(sequences[:1], [5], [4], DraftRule(), choose)[0].tokens) == 4

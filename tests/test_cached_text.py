"""How much of a text in the KV cache another prompt may take over: never a token whose keys and
values would be others if the prompt were read in one go."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from river_llm import ExitPolicy
from river_llm.cached_text import (
    CachedText,
    common_beginning,
    prefill_thresholds,
    text_of_answer,
)
from river_llm.engines.native_model import AngleLimit

NUM_LAYERS = 3
STAYS, LEAVES, TAU = (math.inf,) * 3, (-math.inf,) * 3, (math.inf, 0.5, 0.5)
POLICIES = [
    ExitPolicy.never(),
    ExitPolicy.always(),
    ExitPolicy.fixed(1),
    *(
        ExitPolicy.similarity(0.5, prefill=rule)
        for rule in ("backbone", "river", "token", "sequence")
    ),
]
LIMITS = [None, AngleLimit(4, keep_changing=False), AngleLimit(4, keep_changing=True)]


@pytest.mark.parametrize(
    ("policy", "thresholds"),
    [
        (ExitPolicy.similarity(0.5), STAYS),
        (ExitPolicy.always(), LEAVES),
        (ExitPolicy.similarity(0.5, prefill="river"), LEAVES),
        (ExitPolicy.similarity(0.5, prefill="token"), TAU),
        (ExitPolicy.similarity(0.5, prefill="sequence"), None),
    ],
    ids=str,
)
def test_each_token_of_a_prompt_leaves_by_the_prefill_rule(
    policy: ExitPolicy, thresholds: tuple[float, ...] | None
) -> None:
    assert prefill_thresholds(policy, NUM_LAYERS) == thresholds


def test_a_beginning_leaves_the_prompts_last_token_to_run() -> None:
    text = CachedText([1, 2, 3, 4], 4, STAYS, 4)
    assert text.beginning([1, 2, 3, 4]) == 3
    assert text.beginning([1, 2, 3, 4, 5]) == 4
    assert text.beginning([1, 2]) == 1
    assert text.beginning([1, 9, 3]) == 1
    assert text.beginning([9]) == text.beginning([]) == 0
    assert common_beginning([1, 2], [1, 2, 3]) == 2


def test_only_exact_tokens_are_exact_and_by_the_same_thresholds() -> None:
    text = CachedText([1, 2, 3, 4], 3, TAU, 4)
    prompt = [1, 2, 3, 4, 5]
    assert text.beginning(prompt) == 4
    assert text.exact_beginning(prompt, TAU, None) == 3
    assert text.exact_beginning(prompt, STAYS, None) == 0
    assert text.exact_beginning(prompt, None, None) == 0
    assert text.first(2) == CachedText([1, 2], 2, TAU, 4)


@pytest.mark.parametrize(
    ("limit", "positions", "length", "exact"),
    [
        (AngleLimit(4, keep_changing=False), 4, 4, 3),
        (AngleLimit(4, keep_changing=False), 4, 5, 0),
        (AngleLimit(4, keep_changing=False), 5, 4, 0),
        (AngleLimit(4, keep_changing=False), 5, 9, 3),
        (AngleLimit(4, keep_changing=True), 3, 4, 3),
        (AngleLimit(4, keep_changing=True), 5, 6, 0),
        (AngleLimit(4, keep_changing=True), 6, 6, 3),
    ],
)
def test_tokens_with_other_angles_are_not_exact(
    limit: AngleLimit, positions: int, length: int, exact: int
) -> None:
    text = CachedText([1, 2, 3], 3, STAYS, positions)
    prompt = [1, 2, 3, *range(10, 10 + length - 3)]
    assert text.exact_beginning(prompt, STAYS, limit) == exact


# ---- a slow plain reference: each token with all that its keys and values depend on ----

Entry = tuple[Any, ...]


def read(
    tokens: Sequence[int], policy: ExitPolicy, limit: AngleLimit | None, kept: list[Entry]
) -> list[Entry]:
    """The entries of a prompt whose beginning is there."""
    entries = list(kept)
    by = prefill_thresholds(policy, NUM_LAYERS) or ("together", *tokens[len(kept) :])
    for token in tokens[len(kept) :]:
        entries.append((token, by, angles(limit, len(tokens)), tuple(entries)))
    return entries


def decode(
    tokens: Sequence[int], policy: ExitPolicy, limit: AngleLimit | None, entries: list[Entry]
) -> list[Entry]:
    entries = list(entries)
    for token in tokens:
        by = policy.thresholds(NUM_LAYERS)
        entries.append((token, by, angles(limit, len(entries) + 1), tuple(entries)))
    return entries


def angles(limit: AngleLimit | None, length: int) -> object:
    if limit is None or length <= limit.positions:
        return "usual"
    return length if limit.keep_changing else "long"


def check_claims(text: CachedText, entries: list[Entry], limit: AngleLimit | None) -> None:
    """See that whatever the text offers to any prompt is what reading that prompt gives."""
    for policy in POLICIES:
        for length in range(1, len(text.tokens) + 4):
            prompt = [*text.tokens, 2, 2, 2][:length]
            thresholds = prefill_thresholds(policy, NUM_LAYERS)
            exact = text.exact_beginning(prompt, thresholds, limit)
            assert entries[:exact] == read(prompt, policy, limit, [])[:exact]


@dataclasses.dataclass(frozen=True)
class Turn:
    """A prompt that begins as the text before it does, and its answer."""

    common: int  # tokens, if there are as many
    new: int
    answered: int
    policy: ExitPolicy
    as_left: bool
    is_loaded: bool


turns = st.builds(
    Turn,
    st.integers(0, 8),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from(POLICIES),
    st.booleans(),
    st.booleans(),
)


@settings(max_examples=150)
@given(st.lists(turns, min_size=2, max_size=4), st.sampled_from(LIMITS))
def test_what_is_taken_over_is_what_reading_in_one_go_gives(
    turns: list[Turn], limit: AngleLimit | None
) -> None:
    """Prompts answered after each other, which take over what is exact, or as chats do whatever is
    there, or load what another run has saved."""
    text = CachedText([], 0, STAYS, 0)
    entries: list[Entry] = []
    fresh = itertools.count(10)
    for turn in turns:
        if turn.is_loaded and text.exact:
            text = dataclasses.replace(text.first(text.exact), is_loaded=True)
            entries = entries[: len(text.tokens)]
        prompt = [*text.tokens[: turn.common], *itertools.islice(fresh, turn.new)]
        if turn.as_left and not text.is_loaded:
            kept = text.beginning(prompt)
        else:
            thresholds = prefill_thresholds(turn.policy, NUM_LAYERS)
            kept = text.exact_beginning(prompt, thresholds, limit)
        entries = read(prompt, turn.policy, limit, entries[:kept])
        answer = list(itertools.islice(fresh, turn.answered))
        entries = decode(answer, turn.policy, limit, entries)
        tokens = [*prompt, *answer]
        text = text_of_answer(tokens, len(prompt), turn.policy, NUM_LAYERS, limit, text, kept)
        assert text.tokens == tokens
        assert not text.is_loaded
        check_claims(text, entries, limit)


def test_an_answer_by_the_prompts_own_thresholds_is_exact_too() -> None:
    tokens = [5, 6, 7, 8]
    for policy, exact in [
        (ExitPolicy.never(), 4),
        (ExitPolicy.always(), 4),
        (ExitPolicy.similarity(0.5, prefill="token"), 4),
        (ExitPolicy.similarity(0.5), 2),
        (ExitPolicy.never(prefill="river"), 2),
        (ExitPolicy.never(prefill="sequence"), 0),
    ]:
        assert text_of_answer(tokens, 2, policy, NUM_LAYERS, None).exact == exact
    crossing = AngleLimit(3, keep_changing=False)
    assert text_of_answer(tokens, 2, ExitPolicy.never(), NUM_LAYERS, crossing).exact == 2


def test_what_stands_on_other_tokens_is_not_exact() -> None:
    """The second prompt takes over an answer that exits have written."""
    policy = ExitPolicy.fixed(1)
    first = text_of_answer([5, 6, 7, 8], 2, policy, NUM_LAYERS, None)
    second = text_of_answer([5, 6, 7, 8, 9, 9], 5, policy, NUM_LAYERS, None, first, 4)
    assert (first.exact, second.exact) == (2, 2)
    third = text_of_answer([5, 6, 1, 8, 9, 9], 5, policy, NUM_LAYERS, None, first, 2)
    assert third.exact == 5

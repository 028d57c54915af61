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
from river_llm.engines.native_model import RopeBoundary
from river_llm.generate.cached_text import (
    CachedText,
    common_prefix,
    prompt_thresholds,
    text_of_answer,
)

NUM_LAYERS = 3
STAYS, TAU = (math.inf,) * 3, (math.inf, 0.5, 0.5)
POLICIES = [
    None,
    ExitPolicy.never(),
    ExitPolicy.always(),
    ExitPolicy.fixed(1),
    *(
        ExitPolicy.similarity(0.5, prefill=rule)
        for rule in ("backbone", "river", "token", "sequence")
    ),
    ExitPolicy.always(second_look=0.1),
    ExitPolicy.fixed(1, second_look=0.1),
    ExitPolicy.similarity(0.5, prefill="token", second_look=0.1),
]
BOUNDARIES = [None, RopeBoundary(4, keep_changing=False), RopeBoundary(4, keep_changing=True)]


def test_what_is_usable_leaves_the_prompts_last_token_to_run() -> None:
    policy = ExitPolicy.similarity(0.5, prefill="token")
    text = CachedText(0, [1, 2, 3], TAU, 3)

    def usable(prompt: list[int], policy: ExitPolicy | None = policy) -> int:
        return text.usable(prompt, policy, NUM_LAYERS, None)

    assert [usable(prompt) for prompt in ([1, 2, 3], [1, 2, 3, 4, 5], [1, 9, 3])] == [2, 3, 1]
    assert usable([9]) == usable([]) == 0
    for other in (None, ExitPolicy.fixed(1)):
        assert usable([1, 2, 3, 4, 5], other) == 0
    assert common_prefix([1, 2], [1, 2, 3]) == 2


@pytest.mark.parametrize(
    ("keep_changing", "positions", "length", "usable"),
    [
        (False, 4, 5, 0),
        (False, 5, 9, 3),
        (True, 5, 6, 0),
        (True, 6, 6, 3),
    ],
)
def test_tokens_with_other_angles_are_not(
    keep_changing: bool, positions: int, length: int, usable: int
) -> None:
    text = CachedText(0, [1, 2, 3], STAYS, positions)
    prompt = [1, 2, 3, *range(10, 10 + length - 3)]
    assert text.usable(prompt, None, NUM_LAYERS, RopeBoundary(4, keep_changing)) == usable


# ---- a slow plain reference: each token with all that its keys and values depend on ----

Entry = tuple[Any, ...]


def read(
    tokens: Sequence[int],
    policy: ExitPolicy | None,
    boundary: RopeBoundary | None,
    kept: list[Entry],
) -> list[Entry]:
    """The entries of a prompt whose beginning is there."""
    entries = list(kept)
    by: Entry = prompt_thresholds(policy, NUM_LAYERS) or ("together", *tokens[len(kept) :])
    for place, token in enumerate(tokens[len(kept) :], start=len(kept) + 1):
        if place == len(tokens):
            by = once_or_twice(by, policy)
        entries.append((token, by, angles(boundary, len(tokens)), tuple(entries)))
    return entries


def decode(
    tokens: Sequence[int],
    policy: ExitPolicy | None,
    boundary: RopeBoundary | None,
    entries: list[Entry],
) -> list[Entry]:
    entries = list(entries)
    for token in tokens:
        by = once_or_twice((policy or ExitPolicy.never()).thresholds(NUM_LAYERS), policy)
        entries.append((token, by, angles(boundary, len(entries) + 1), tuple(entries)))
    return entries


def once_or_twice(by: Entry, policy: ExitPolicy | None) -> Entry:
    """What left may have run again."""
    looks_again = policy is not None and policy.second_look is not None
    return ("twice?", *by) if looks_again and by != STAYS else by


def angles(boundary: RopeBoundary | None, length: int) -> object:
    if boundary is None or length <= boundary.positions:
        return "usual"
    return length if boundary.keep_changing else "long"


def check_claims(text: CachedText, entries: list[Entry], boundary: RopeBoundary | None) -> None:
    """Whatever the text offers to any prompt is what reading that prompt gives."""
    for policy in POLICIES:
        for length in range(1, len(text.tokens) + 4):
            prompt = [*text.tokens, 2, 2, 2][:length]
            usable = text.usable(prompt, policy, NUM_LAYERS, boundary)
            assert entries[:usable] == read(prompt, policy, boundary, [])[:usable]


@dataclasses.dataclass(frozen=True)
class Turn:
    """A prompt that begins as the text before it does, and its answer."""

    common: int  # tokens, if there are as many
    new: int
    answered: int
    policy: ExitPolicy | None


turns = st.builds(
    Turn,
    st.integers(0, 8),
    st.integers(1, 3),
    st.integers(0, 3),
    st.sampled_from(POLICIES),
)


@settings(max_examples=150)
@given(st.lists(turns, min_size=2, max_size=4), st.sampled_from(BOUNDARIES))
def test_what_is_taken_over_is_what_reading_in_one_go_gives(
    turns: list[Turn], boundary: RopeBoundary | None
) -> None:
    """Prompts answered after each other, which take over what is usable."""
    text: CachedText | None = None
    entries: list[Entry] = []
    fresh = itertools.count(10)
    for turn in turns:
        before = [] if text is None else text.tokens
        prompt = [*before[: turn.common], *itertools.islice(fresh, turn.new)]
        usable = 0 if text is None else text.usable(prompt, turn.policy, NUM_LAYERS, boundary)
        entries = read(prompt, turn.policy, boundary, entries[:usable])
        answer = list(itertools.islice(fresh, turn.answered))
        entries = decode(answer, turn.policy, boundary, entries)
        tokens = [*prompt, *answer]
        text = text_of_answer(0, tokens, len(prompt), turn.policy, NUM_LAYERS, boundary)
        if text is not None:
            assert text.tokens == tokens[: len(text.tokens)]
            check_claims(text, entries, boundary)


def test_an_answer_by_the_prompts_own_thresholds_is_kept_too() -> None:
    def kept(policy: ExitPolicy | None, boundary: RopeBoundary | None = None) -> int:
        text = text_of_answer(0, [5, 6, 7, 8], 2, policy, NUM_LAYERS, boundary)
        return 0 if text is None else len(text.tokens)

    for policy, count in [
        (None, 4),
        (ExitPolicy.always(), 4),
        (ExitPolicy.similarity(0.5, prefill="token"), 4),
        (ExitPolicy.similarity(0.5), 2),
        (ExitPolicy.never(prefill="river"), 2),
        (ExitPolicy.never(prefill="sequence"), 0),
        (ExitPolicy.always(second_look=0.1), 1),
        (ExitPolicy.similarity(0.5, second_look=0.1), 2),
    ]:
        assert kept(policy) == count
    assert kept(None, RopeBoundary(3, keep_changing=False)) == 2

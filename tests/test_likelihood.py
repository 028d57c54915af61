"""Scores of given text: beside single steps, whatever the batch, on both engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from lossless_lm import PROMPTS, RowSpy
from steps import begin

from river_llm import ContextFullError, ExitPolicy, RiverLM
from river_llm.engines import Engine
from river_llm.errors import LogitsError
from river_llm.generate.rows import decode
from river_llm.measure import likelihood
from river_llm.measure.likelihood import (
    Candidate,
    CandidateScore,
    LikelihoodScorer,
    check_likelihoods,
    score_candidates,
)

MIXED = ExitPolicy.similarity(0.65, prefill="sequence")  # by whose prefill rule nothing goes here
POLICIES = {
    "lossless": None,
    "always": ExitPolicy.always(),
    "fixed": ExitPolicy.fixed(2),
    "similarity": MIXED,
    "second look": ExitPolicy.always(second_look=0.99),
    "similarity and second look": replace(MIXED, second_look=0.99),
}
any_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)

QUESTION = tuple(range(10, 22))
ITEMS = [
    [Candidate((*QUESTION, 30, 31), 12), Candidate((*QUESTION, 32, 33, 34, 35), 12)],
    [Candidate((5, 6, 40), 2), Candidate((5, 6, 41), 2), Candidate((5, 6, 42), 2)],
    [Candidate((3, 70), 1), Candidate((3, 71, 8), 1)],
]


@pytest.fixture
def engine(lm: RiverLM) -> Engine:
    return lm.engine


def tokens_before(text: Sequence[int], start: int, end: int) -> Sequence[int]:
    """What runs again with a text's token at `end - 1`: none of the question with the answer."""
    return text[max(end - 8, start if end >= start else 0) : end - 1]


def step_by_step(engine: Engine, policy: ExitPolicy | None, candidate: Candidate) -> CandidateScore:
    """The plain reference: one token after the other."""
    (sequence,) = begin(engine)
    total, layers, is_greedy = 0.0, [], True
    for place, (token, target) in enumerate(pairwise(candidate.token_ids), start=1):
        before = tokens_before(candidate.token_ids, candidate.start, place)
        step = decode(engine, sequence, token, policy, before)
        if place >= candidate.start:
            total += float(step.logits[0].double().log_softmax(-1)[target])
            layers.append(int(step.exit_layers[0]))
            is_greedy &= int(step.best_tokens[0]) == target
    return CandidateScore(total, layers, is_greedy)


def check_equal(found: Sequence[CandidateScore], expected: Sequence[CandidateScore]) -> None:
    assert [score.exit_layers for score in found] == [score.exit_layers for score in expected]
    assert [score.is_greedy for score in found] == [score.is_greedy for score in expected]
    assert [score.log_likelihood for score in found] == pytest.approx(
        [score.log_likelihood for score in expected], abs=2e-4
    )


@any_policy
def test_scores_are_those_of_single_steps_alone_and_in_a_batch(
    engine: Engine, policy: ExitPolicy | None
) -> None:
    expected = [[step_by_step(engine, policy, one) for one in item] for item in ITEMS]
    begin(engine, [])
    together = LikelihoodScorer(engine, policy).score(ITEMS)
    for item, found, steps in zip(ITEMS, together, expected, strict=True):
        check_equal(found, steps)
        (alone,) = LikelihoodScorer(engine, policy).score([item])
        check_equal(alone, steps)
        if engine.name == "cpu":
            assert found == alone  # bit for bit
    depths = {layer for item in together for score in item for layer in score.exit_layers}
    is_mixed = policy is not None and (policy.kind == "similarity" or policy.second_look)
    assert (len(depths) > 1) == bool(is_mixed)


@any_policy
def test_an_answer_is_known_as_the_greedy_one(engine: Engine, policy: ExitPolicy | None) -> None:
    (sequence,) = begin(engine)
    text = list(QUESTION)
    for end in range(1, len(QUESTION) + 5):
        before = tokens_before(text, len(QUESTION), end)
        step = decode(engine, sequence, text[end - 1], policy, before)
        if end >= len(QUESTION):
            text.append(int(step.best_tokens[0]))
    answer = text[len(QUESTION) : -1]
    other = [*answer[:-1], (answer[-1] + 1) % 90]
    item = [Candidate((*QUESTION, *tokens), len(QUESTION)) for tokens in (answer, other)]
    (scores,) = LikelihoodScorer(engine, policy).score([item])
    assert [score.is_greedy for score in scores] == [True, False]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_scores_do_not_depend_on_how_many_rows_a_step_has(
    make_lm: Callable[..., RiverLM], rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_lm().engine
    expected = LikelihoodScorer(engine, MIXED).score(ITEMS)
    monkeypatch.setattr(likelihood, "LOGIT_ROWS", rows)
    monkeypatch.setattr(type(engine), "prefill_rows", rows)
    spy = RowSpy(engine, monkeypatch)
    found = LikelihoodScorer(engine, MIXED).score(ITEMS)
    for one, other in zip(found, expected, strict=True):
        check_equal(one, other)
    assert max(spy.rows) <= max(rows, len(ITEMS))


def test_a_prefix_that_items_share_runs_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = tuple(range(10, 40))
    items = [
        [Candidate((*examples, i, i + 1, 50), 32), Candidate((*examples, i, i + 1, 51), 32)]
        for i in (60, 65, 70)
    ]
    expected = [[step_by_step(engine, MIXED, one) for one in item] for item in items]
    scorer, spy = LikelihoodScorer(engine, MIXED), RowSpy(engine, monkeypatch)
    for item, steps in zip(items, expected, strict=True):
        check_equal(scorer.score([item])[0], steps)
    # the question's first token and twice its second one, which differ
    assert sum(spy.rows) == 30 + 3 * (1 + 2)


def test_scores_do_not_depend_on_what_was_scored_before(engine: Engine) -> None:
    """Second looks at an answer leave its question alone, those at a question its prefix."""
    policy = ExitPolicy.fixed(1, second_look=0.99)  # at some tokens of the tiny model
    questions = [QUESTION, QUESTION[:8], (*QUESTION[:8], 60, 61, 62), (*QUESTION, 63)]
    items = [
        [Candidate((*question, *answer), len(question)) for answer in ([30, 31], [32, 33, 34], [9])]
        for question in questions
    ]
    alone = {
        one: LikelihoodScorer(engine, policy).score([[one]])[0][0] for item in items for one in item
    }
    assert {layer for score in alone.values() for layer in score.exit_layers} == {1, 4}
    for order in (items, items[::-1], [item[::-1] for item in items]):
        scorer = LikelihoodScorer(engine, policy)
        for item in order:
            (found,) = scorer.score([item])
            expected = [alone[one] for one in item]
            check_equal(found, expected)
            if engine.name == "cpu":
                assert found == expected  # bit for bit


def test_every_candidate_has_a_score_at_its_place(engine: Engine) -> None:
    before = engine.add_sequence()
    candidates = [candidate for item in ITEMS for candidate in item]
    found = dict(score_candidates(engine, MIXED, candidates[::-1], batch_size=2))
    assert engine.sequences() == [before]
    expected = LikelihoodScorer(engine, MIXED).score(ITEMS)
    check_equal(
        [found[place] for place in reversed(range(len(candidates)))],
        [score for item in expected for score in item],
    )


def test_a_text_that_does_not_fit_is_refused_and_the_next_one_is_right(engine: Engine) -> None:
    scorer = LikelihoodScorer(engine)
    expected = scorer.score(ITEMS[:1])
    with pytest.raises(ContextFullError):
        scorer.score([[Candidate((5,) * 100, 99), Candidate((5,) * 99 + (6,), 99)]])
    check_equal(scorer.score(ITEMS[:1])[0], expected[0])


def test_scores_leave_answers_as_they_are(lm: RiverLM) -> None:
    expected = lm.generate(PROMPTS[0], raw=True, max_new_tokens=8).tokens
    list(score_candidates(lm.engine, MIXED, ITEMS[0], batch_size=1))
    again = lm.generate(PROMPTS[0], raw=True, max_new_tokens=8, reuse_cache=True)
    assert again.tokens == expected


def test_what_is_no_likelihood_is_refused() -> None:
    logits = torch.zeros(2, 3)
    check_likelihoods(torch.zeros(2), logits)
    with pytest.raises(LogitsError, match="no probability at all"):
        check_likelihoods(torch.tensor([0, -torch.inf]), logits)
    with pytest.raises(LogitsError, match="no numbers"):
        check_likelihoods(torch.tensor([0, torch.nan]), logits, logits + torch.nan)

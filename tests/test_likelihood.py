"""Scores of given text: beside single steps, whatever the batch, on both engines."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lossless_lm import lm_on

from river_llm import ContextFullError, ExitPolicy, RiverError, RiverLM
from river_llm.engines import Engine
from river_llm.measure import likelihood
from river_llm.measure.likelihood import Candidate, CandidateScore, LikelihoodScorer

POLICIES = {
    "never": ExitPolicy.never(),
    "always": ExitPolicy.always(),
    "fixed": ExitPolicy.fixed(2),
    "similarity": ExitPolicy.similarity(0.65),
}
any_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)

QUESTION = tuple(range(10, 22))
ITEMS = [
    [Candidate((*QUESTION, 30, 31), 12), Candidate((*QUESTION, 32, 33, 34, 35), 12)],
    [Candidate((5, 6, 40), 2), Candidate((5, 6, 41), 2), Candidate((5, 6, 42), 2)],
    [Candidate((7, 50, 51, 52, 8, 9), 4), Candidate((7, 60, 51, 52, 8, 9), 4)],
    [Candidate((3, 70), 1), Candidate((4, 70), 1)],
]


def engine_with(make_lm: Callable[..., RiverLM], policy: ExitPolicy) -> Engine:
    lm = make_lm()
    lm.policy = policy
    return lm.engine


def step_by_step(engine: Engine, candidate: Candidate) -> CandidateScore:
    """The plain reference: one token after the other."""
    engine.truncate(0)
    total, layers, is_greedy = 0.0, [], True
    for place, (token, target) in enumerate(pairwise(candidate.token_ids), start=1):
        step = engine.decode(torch.tensor([token]))
        if place >= candidate.start:
            total += float(step.logits[0].double().log_softmax(-1)[target])
            layers.append(int(step.exit_layers[0]))
            is_greedy &= int(step.best_tokens[0]) == target
    return CandidateScore(total, layers, is_greedy)


def assert_equal(found: Sequence[CandidateScore], expected: Sequence[CandidateScore]) -> None:
    assert [score.exit_layers for score in found] == [score.exit_layers for score in expected]
    assert [score.is_greedy for score in found] == [score.is_greedy for score in expected]
    assert [score.log_likelihood for score in found] == pytest.approx(
        [score.log_likelihood for score in expected], abs=2e-4
    )


class TestScores:
    @any_policy
    @pytest.mark.parametrize("item", ITEMS)
    def test_are_those_of_single_steps(
        self, make_lm: Callable[..., RiverLM], policy: ExitPolicy, item: list[Candidate]
    ) -> None:
        engine = engine_with(make_lm, policy)
        (found,) = LikelihoodScorer(engine).score([item])
        assert_equal(found, [step_by_step(engine, candidate) for candidate in item])

    @any_policy
    def test_say_whether_greedy_decoding_gives_the_answer(
        self, make_lm: Callable[..., RiverLM], policy: ExitPolicy
    ) -> None:
        engine = engine_with(make_lm, policy)
        engine.truncate(0)
        for token in QUESTION:
            step = engine.decode(torch.tensor([token]))
        answer = []
        for _ in range(4):
            answer.append(int(step.best_tokens[0]))
            step = engine.decode(step.best_tokens)
        other = [*answer[:-1], (answer[-1] + 1) % 90]
        item = [Candidate((*QUESTION, *tokens), len(QUESTION)) for tokens in (answer, other)]
        (scores,) = LikelihoodScorer(engine).score([item])
        assert [score.is_greedy for score in scores] == [True, False]

    @any_policy
    def test_of_a_batch_are_those_of_single_items(
        self, make_lm: Callable[..., RiverLM], policy: ExitPolicy
    ) -> None:
        engine = engine_with(make_lm, policy)
        together = LikelihoodScorer(engine).score(ITEMS)
        for item, found in zip(ITEMS, together, strict=True):
            (alone,) = LikelihoodScorer(engine).score([item])
            assert_equal(found, alone)
            if engine.name == "cpu":
                assert found == alone  # bit for bit

    @pytest.mark.parametrize("rows", [1, 3, 8])
    def test_do_not_depend_on_the_logits_held_at_a_time(
        self, make_lm: Callable[..., RiverLM], rows: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = engine_with(make_lm, ExitPolicy.similarity(0.65))
        expected = LikelihoodScorer(engine).score(ITEMS)
        monkeypatch.setattr(likelihood, "_LOGIT_ROWS", rows)
        for found, score in zip(LikelihoodScorer(engine).score(ITEMS), expected, strict=True):
            assert_equal(found, score)

    def test_a_beginning_that_items_share_runs_once(self, make_lm: Callable[..., RiverLM]) -> None:
        engine = engine_with(make_lm, ExitPolicy.similarity(0.65))
        examples = tuple(range(10, 40))
        items = [
            [Candidate((*examples, i, i + 1, 50), 32), Candidate((*examples, i, i + 1, 51), 32)]
            for i in (60, 65, 70)
        ]
        expected = [LikelihoodScorer(engine).score([item])[0] for item in items]
        scorer = LikelihoodScorer(engine)
        found = scorer.score(items)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
        # the question's first token and twice its second one, which differ
        assert scorer.tokens_run == 30 + 3 * (1 + 2)

    def test_tokens_of_these_items_leave_at_different_layers(self, lm: RiverLM) -> None:
        lm.policy = POLICIES["similarity"]
        scores = [score for item in LikelihoodScorer(lm.engine).score(ITEMS) for score in item]
        assert len({layer for score in scores for layer in score.exit_layers}) > 1

    def test_the_policy_is_what_it_was(self, lm: RiverLM) -> None:
        policy = ExitPolicy.similarity(0.5, prefill="sequence")
        lm.policy = policy
        LikelihoodScorer(lm.engine).score(ITEMS[:1])
        assert lm.policy == policy

    def test_a_text_that_does_not_fit_is_refused_and_the_next_one_is_right(
        self, lm: RiverLM
    ) -> None:
        scorer = LikelihoodScorer(lm.engine)
        expected = scorer.score(ITEMS[:1])
        with pytest.raises(ContextFullError):
            scorer.score([[Candidate((5,) * 100, 99), Candidate((5,) * 99 + (6,), 99)]])
        for found, score in zip(scorer.score(ITEMS[:1]), expected, strict=True):
            assert_equal(found, score)

    @pytest.mark.parametrize(("tokens", "start"), [((1, 2), 0), ((1, 2), 2), ((1,), 1)])
    def test_a_candidate_without_a_question_or_an_answer_is_refused(
        self, tokens: tuple[int, ...], start: int
    ) -> None:
        with pytest.raises(ValueError, match="count"):
            Candidate(tokens, start)


ENGINES = {kind: lm_on(kind).engine for kind in ("torch", "cpu")}


class TestScoreVerb:
    @settings(max_examples=15)
    @given(data=st.data(), kind=st.sampled_from(sorted(ENGINES)))
    def test_gives_what_decoding_gives(self, data: st.DataObject, kind: str) -> None:
        engine = ENGINES[kind]
        engine.policy = data.draw(st.sampled_from(list(POLICIES.values())))
        batch = data.draw(st.integers(1, 3))
        tokens = torch.tensor(
            [data.draw(st.lists(st.integers(1, 90), min_size=9, max_size=9)) for _ in range(batch)]
        )
        counts = [data.draw(st.integers(0, 5)) for _ in range(batch)]
        counts[0] = max(1, counts[0])
        engine.truncate(0)
        engine.prefill(tokens[:, :4])
        step = engine.score(tokens[:, 4:], counts)
        after = engine.decode(tokens[:, 0]).logits
        for row, count in enumerate(counts):
            engine.truncate(0)
            engine.prefill(tokens[row : row + 1, :4])
            for place in range(count):
                single = engine.decode(tokens[row : row + 1, 4 + place])
                assert int(single.exit_layers[0]) == int(step.exit_layers[row, place])
            alone = engine.decode(tokens[row : row + 1, 0]).logits
            assert torch.allclose(alone[0].float(), after[row].float(), atol=2e-4)

    @pytest.mark.parametrize("kind", sorted(ENGINES))
    def test_together_all_leave_by_the_smallest_similarity(self, kind: str) -> None:
        engine = ENGINES[kind]
        tokens = torch.arange(1, 19).view(3, 6)
        engine.policy = ExitPolicy.similarity(0.65, batch="minimum", prefill="token")
        engine.truncate(0)
        exits = [engine.prefill(tokens[:, :1]).exit_layers]
        exits += [engine.decode(tokens[:, place]).exit_layers for place in range(1, 6)]
        engine.truncate(0)
        found = engine.score(tokens).exit_layers
        assert torch.equal(found, torch.stack(exits, dim=1))
        assert all(len(set(column.tolist())) == 1 for column in found.T)

    @pytest.mark.parametrize("kind", sorted(ENGINES))
    def test_verify_is_the_score_of_a_policy_that_never_leaves(self, kind: str) -> None:
        engine = ENGINES[kind]
        tokens = torch.arange(1, 13).view(2, 6)
        engine.policy = ExitPolicy.similarity(0.5)
        engine.truncate(0)
        verified = engine.verify(tokens).logits
        engine.policy = ExitPolicy.never()
        engine.truncate(0)
        assert torch.equal(engine.score(tokens).logits, verified)

    def test_refuses_nothing_to_score(self) -> None:
        engine = ENGINES["cpu"]
        engine.truncate(0)
        with pytest.raises(RiverError, match="nothing to verify or score"):
            engine.score(torch.tensor([[1, 2]]), [0])

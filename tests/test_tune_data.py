"""What settings are tuned on: where it comes from, and what a setting loses there."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from lossless_lm import PROMPTS, lm_on
from steps import begin

from river_llm import ExitPolicy, RiverLM
from river_llm.errors import DataError
from river_llm.generate.rows import decode, prefill
from river_llm.measure import tune_data
from river_llm.measure.tune_data import (
    Example,
    Prompts,
    SequenceLoss,
    Setting,
    Texts,
    check_count,
    given_texts,
    split_places,
    written_texts,
)

MIXED = ExitPolicy.similarity(0.65)
LOOK = ExitPolicy.fixed(0, second_look=0.4)
TEXTS = [list(range(10, 40)), [5, 6, 7, 8], [90, 3, 4, 3, 4, 3, 4]]


@pytest.fixture(params=["torch", "cpu"])
def lm(request: pytest.FixtureRequest) -> RiverLM:
    return lm_on(request.param)


def nothing(*progress: object) -> None:
    """Progress that nobody looks at."""


def step_by_step(lm: RiverLM, example: Example, policy: ExitPolicy) -> SequenceLoss:
    """The plain reference: one token after the other, by both."""
    (of_policy, of_backbone) = begin(lm.engine, [0, 0])
    tokens, klds, others, layers = example.tokens, [], [], []
    for place in range(max(0, example.prompt - 1), len(tokens) - 1):
        if place == example.prompt - 1:
            prompt = tokens[: place + 1]
            mine = prefill(lm.engine, of_policy, prompt, policy)
            p, best = mine.logits[-1].double().log_softmax(-1).clone(), int(mine.best_tokens[-1])
            layers.append(int(mine.exit_layers[-1]))
            theirs = prefill(lm.engine, of_backbone, prompt, None)
        else:
            before = tokens[max(example.prompt, place - 7) : place]
            mine = decode(lm.engine, of_policy, tokens[place], policy, before)
            p, best = mine.logits[-1].double().log_softmax(-1).clone(), int(mine.best_tokens[-1])
            layers.append(int(mine.exit_layers[-1]))
            theirs = decode(lm.engine, of_backbone, tokens[place], None)
        q = theirs.logits[-1].double().log_softmax(-1)
        klds.append(float((q.exp() * (q - p)).sum()))
        others.append(best != int(theirs.best_tokens[-1]))
    begin(lm.engine, [])
    count = len(klds)
    return SequenceLoss(sum(klds) / count, sum(others) / count, sum(layers) / count)


def check_equal(found: Sequence[SequenceLoss], expected: Sequence[SequenceLoss]) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.kld == pytest.approx(other.kld, rel=1e-3, abs=1e-5)
        assert one.disagreement == pytest.approx(other.disagreement)
        assert one.exit_layer == pytest.approx(other.exit_layer)


def test_losses_of_texts_are_those_of_single_steps(lm: RiverLM) -> None:
    policies = [ExitPolicy.fixed(0), ExitPolicy.fixed(2), MIXED, LOOK]
    settings = [Setting("river", lm, policy) for policy in policies]
    done: list[tuple[int, int]] = []
    found = Texts("texts", TEXTS, 30).losses(lm, settings, [2, 0], lambda *x: done.append(x))
    assert done == [(2, 8), (4, 8), (6, 8), (8, 8)]
    for of_setting, policy in zip(found, policies, strict=True):
        expected = [step_by_step(lm, Example(tuple(TEXTS[i])), policy) for i in (2, 0)]
        check_equal(of_setting, expected)
        assert all(loss.kld > 0 for loss in of_setting)
    assert not lm.engine.sequences()


@pytest.mark.parametrize(("texts_of_logits", "counts"), [(2, [2, 3]), (0, [1, 2, 3])])
def test_fewer_texts_are_scored_together_where_their_logits_are_many(
    lm: RiverLM, texts_of_logits: int, counts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, texts = [Setting("river", lm, MIXED)], Texts("texts", TEXTS, 30)
    (together,) = texts.losses(lm, settings, [2, 0, 1], nothing)
    most = texts_of_logits * texts.tokens * lm.engine.vocab_size
    monkeypatch.setattr(tune_data, "_LOGITS", most)
    done: list[int] = []
    (found,) = texts.losses(lm, settings, [2, 0, 1], lambda some, _: done.append(some))
    assert done == counts
    check_equal(found, together)


def test_losses_of_prompts_are_those_of_each_settings_own_answers(lm: RiverLM) -> None:
    encoded = [lm.tokenizer(prompt).input_ids for prompt in PROMPTS]
    data = Prompts("answers", encoded, tokens=6)
    policies = [ExitPolicy.fixed(0), ExitPolicy.fixed(3), LOOK]
    settings = [Setting("river", lm, policy) for policy in policies]
    found = data.losses(lm, settings, [3, 0], nothing)
    for of_setting, policy in zip(found, policies, strict=True):
        expected = []
        for i in (3, 0):
            (own,) = lm.generate_batch([PROMPTS[i]], raw=True, policy=policy, max_new_tokens=6)
            example = Example((*encoded[i], *own.tokens), len(encoded[i]))
            expected.append(step_by_step(lm, example, policy))
        check_equal(of_setting, expected)
        assert all(loss.disagreement <= 5 / 6 for loss in of_setting)  # the prompt's is exact


def test_the_backbone_loses_nothing_and_answers_are_its_own(lm: RiverLM) -> None:
    encoded = [lm.tokenizer(prompt).input_ids for prompt in PROMPTS]
    data = Prompts("answers", encoded, tokens=6)
    (found,) = data.losses(lm, [Setting("river", lm, ExitPolicy.never())], [1, 2], nothing)
    assert [(loss.kld, loss.disagreement) for loss in found] == [(0, 0)] * 2
    (example,) = data.examples(lm, [2])
    answer = lm.generate(PROMPTS[2], raw=True, policy=ExitPolicy.never(), max_new_tokens=6).tokens
    assert example == Example((*encoded[2], *answer), len(encoded[2]))


def test_the_model_writes_other_texts_by_another_seed_alone(lm: RiverLM) -> None:
    done: list[tuple[str, int, int]] = []
    texts = written_texts(lm, 40, 12, 0, lambda *x: done.append(x))
    assert (len(texts), texts.tokens) == (40, 12)
    examples = texts.examples(lm, range(40))
    assert {len(example.tokens) for example in examples} == {12}
    assert len({example.tokens for example in examples}) > 30
    assert [one[1] for one in done] == sorted(one[1] for one in done)
    assert done[-1][1] <= done[-1][2] == 40 * 12
    assert not lm.engine.sequences()
    assert written_texts(lm, 40, 12, 0, nothing).digest == texts.digest
    assert written_texts(lm, 40, 12, 1, nothing).digest != texts.digest


def test_texts_are_written_by_the_backbones_distribution() -> None:
    """Each token of a text is among those that its own prefix makes likely."""
    lm = lm_on("cpu")
    total = 0.0
    for example in written_texts(lm, 30, 20, 0, nothing).examples(lm, range(30)):
        (sequence,) = begin(lm.engine, [0])
        for token, following in zip(example.tokens, example.tokens[1:], strict=False):
            logits = decode(lm.engine, sequence, token, None).logits[0].double()
            p = logits.log_softmax(-1)
            total += float(p[following] - (p.exp() * p).sum()) / (30 * 19)
    # the mean surprise is the entropy; its standard deviation here is below 0.05
    assert abs(total) < 0.2


def test_windows_come_from_all_over_a_text(lm: RiverLM) -> None:
    text = "".join(chr(ord("!") + i % 90) for i in range(600))
    token_ids = lm.tokenizer(text).input_ids
    whole = given_texts(lm.tokenizer, "text", text, 100, 20)
    assert [list(e.tokens) for e in whole.examples(lm, range(len(whole)))] == [
        token_ids[i : i + 20] for i in range(0, 600, 20)
    ]
    some = given_texts(lm.tokenizer, "text", text, 3, 20)
    assert [e.tokens for e in some.examples(lm, range(3))] == [
        e.tokens for e in whole.examples(lm, [0, 10, 20])
    ]
    assert len(given_texts(lm.tokenizer, "text", "abc", 3, 20)) == 0


def test_a_split_has_every_sequence_once() -> None:
    parts = split_places(26, seed=3)
    assert [len(part) for part in parts] == [6, 14, 6]
    assert sorted(place for part in parts for place in part) == list(range(26))
    assert parts == split_places(26, seed=3)
    assert parts != split_places(26, seed=4)


def test_too_few_sequences_say_how_many_are_needed() -> None:
    check_count("notes.txt", 22, 64, 11)
    message = (
        r"notes\.txt: 21 sequences of 64 tokens; .* needs 22, half of them to certify, 1408 tokens"
    )
    with pytest.raises(DataError, match=message):
        check_count("notes.txt", 21, 64, 11)


def test_a_digest_tells_tokens_apart() -> None:
    assert Texts("a", [[1, 2], [3]], 2).digest != Texts("a", [[1], [2, 3]], 2).digest
    assert Texts("a", [[1, 2]], 2).digest == Texts("b", [[1, 2]], 2).digest

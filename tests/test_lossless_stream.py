"""Lossless mode as it goes: what a stream gives and counts, Ctrl-C, and the turns of a chat."""

from __future__ import annotations

import itertools
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from lossless_lm import (
    MIXED,
    NUM_LAYERS,
    PERFECT,
    PROMPTS,
    RANDOM,
    any_drafts,
    backbone,
    check_answer,
    check_statistics,
    lossless,
    lossless_after,
    lossless_batch,
    lossless_stream,
    reply,
    statistics_of,
    subject_with,
)
from test_cpu_engine_interrupts import Interrupting
from tiny_lm import interrupt_once
from torch import Tensor

from river_llm import (
    Conversation,
    DraftConfig,
    ExitPolicy,
    GenerationResponse,
    GenerationResult,
    RiverError,
    RiverLM,
)
from river_llm.engines import CpuEngine, Engine, StepResult
from river_llm.text.prompt import Message, encode_prompt


class TestStream:
    @pytest.mark.parametrize("sampling", [{}, RANDOM], ids=str)
    @any_drafts
    def test_gives_the_tokens_of_the_result(
        self, lm: RiverLM, drafts: DraftConfig, sampling: dict[str, Any]
    ) -> None:
        responses = list(lossless_stream(lm, PROMPTS[2], drafts, max_new_tokens=30, **sampling))
        check_answer(
            GenerationResult.of(lm.engine, responses, len(PROMPTS[2]), "lossless"),
            backbone(lm, PROMPTS[2], max_new_tokens=30, **sampling),
        )
        assert [response.generated_tokens for response in responses] == list(range(1, 31))
        assert {response.exit_layer for response in responses} == {NUM_LAYERS}
        assert [response.finish_reason for response in responses] == [None] * 29 + ["length"]

    @any_drafts
    def test_counts_what_it_gives(self, lm: RiverLM, drafts: DraftConfig) -> None:
        responses = list(lossless_stream(lm, PROMPTS[2], drafts, max_new_tokens=40))
        first, *others = responses
        assert first.origin == "backbone"
        assert first.lossless is not None
        assert first.lossless.verifications == first.lossless.drafted_tokens == 0
        assert first.lossless.tokens_per_verification is first.lossless.draft_share is None
        # a round is one verification: drafted tokens that were accepted, then the backbone's
        accepted = 0
        for number, group in itertools.groupby(others, key=_verifications):
            in_round = list(group)
            assert number >= 1
            assert in_round[-1].origin == "backbone"
            assert {response.origin for response in in_round[:-1]} in (set(), {"river"}, {"ngram"})
            accepted += len(in_round) - 1
            for response in in_round:
                assert response.lossless == in_round[0].lossless
                assert response.lossless is not None
                assert response.lossless.accepted_tokens == accepted
        _check_origins(responses)
        assert others[-1].origin == "backbone"

    def test_gives_no_token_before_it_is_verified(
        self, lm: RiverLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        passes: list[list[int]] = []
        verify = lm.engine.verify

        def spy(token_ids: Tensor, counts: Sequence[int] | None = None) -> StepResult:
            passes.append(token_ids[0].tolist())
            return verify(token_ids, counts)

        monkeypatch.setattr(lm.engine, "verify", spy)
        for number, response in enumerate(
            lossless_stream(lm, PROMPTS[0], PERFECT, max_new_tokens=13)
        ):
            assert len(passes) == -(-number // 6)
            if number % 6:  # a drafted token: the pass before held it
                assert response.token == passes[-1][number % 6]


class TestStatistics:
    @pytest.mark.parametrize("ngram", [True, False], ids=["ngrams", "river"])
    @pytest.mark.parametrize("tokens", [None, 1, 4])
    @pytest.mark.parametrize("prompt", PROMPTS)
    def test_add_up(self, lm: RiverLM, prompt: str, tokens: int | None, ngram: bool) -> None:
        result = lossless(lm, prompt, DraftConfig(tokens, 0, ngram=ngram), max_new_tokens=40)
        check_statistics(result)
        statistics = statistics_of(result)
        if not ngram:
            assert statistics.ngram_tokens == 0
        if tokens is not None:
            assert len(statistics.acceptance_by_position) <= tokens

    def test_are_missing_in_river_mode(self, lm: RiverLM) -> None:
        responses = list(lm.stream(PROMPTS[0], max_new_tokens=4))
        assert {(response.origin, response.lossless) for response in responses} == {
            ("backbone", None)
        }
        result = lm.generate(PROMPTS[0], max_new_tokens=4)
        assert (result.mode, result.lossless) == ("river", None)
        assert result.policy == MIXED.to_dict()

    def test_of_one_token_have_no_verification(self, lm: RiverLM) -> None:
        statistics = statistics_of(lossless(lm, PROMPTS[0], None, max_new_tokens=1))
        assert (statistics.verifications, statistics.drafted_tokens) == (0, 0)
        assert statistics.tokens_per_verification is None
        assert statistics.draft_share is None
        assert statistics.acceptance_by_position == ()


class TestStatisticsOfAnswersThatStop:
    """Tokens behind the stop are not the answer's, and don't count."""

    STARTS = (1, 2, 3, 5, 6, 9, 12)

    @pytest.mark.parametrize("sampling", [{}, RANDOM], ids=str)
    @pytest.mark.parametrize("kind", ["token", "string", "long string"])
    @any_drafts
    def test_add_up(
        self, lm: RiverLM, drafts: DraftConfig, kind: str, sampling: dict[str, Any]
    ) -> None:
        whole = backbone(lm, PROMPTS[2], max_new_tokens=24, **sampling)
        for start in self.STARTS:
            settings = {"max_new_tokens": 24, **sampling}
            if kind == "token":
                lm.stop_tokens = frozenset({whole.tokens[start]})
            else:
                settings["stop"] = whole.text[start : start + (1 if kind == "string" else 4)]
            responses = list(lossless_stream(lm, PROMPTS[2], drafts, **settings))
            assert responses[-1].finish_reason == "stop"
            _check_origins(responses)
            result = GenerationResult.of(lm.engine, responses, len(PROMPTS[2]), "lossless")
            check_statistics(result)

    @pytest.mark.parametrize("kind", ["tokens", "strings"])
    @any_drafts
    def test_of_rows_add_up(self, lm: RiverLM, drafts: DraftConfig, kind: str) -> None:
        whole = lossless_batch(lm, PROMPTS, drafts, max_new_tokens=24, **RANDOM)
        settings: dict[str, Any] = {"max_new_tokens": 24, **RANDOM}
        for shift in range(3):
            if kind == "tokens":
                lm.stop_tokens = frozenset(row.tokens[6 * i + shift] for i, row in enumerate(whole))
            else:
                settings["stop"] = tuple(
                    row.text[5 * i + shift : 5 * i + shift + 2] for i, row in enumerate(whole)
                )
            rows = lossless_batch(lm, PROMPTS, drafts, **settings)
            assert "stop" in {row.finish_reason for row in rows}
            for row in rows:
                check_statistics(row)

    def test_of_a_stop_within_a_round_are_those_of_the_tokens_before(self, lm: RiverLM) -> None:
        """A round of five drafted tokens, all the backbone's, and one more."""
        text = backbone(lm, PROMPTS[0], max_new_tokens=14, **RANDOM).text
        for place in range(1, 14):
            result = lossless(lm, PROMPTS[0], PERFECT, stop=text[: place + 1], **RANDOM)
            assert len(result.tokens) == place + 1
            rounds, in_round = -(-place // 6), (place - 1) % 6 + 1
            statistics = statistics_of(result)
            assert statistics.verifications == rounds
            last = min(in_round, 5)
            assert statistics.accepted_tokens == 5 * (rounds - 1) + last
            assert statistics.drafted_tokens == statistics.accepted_tokens
            assert len(statistics.acceptance_by_position) == (5 if rounds > 1 else last)


class TestInterruption:
    @pytest.mark.parametrize("given", [1, 2, 4, 6, 7, 9])
    @any_drafts
    def test_of_a_stream_leaves_the_model_usable(
        self, lm: RiverLM, drafts: DraftConfig, given: int, prefilled: list[int]
    ) -> None:
        expected = backbone(lm, PROMPTS[0], max_new_tokens=20)
        token_ids = lm.tokenizer(PROMPTS[0]).input_ids
        stream = lossless_stream(lm, PROMPTS[0], drafts, max_new_tokens=20)
        tokens = [next(stream).token for _ in range(given)]
        stream.close()  # type: ignore[attr-defined]
        assert tokens == expected.tokens[:given]
        text = [*token_ids, *tokens, 5]
        reused = lossless_after(lm, text, reuse_cache=True)
        assert prefilled[-1] <= 2
        assert reused == lossless_after(lm, text, reuse_cache=False)
        check_answer(lossless(lm, PROMPTS[0], drafts, max_new_tokens=20), expected)

    @pytest.mark.parametrize("when", ["before", "after"])
    @pytest.mark.parametrize("round_number", [0, 2])
    @pytest.mark.parametrize("verb", ["draft", "verify", "rewind"])
    @pytest.mark.parametrize("sampling", [{}, {"temperature": 5.0, "seed": 16}], ids=str)
    def test_around_a_verb_leaves_the_model_usable(
        self,
        lm: RiverLM,
        verb: str,
        when: str,
        round_number: int,
        sampling: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        drafts = DraftConfig(4, 0, ngram=False)  # some token of every draft is rejected
        settings = {"max_new_tokens": 20, **sampling}
        expected = backbone(lm, PROMPTS[3], **settings)
        with monkeypatch.context() as patched:
            _interrupt_around(lm.engine, verb, when, round_number, patched)
            tokens = _given_until_interrupted(lossless_stream(lm, PROMPTS[3], drafts, **settings))
        assert tokens == expected.tokens[: len(tokens)]
        assert len(tokens) >= 1 + round_number
        text = [*lm.tokenizer(PROMPTS[3]).input_ids, *tokens, 5]
        reused = lossless_after(lm, text, reuse_cache=True)
        assert reused == lossless_after(lm, text, reuse_cache=False)
        check_answer(lossless(lm, PROMPTS[3], drafts, **settings), expected)

    @pytest.mark.parametrize("sampling", [{}, RANDOM], ids=str)
    @pytest.mark.parametrize("passes", [1, 3, 5, 6, 9, 12])
    def test_within_a_pass_leaves_the_model_usable(
        self, lm: RiverLM, passes: int, sampling: dict[str, Any]
    ) -> None:
        """Of a round of five drafted tokens and a verification."""
        settings = {"max_new_tokens": 20, **sampling}
        expected = backbone(lm, PROMPTS[0], **settings)
        engine = lm.engine
        if isinstance(engine, CpuEngine):
            core, engine._core = engine._core, InterruptingDrafts(engine._core, 1 + passes)
        else:
            interrupt_once(engine.model, passes)
        tokens = _given_until_interrupted(lossless_stream(lm, PROMPTS[0], PERFECT, **settings))
        if isinstance(engine, CpuEngine):
            engine._core = core
        assert tokens == expected.tokens[: len(tokens)]
        assert len(tokens) in (1, 7, 13)
        text = [*lm.tokenizer(PROMPTS[0]).input_ids, *tokens, 5]
        reused = lossless_after(lm, text, reuse_cache=True)
        assert reused == lossless_after(lm, text, reuse_cache=False)
        check_answer(lossless(lm, PROMPTS[0], PERFECT, **settings), expected)

    def test_by_another_answer_ends_a_stream_with_an_error(self, lm: RiverLM) -> None:
        expected = backbone(lm, PROMPTS[1])
        stream = lossless_stream(lm, PROMPTS[0], PERFECT)
        for _ in range(3):
            next(stream)
        check_answer(lossless(lm, PROMPTS[1], PERFECT), expected)
        with pytest.raises(RiverError, match="another answer was begun"):
            next(stream)
        check_answer(lossless(lm, PROMPTS[1], PERFECT), expected)


class TestConversation:
    QUESTIONS = ("Who are you?", "And then?", "Why so?")
    SETTINGS: dict[str, Any] = {"max_new_tokens": 12, **RANDOM}  # noqa: RUF012

    @pytest.fixture
    def lm(self, make_lm: Callable[..., RiverLM]) -> RiverLM:
        """Room for a few turns."""
        return make_lm(subject_with(256))

    @any_drafts
    def test_turns_answer_as_the_whole_chat_at_once_would(
        self, lm: RiverLM, drafts: DraftConfig
    ) -> None:
        lm.stop_tokens = frozenset({50, 51})
        conversation = Conversation(lm, mode="lossless", drafts=drafts, **self.SETTINGS)
        answers = [reply(conversation, question) for question in self.QUESTIONS]
        assert len(set(answers)) == 3
        lm.policy = ExitPolicy.never()
        messages: list[Message] = []
        for question, answer in zip(self.QUESTIONS, answers, strict=True):
            messages.append({"role": "user", "content": question})
            assert lm.chat(messages, **self.SETTINGS).text == answer
            messages.append({"role": "assistant", "content": answer})
        assert conversation.messages == messages

    @any_drafts
    def test_a_turn_runs_only_what_is_new(
        self, lm: RiverLM, drafts: DraftConfig, prefilled: list[int]
    ) -> None:
        conversation = Conversation(lm, mode="lossless", drafts=drafts, **self.SETTINGS)
        for question in self.QUESTIONS:
            reply(conversation, question)
        first = len(encode_prompt(lm.tokenizer, self.QUESTIONS[0]))
        # The last token of an answer is chosen but not run: it is prefilled with the next question.
        others = [1 + len(f"\nu:{question}\na:") for question in self.QUESTIONS[1:]]
        assert prefilled == [first, *others]

    def test_keeps_nothing_that_exits_have_written(self, lm: RiverLM, prefilled: list[int]) -> None:
        lm.policy = ExitPolicy.always()
        conversation = Conversation(lm, **self.SETTINGS)
        reply(conversation, self.QUESTIONS[0])
        conversation.mode = "lossless"
        messages = [*conversation.messages, {"role": "user", "content": self.QUESTIONS[1]}]
        answer = reply(conversation, self.QUESTIONS[1])
        assert prefilled[1] == len(encode_prompt(lm.tokenizer, messages))
        lm.policy = ExitPolicy.never()
        assert lm.chat(messages, **self.SETTINGS).text == answer

    def test_river_mode_goes_on_with_what_the_backbone_wrote(
        self, lm: RiverLM, prefilled: list[int]
    ) -> None:
        conversation = Conversation(lm, mode="lossless", **self.SETTINGS)
        reply(conversation, self.QUESTIONS[0])
        conversation.mode = "river"
        reply(conversation, self.QUESTIONS[1])
        assert prefilled[1] == 1 + len(f"\nu:{self.QUESTIONS[1]}\na:")
        # of that turn the backbone read the question, and exits wrote the answer: it isn't kept
        conversation.mode = "lossless"
        kept = len(encode_prompt(lm.tokenizer, conversation.messages[:-1]))
        messages = [*conversation.messages, {"role": "user", "content": self.QUESTIONS[2]}]
        answer = reply(conversation, self.QUESTIONS[2])
        assert prefilled[2] == len(encode_prompt(lm.tokenizer, messages)) - kept
        lm.policy = ExitPolicy.never()
        assert lm.chat(messages, **self.SETTINGS).text == answer

    def test_cut_short_goes_on_as_the_chat_so_far_would(self, lm: RiverLM) -> None:
        for given in (1, 3, 7, 9):
            conversation = Conversation(lm, mode="lossless", drafts=PERFECT, **self.SETTINGS)
            stream = conversation.stream(self.QUESTIONS[0])
            text = "".join(next(stream).text for _ in range(given))
            stream.close()  # type: ignore[attr-defined]
            assert conversation.messages[1:] == [{"role": "assistant", "content": text}]
            messages = [*conversation.messages, {"role": "user", "content": self.QUESTIONS[1]}]
            answer = reply(conversation, self.QUESTIONS[1])
            lm.policy = ExitPolicy.never()
            assert lm.chat(messages, **self.SETTINGS).text == answer


class InterruptingDrafts(Interrupting):
    """A draft counts as one pass for each of its tokens."""

    def draft(self, *args: Any) -> Any:
        drafted = self._core.draft(*args)
        passes = sum(map(len, drafted[0]))
        if 0 < self._passes <= passes:
            signal.raise_signal(signal.SIGINT)
        self._passes -= passes
        return drafted


def _interrupt_around(
    engine: Engine, verb: str, when: str, calls: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Raise KeyboardInterrupt before or after a verb of the engine, after so many whole calls."""
    whole = getattr(engine, verb)
    countdown = iter(range(calls, -1, -1))

    def interrupted(*args: Any) -> Any:
        is_now = next(countdown) == 0
        if is_now and when == "before":
            raise KeyboardInterrupt
        result = whole(*args)
        if is_now:
            raise KeyboardInterrupt
        return result

    monkeypatch.setattr(engine, verb, interrupted)


def _given_until_interrupted(stream: Iterator[GenerationResponse]) -> list[int]:
    """The tokens that came before Ctrl-C."""
    tokens: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        tokens.extend(response.token for response in stream)
    return tokens


def _check_origins(responses: list[GenerationResponse]) -> None:
    """See that the statistics count what each token came from."""
    statistics = statistics_of(responses[-1])
    origins = [response.origin for response in responses[1:]]
    assert origins.count("ngram") == statistics.ngram_tokens
    assert origins.count("ngram") + origins.count("river") == statistics.accepted_tokens
    ended_within = bool(origins) and origins[-1] != "backbone"
    assert origins.count("backbone") == statistics.verifications - ended_within


def _verifications(response: GenerationResponse) -> int:
    assert response.lossless is not None
    return response.lossless.verifications

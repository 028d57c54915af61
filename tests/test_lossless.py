"""Lossless mode on a tiny model, both engines: the answer is the backbone's, whatever drafts."""

from __future__ import annotations

import itertools
import json
import math
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from native_engines import Subject
from test_cpu_engine_interrupts import Interrupting
from tiny_lm import character_tokenizer, interrupt_once, sharpened
from torch import Tensor

from river_llm import (
    ConfigError,
    Conversation,
    DraftConfig,
    ExitPolicy,
    GenerationResponse,
    GenerationResult,
    River,
    RiverError,
    RiverLM,
)
from river_llm.engines import CpuEngine, Draft, Engine, StepResult
from river_llm.lossless.draft_control import MOST_DRAFTED
from river_llm.quantization import QuantizedMatrix
from river_llm.sampling import SamplingConfig
from river_llm.text import Message, encode_prompt

CONTEXT = 64
NUM_LAYERS = 4
PROMPTS = ["Hello, river", "y", "abcabcabcab", "Who are you? Hm"]
MIXED = ExitPolicy.similarity(0.9)  # what lossless mode must not follow
RANDOM: dict[str, Any] = {"temperature": 1.0, "seed": 5}
SAMPLING: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 3.0},
    {"temperature": 2.0, "top_k": 4},
    {"temperature": 2.0, "top_p": 0.85},
    {"temperature": 2.0, "min_p": 0.1},
    {"temperature": 2.0, "repetition_penalty": 1.5},
    {"temperature": 2.5, "top_k": 20, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 0.8},
    {"temperature": 1.0, "top_k": 1},
]
# Drafts of the backbone itself: all are accepted.
PERFECT = DraftConfig(tokens=5, exit_layer=NUM_LAYERS, lm_head_bits=16, ngram=False)
POOR = DraftConfig(tokens=3, exit_layer=0)
DRAFTS = [DraftConfig(), POOR, PERFECT]
SAME = ("tokens", "text", "exit_layers", "finish_reason", "prompt_tokens", "policy", "num_layers")

any_drafts = pytest.mark.parametrize("drafts", DRAFTS, ids=["adaptive", "poor", "perfect"])


@cache
def subject_with(context_length: int) -> Subject:
    subject = Subject("Llama", {"max_position_embeddings": context_length})
    sharpened(subject.model)
    return subject


@pytest.fixture(params=["torch", "cpu"])
def make_lm(request: pytest.FixtureRequest) -> Callable[..., RiverLM]:
    """Makes a model on one of the engines, with an empty cache and nothing learnt."""

    def make(subject: Subject | None = None, river_directory: Path | None = None) -> RiverLM:
        subject = subject or subject_with(CONTEXT)
        engine = subject.reference(MIXED) if request.param == "torch" else subject.engine(MIXED)
        tokenizer = character_tokenizer()
        return RiverLM(engine, tokenizer, subject.river.config, river_directory=river_directory)

    return make


@pytest.fixture
def lm(make_lm: Callable[..., RiverLM]) -> RiverLM:
    """Float32 on the torch engine, bfloat16 on the native one; no stop tokens."""
    return make_lm()


class TestGreedy:
    @pytest.mark.parametrize("exit_layer", [0, 2, NUM_LAYERS])
    @pytest.mark.parametrize("ngram", [True, False], ids=["ngrams", "river"])
    def test_tokens_are_the_backbones(self, lm: RiverLM, exit_layer: int, ngram: bool) -> None:
        for prompt in PROMPTS:
            expected = _backbone(lm, prompt, max_new_tokens=24)
            for tokens in (None, 1, 2, 3, 4, 5, 6):
                drafts = DraftConfig(tokens, exit_layer, ngram=ngram)
                _check(_lossless(lm, prompt, drafts, max_new_tokens=24), expected)

    def test_tokens_are_the_backbones_whatever_chooses_the_exit_layer(self, lm: RiverLM) -> None:
        expected = [_backbone(lm, prompt) for prompt in PROMPTS]
        for i in (0, 1, 2, 3, 2, 1, 0):
            _check(_lossless(lm, PROMPTS[i], None), expected[i])

    @pytest.mark.parametrize("exit_layer", [0, 2, NUM_LAYERS])
    @pytest.mark.parametrize("lm_head_bits", [16, 8, 4])
    @pytest.mark.parametrize("make_lm", ["cpu"], indirect=True)
    def test_tokens_are_the_backbones_whatever_head_drafts(
        self, lm: RiverLM, exit_layer: int, lm_head_bits: int
    ) -> None:
        for prompt in PROMPTS:
            drafts = DraftConfig(4, exit_layer, lm_head_bits)
            _check(_lossless(lm, prompt, drafts), _backbone(lm, prompt))

    @pytest.mark.parametrize("backbone_bits", [16, 8])
    def test_tokens_are_those_of_a_backbone_with_8_bits_in_its_head(
        self, backbone_bits: int
    ) -> None:
        subject = subject_with(CONTEXT)
        engine = subject.engine(MIXED, backbone_bits=backbone_bits, lm_head_bits=8)
        lm = RiverLM(engine, character_tokenizer(), subject.river.config)
        for prompt, drafts in itertools.product(PROMPTS, (DraftConfig(), DraftConfig(4, 0))):
            _check(_lossless(lm, prompt, drafts), _backbone(lm, prompt))

    @pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7, 8])
    @any_drafts
    def test_stops_at_max_new_tokens(
        self, lm: RiverLM, drafts: DraftConfig, max_new_tokens: int
    ) -> None:
        result = _lossless(lm, PROMPTS[0], drafts, max_new_tokens=max_new_tokens)
        assert len(result.tokens) == max_new_tokens
        _check(result, _backbone(lm, PROMPTS[0], max_new_tokens=max_new_tokens))

    @pytest.mark.parametrize("prompt_length", [CONTEXT - n for n in (14, 8, 7, 6, 5, 2, 1, 0)])
    @any_drafts
    def test_stops_where_the_context_is_full(
        self, lm: RiverLM, drafts: DraftConfig, prompt_length: int
    ) -> None:
        prompt = ("abcd" * CONTEXT)[:prompt_length]
        result = _lossless(lm, prompt, drafts)
        assert result.finish_reason == "context"
        assert len(result.tokens) == CONTEXT - prompt_length + 1
        _check(result, _backbone(lm, prompt))

    def test_every_mode_and_draft_in_turn_leaves_nothing_behind(self, lm: RiverLM) -> None:
        settings = {"max_new_tokens": 20}
        expected = [_backbone(lm, prompt, **settings) for prompt in PROMPTS]
        for drafts, i in itertools.product(DRAFTS, range(len(PROMPTS))):
            _check(_lossless(lm, PROMPTS[i], drafts, **settings), expected[i])
            lm.generate(PROMPTS[i - 1], max_new_tokens=5)
        assert _backbone(lm, PROMPTS[0], **settings).tokens == expected[0].tokens


class TestSampled:
    @pytest.mark.parametrize("sampling", SAMPLING, ids=str)
    @any_drafts
    def test_tokens_are_the_backbones_with_the_same_seed(
        self, lm: RiverLM, drafts: DraftConfig, sampling: dict[str, Any]
    ) -> None:
        for seed, prompt in enumerate(PROMPTS):
            settings = {"max_new_tokens": 24, "seed": seed, **sampling}
            _check(_lossless(lm, prompt, drafts, **settings), _backbone(lm, prompt, **settings))

    @pytest.mark.parametrize("penalty", [0.7, 1.3, 1.8])
    @any_drafts
    def test_greedy_tokens_are_penalised_as_the_backbones(
        self, lm: RiverLM, drafts: DraftConfig, penalty: float
    ) -> None:
        for prompt in PROMPTS:
            settings = {"max_new_tokens": 24, "repetition_penalty": penalty}
            _check(_lossless(lm, prompt, drafts, **settings), _backbone(lm, prompt, **settings))

    def test_a_seed_decides_alone(self, lm: RiverLM) -> None:
        def answer(seed: int | None) -> str:
            return _lossless(lm, PROMPTS[0], None, temperature=2.0, seed=seed).text

        first = answer(1)
        assert answer(1) == first
        assert len({first, answer(2), answer(None), answer(None)}) == 4

    def test_drafts_of_the_backbone_are_accepted(self, lm: RiverLM) -> None:
        """They see the same random numbers."""
        result = _lossless(lm, PROMPTS[0], PERFECT, max_new_tokens=31, temperature=2.0, seed=3)
        assert _statistics(result).acceptance_by_position == (1.0,) * 5


class TestStopping:
    """Within a round of six tokens, all of them the backbone's own drafts and one more."""

    @pytest.mark.parametrize("place", [0, 1, 2, 4, 6, 7, 10])
    def test_at_a_stop_token(self, lm: RiverLM, place: int) -> None:
        whole = _backbone(lm, PROMPTS[0], max_new_tokens=14, **RANDOM)
        assert (
            _lossless(lm, PROMPTS[0], PERFECT, max_new_tokens=14, **RANDOM).tokens == whole.tokens
        )
        lm.stop_tokens = frozenset({whole.tokens[place]})
        expected = _backbone(lm, PROMPTS[0], max_new_tokens=14, **RANDOM)
        assert expected.finish_reason == "stop"
        _check(_lossless(lm, PROMPTS[0], PERFECT, max_new_tokens=14, **RANDOM), expected)
        _check(_lossless(lm, PROMPTS[0], POOR, max_new_tokens=14, **RANDOM), expected)

    @pytest.mark.parametrize(("start", "length"), [(0, 1), (2, 3), (4, 3), (6, 1), (8, 3), (11, 2)])
    def test_at_a_stop_string(self, lm: RiverLM, start: int, length: int) -> None:
        whole = _backbone(lm, PROMPTS[0], max_new_tokens=20, **RANDOM)
        settings = {"max_new_tokens": 20, "stop": ("no", whole.text[start : start + length])}
        expected = _backbone(lm, PROMPTS[0], **settings, **RANDOM)
        assert expected.finish_reason == "stop"
        for drafts in DRAFTS:
            responses = list(_stream(lm, PROMPTS[0], drafts, **settings, **RANDOM))
            assert [response.token for response in responses] == expected.tokens
            assert "".join(response.text for response in responses) == expected.text
            assert responses[-1].finish_reason == "stop"

    def test_a_token_behind_the_stop_is_not_in_the_next_answer(
        self, lm: RiverLM, prefilled: list[int]
    ) -> None:
        """The cache holds tokens of the last round that the answer doesn't."""
        token_ids = lm.tokenizer(PROMPTS[0]).input_ids
        whole = _lossless(lm, PROMPTS[0], PERFECT, max_new_tokens=14, **RANDOM)
        for place in range(2, 7):  # the second of a round to the last but one
            if whole.tokens[place] in whole.tokens[:place]:
                continue
            lm.stop_tokens = frozenset({whole.tokens[place]})
            text = [*token_ids, *_lossless(lm, PROMPTS[0], PERFECT, **RANDOM).tokens]
            lm.stop_tokens = frozenset()
            tokens = _continue(lm, [*text, 7, 8, 9], reuse_cache=True)
            assert prefilled[-1] in (3, 4)  # the round's last token is not in the cache yet
            assert tokens == _continue(lm, [*text, 7, 8, 9], reuse_cache=False)


class TestBatch:
    @pytest.mark.parametrize("exit_layer", [0, 2, NUM_LAYERS])
    def test_rows_are_the_backbones(self, lm: RiverLM, exit_layer: int) -> None:
        expected = _backbone_batch(lm, PROMPTS, max_new_tokens=24)
        for tokens in (None, 1, 2, 3, 4, 5, 6):
            drafts = DraftConfig(tokens, exit_layer)
            rows = _lossless_batch(lm, PROMPTS, drafts, max_new_tokens=24)
            for row, own in zip(rows, expected, strict=True):
                _check(row, own)

    @pytest.mark.parametrize("sampling", [*SAMPLING[1:6], {"repetition_penalty": 1.5}], ids=str)
    @any_drafts
    def test_sampled_rows_are_the_backbones(
        self, lm: RiverLM, drafts: DraftConfig, sampling: dict[str, Any]
    ) -> None:
        settings = {"max_new_tokens": 24, "seed": 8, **sampling}
        expected = _backbone_batch(lm, PROMPTS, **settings)
        for row, own in zip(
            _lossless_batch(lm, PROMPTS, drafts, **settings), expected, strict=True
        ):
            _check(row, own)

    @any_drafts
    @pytest.mark.parametrize("kind", ["tokens", "strings"])
    def test_rows_that_stop_leave_the_others_alone(
        self, lm: RiverLM, drafts: DraftConfig, kind: str
    ) -> None:
        whole = _backbone_batch(lm, PROMPTS, max_new_tokens=24, **RANDOM)
        settings: dict[str, Any] = {"max_new_tokens": 24, **RANDOM}
        if kind == "tokens":
            lm.stop_tokens = frozenset(row.tokens[6 * i] for i, row in enumerate(whole))
        else:
            settings["stop"] = tuple(row.text[5 * i : 5 * i + 2] for i, row in enumerate(whole))
        expected = _backbone_batch(lm, PROMPTS, **settings)
        assert len({len(row.tokens) for row in expected}) > 1
        for row, own in zip(
            _lossless_batch(lm, PROMPTS, drafts, **settings), expected, strict=True
        ):
            _check(row, own)

    @any_drafts
    @pytest.mark.parametrize("room", [1, 2, 4, 7, 20])
    @pytest.mark.parametrize("longest", [0, 2])
    def test_rows_end_where_the_longest_fills_the_context(
        self, lm: RiverLM, drafts: DraftConfig, room: int, longest: int
    ) -> None:
        prompts = list(PROMPTS)
        prompts[longest] = ("abcd" * CONTEXT)[: CONTEXT - room + 1]
        expected = _backbone_batch(lm, prompts)
        assert [len(row.tokens) for row in expected] == [room] * 4
        for row, own in zip(_lossless_batch(lm, prompts, drafts), expected, strict=True):
            _check(row, own)

    @any_drafts
    def test_a_single_prompt_is_generate(self, lm: RiverLM, drafts: DraftConfig) -> None:
        for prompt in PROMPTS:
            (row,) = _lossless_batch(lm, [prompt], drafts, max_new_tokens=20)
            _check(row, _lossless(lm, prompt, drafts, max_new_tokens=20))

    def test_statistics_are_each_rows_own(self, lm: RiverLM) -> None:
        rows = _lossless_batch(lm, PROMPTS, PERFECT, max_new_tokens=19)
        for row in rows:
            assert _statistics(row).verifications == 3
            assert _statistics(row).accepted_tokens == 15
        rows = _lossless_batch(lm, PROMPTS, POOR, max_new_tokens=19)
        assert len({_statistics(row).verifications for row in rows}) > 1
        for row in rows:
            _check_statistics(row)


class TestStream:
    @pytest.mark.parametrize("sampling", [{}, RANDOM], ids=str)
    @any_drafts
    def test_gives_the_tokens_of_the_result(
        self, lm: RiverLM, drafts: DraftConfig, sampling: dict[str, Any]
    ) -> None:
        responses = list(_stream(lm, PROMPTS[2], drafts, max_new_tokens=30, **sampling))
        _check(
            GenerationResult.of(lm.engine, responses, len(PROMPTS[2]), "lossless"),
            _backbone(lm, PROMPTS[2], max_new_tokens=30, **sampling),
        )
        assert [response.generated_tokens for response in responses] == list(range(1, 31))
        assert {response.exit_layer for response in responses} == {NUM_LAYERS}
        assert [response.finish_reason for response in responses] == [None] * 29 + ["length"]

    @any_drafts
    def test_counts_what_it_gives(self, lm: RiverLM, drafts: DraftConfig) -> None:
        responses = list(_stream(lm, PROMPTS[2], drafts, max_new_tokens=40))
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
        statistics = responses[-1].lossless
        assert statistics is not None
        origins = [response.origin for response in others]
        assert origins.count("ngram") == statistics.ngram_tokens
        assert origins.count("ngram") + origins.count("river") == statistics.accepted_tokens
        assert origins.count("backbone") == statistics.verifications

    def test_gives_no_token_before_it_is_verified(
        self, lm: RiverLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        passes: list[list[int]] = []
        verify = lm.engine.verify

        def spy(token_ids: Tensor, counts: Sequence[int] | None = None) -> StepResult:
            passes.append(token_ids[0].tolist())
            return verify(token_ids, counts)

        monkeypatch.setattr(lm.engine, "verify", spy)
        for number, response in enumerate(_stream(lm, PROMPTS[0], PERFECT, max_new_tokens=13)):
            assert len(passes) == -(-number // 6)
            if number % 6:  # a drafted token: the pass before held it
                assert response.token == passes[-1][number % 6]


class TestStatistics:
    @pytest.mark.parametrize("ngram", [True, False], ids=["ngrams", "river"])
    @pytest.mark.parametrize("tokens", [None, 1, 4])
    @pytest.mark.parametrize("prompt", PROMPTS)
    def test_add_up(self, lm: RiverLM, prompt: str, tokens: int | None, ngram: bool) -> None:
        result = _lossless(lm, prompt, DraftConfig(tokens, 0, ngram=ngram), max_new_tokens=40)
        _check_statistics(result)
        statistics = _statistics(result)
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
        statistics = _statistics(_lossless(lm, PROMPTS[0], None, max_new_tokens=1))
        assert (statistics.verifications, statistics.drafted_tokens) == (0, 0)
        assert statistics.tokens_per_verification is None
        assert statistics.draft_share is None
        assert statistics.acceptance_by_position == ()


class TestInterruption:
    @pytest.mark.parametrize("given", [1, 2, 4, 6, 7, 9])
    @any_drafts
    def test_of_a_stream_leaves_the_model_usable(
        self, lm: RiverLM, drafts: DraftConfig, given: int, prefilled: list[int]
    ) -> None:
        expected = _backbone(lm, PROMPTS[0], max_new_tokens=20)
        token_ids = lm.tokenizer(PROMPTS[0]).input_ids
        stream = _stream(lm, PROMPTS[0], drafts, max_new_tokens=20)
        tokens = [next(stream).token for _ in range(given)]
        stream.close()  # type: ignore[attr-defined]
        assert tokens == expected.tokens[:given]
        text = [*token_ids, *tokens, 5]
        reused = _continue(lm, text, reuse_cache=True)
        assert prefilled[-1] <= 2
        assert reused == _continue(lm, text, reuse_cache=False)
        _check(_lossless(lm, PROMPTS[0], drafts, max_new_tokens=20), expected)

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
        expected = _backbone(lm, PROMPTS[3], **settings)
        with monkeypatch.context() as patched:
            _interrupt_around(lm.engine, verb, when, round_number, patched)
            tokens = _given_until_interrupted(_stream(lm, PROMPTS[3], drafts, **settings))
        assert tokens == expected.tokens[: len(tokens)]
        assert len(tokens) >= 1 + round_number
        text = [*lm.tokenizer(PROMPTS[3]).input_ids, *tokens, 5]
        reused = _continue(lm, text, reuse_cache=True)
        assert reused == _continue(lm, text, reuse_cache=False)
        _check(_lossless(lm, PROMPTS[3], drafts, **settings), expected)

    @pytest.mark.parametrize("sampling", [{}, RANDOM], ids=str)
    @pytest.mark.parametrize("passes", [1, 3, 5, 6, 9, 12])
    def test_within_a_pass_leaves_the_model_usable(
        self, lm: RiverLM, passes: int, sampling: dict[str, Any]
    ) -> None:
        """Of a round of five drafted tokens and a verification."""
        settings = {"max_new_tokens": 20, **sampling}
        expected = _backbone(lm, PROMPTS[0], **settings)
        engine = lm.engine
        if isinstance(engine, CpuEngine):
            core, engine._core = engine._core, InterruptingDrafts(engine._core, 1 + passes)
        else:
            interrupt_once(engine.model, passes)
        tokens = _given_until_interrupted(_stream(lm, PROMPTS[0], PERFECT, **settings))
        if isinstance(engine, CpuEngine):
            engine._core = core
        assert tokens == expected.tokens[: len(tokens)]
        assert len(tokens) in (1, 7, 13)
        text = [*lm.tokenizer(PROMPTS[0]).input_ids, *tokens, 5]
        reused = _continue(lm, text, reuse_cache=True)
        assert reused == _continue(lm, text, reuse_cache=False)
        _check(_lossless(lm, PROMPTS[0], PERFECT, **settings), expected)

    def test_by_another_answer_ends_a_stream_with_an_error(self, lm: RiverLM) -> None:
        expected = _backbone(lm, PROMPTS[1])
        stream = _stream(lm, PROMPTS[0], PERFECT)
        for _ in range(3):
            next(stream)
        _check(_lossless(lm, PROMPTS[1], PERFECT), expected)
        with pytest.raises(RiverError, match="another answer was begun"):
            next(stream)
        _check(_lossless(lm, PROMPTS[1], PERFECT), expected)


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
        answers = [_answer(conversation, question) for question in self.QUESTIONS]
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
            _answer(conversation, question)
        first = len(encode_prompt(lm.tokenizer, self.QUESTIONS[0]))
        # The last token of an answer is chosen but not run: it is prefilled with the next question.
        others = [1 + len(f"\nu:{question}\na:") for question in self.QUESTIONS[1:]]
        assert prefilled == [first, *others]

    def test_keeps_nothing_that_exits_have_written(self, lm: RiverLM, prefilled: list[int]) -> None:
        lm.policy = ExitPolicy.always()
        conversation = Conversation(lm, **self.SETTINGS)
        _answer(conversation, self.QUESTIONS[0])
        conversation.mode = "lossless"
        messages = [*conversation.messages, {"role": "user", "content": self.QUESTIONS[1]}]
        answer = _answer(conversation, self.QUESTIONS[1])
        assert prefilled[1] == len(encode_prompt(lm.tokenizer, messages))
        lm.policy = ExitPolicy.never()
        assert lm.chat(messages, **self.SETTINGS).text == answer

    def test_river_mode_goes_on_with_what_the_backbone_wrote(
        self, lm: RiverLM, prefilled: list[int]
    ) -> None:
        conversation = Conversation(lm, mode="lossless", **self.SETTINGS)
        _answer(conversation, self.QUESTIONS[0])
        conversation.mode = "river"
        _answer(conversation, self.QUESTIONS[1])
        assert prefilled[1] == 1 + len(f"\nu:{self.QUESTIONS[1]}\na:")
        # and that turn was the river's: it isn't kept
        conversation.mode = "lossless"
        messages = [*conversation.messages, {"role": "user", "content": self.QUESTIONS[2]}]
        _answer(conversation, self.QUESTIONS[2])
        assert prefilled[2] == len(encode_prompt(lm.tokenizer, messages))

    def test_cut_short_goes_on_as_the_chat_so_far_would(self, lm: RiverLM) -> None:
        for given in (1, 3, 7, 9):
            conversation = Conversation(lm, mode="lossless", drafts=PERFECT, **self.SETTINGS)
            stream = conversation.stream(self.QUESTIONS[0])
            text = "".join(next(stream).text for _ in range(given))
            stream.close()  # type: ignore[attr-defined]
            assert conversation.messages[1:] == [{"role": "assistant", "content": text}]
            messages = [*conversation.messages, {"role": "user", "content": self.QUESTIONS[1]}]
            answer = _answer(conversation, self.QUESTIONS[1])
            lm.policy = ExitPolicy.never()
            assert lm.chat(messages, **self.SETTINGS).text == answer


class TestDegenerateRivers:
    """With a clock of its own, so that what adapts to time does the same at every run."""

    @pytest.fixture
    def lm(self, make_lm: Callable[..., RiverLM]) -> RiverLM:
        return make_lm(subject_with(512))

    @pytest.mark.parametrize("tokens", [1, 3, 6])
    @pytest.mark.parametrize("sampling", [{}, RANDOM], ids=str)
    def test_one_equal_to_the_backbone_accepts_everything(
        self, lm: RiverLM, tokens: int, sampling: dict[str, Any]
    ) -> None:
        rounds = 5
        count = 1 + rounds * (tokens + 1)
        drafts = DraftConfig(tokens, NUM_LAYERS, 16, ngram=False)
        result = _lossless(lm, PROMPTS[0], drafts, max_new_tokens=count, **sampling)
        statistics = _statistics(result)
        assert statistics.verifications == rounds
        assert statistics.drafted_tokens == statistics.accepted_tokens == rounds * tokens
        assert statistics.acceptance_by_position == (1.0,) * tokens
        assert statistics.draft_share == pytest.approx(tokens / (tokens + 1))
        _check(result, _backbone(lm, PROMPTS[0], max_new_tokens=count, **sampling))

    def test_one_equal_to_the_backbone_comes_to_draft_at_length(
        self, lm: RiverLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        Clock(lm.engine, monkeypatch, drafted_token=0.1)
        drafts = DraftConfig(None, NUM_LAYERS, 16, ngram=False)
        result = _lossless(lm, PROMPTS[0], drafts, max_new_tokens=300)
        statistics = _statistics(result)
        assert statistics.drafted_tokens == statistics.accepted_tokens
        assert len(statistics.acceptance_by_position) == MOST_DRAFTED
        result = _lossless(lm, PROMPTS[3], drafts, max_new_tokens=300)  # it is known by now
        assert (_statistics(result).tokens_per_verification or 0) > 8

    @pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0, "seed": 9}], ids=str)
    @pytest.mark.parametrize("exit_layer", [None, 0])
    def test_one_of_noise_gives_the_backbones_text_and_is_left_alone(
        self,
        make_lm: Callable[..., RiverLM],
        exit_layer: int | None,
        sampling: dict[str, Any],
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        lm = make_lm(_subject_with_noise())
        clock = Clock(lm.engine, monkeypatch, drafted_token=0.25)
        settings = {"max_new_tokens": 350, **sampling}
        expected = _backbone(lm, PROMPTS[0], **settings)
        result = _lossless(lm, PROMPTS[0], DraftConfig(None, exit_layer, ngram=False), **settings)
        _check(result, expected)
        assert (_statistics(result).draft_share or 0) < 0.05
        assert 2 <= clock.drafts < 40
        first_answer = clock.drafts
        seconds = clock.now
        _check(
            _lossless(lm, PROMPTS[0], DraftConfig(None, exit_layer, ngram=False), **settings),
            expected,
        )
        assert clock.drafts - first_answer <= 350 / 16
        assert clock.now - seconds < 349 * (1 + clock.row) / 0.95

    @pytest.mark.parametrize("sampling", [{}, RANDOM, {"repetition_penalty": 1.3}], ids=str)
    @pytest.mark.parametrize("tokens", [None, 3])
    def test_one_that_overflows_gives_the_backbones_text(
        self, make_lm: Callable[..., RiverLM], tokens: int | None, sampling: dict[str, Any]
    ) -> None:
        subject = Subject("Llama", {"max_position_embeddings": CONTEXT})
        for exit_layer in subject.river.exit_layers:
            exit_layer["mlp.down_proj"].scales.fill_(math.nan)
        lm = make_lm(subject)
        expected = _backbone(lm, PROMPTS[0], **sampling)
        _check(_lossless(lm, PROMPTS[0], DraftConfig(tokens), **sampling), expected)

    def test_a_fixed_length_is_drafted_by_noise_too(
        self, make_lm: Callable[..., RiverLM], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lm = make_lm(_subject_with_noise())
        clock = Clock(lm.engine, monkeypatch)
        for prompt in PROMPTS[:2]:
            expected = _backbone(lm, prompt, max_new_tokens=60)
            clock.drafts = 0
            result = _lossless(lm, prompt, DraftConfig(2, 0, ngram=False), max_new_tokens=60)
            _check(result, expected)
            assert clock.drafts >= _statistics(result).verifications - 1


class TestLearning:
    def test_goes_on_where_the_run_before_left_off(
        self, make_lm: Callable[..., RiverLM], tmp_path: Path
    ) -> None:
        subject = subject_with(CONTEXT)
        subject.river.save(tmp_path / "river")
        first = make_lm(river_directory=tmp_path / "river")
        for prompt in PROMPTS:
            _lossless(first, prompt, DraftConfig())
        learnt = first._decoder("lossless", DraftConfig())
        second = make_lm(river_directory=tmp_path / "river")
        decoder = second._decoder("lossless", DraftConfig())
        assert learnt is not None
        assert decoder is not None
        assert decoder.learnt() == learnt.learnt()
        assert decoder.learnt()["rate"] > 0
        for prompt in PROMPTS:
            _check(_lossless(second, prompt, DraftConfig()), _backbone(second, prompt))

    def test_of_other_drafts_is_not_taken(
        self, make_lm: Callable[..., RiverLM], tmp_path: Path
    ) -> None:
        subject_with(CONTEXT).river.save(tmp_path / "river")
        _lossless(make_lm(river_directory=tmp_path / "river"), PROMPTS[0], DraftConfig())
        other = make_lm(river_directory=tmp_path / "river")._decoder("lossless", POOR)
        assert other is not None
        assert other.learnt()["rate"] == 0

    @pytest.mark.parametrize(
        "damage",
        [
            "",
            "{",
            "[]",
            '{"format_version": 2, "entries": {}}',
            '{"format_version": 1, "entries": 5}',
            '{"format_version": 1, "entries": {"KEY": 5}}',
            '{"format_version": 1, "entries": {"KEY": {}}}',
            '{"format_version": 1, "entries": {"KEY": {"rate": "fast"}}}',
            '{"format_version": 1, "entries": {"KEY": {"rate": 1, "ngrams": {}, "rivers": []}}}',
        ],
    )
    def test_out_of_a_damaged_file_begins_anew(
        self, make_lm: Callable[..., RiverLM], tmp_path: Path, damage: str
    ) -> None:
        key = _key(make_lm())
        (tmp_path / "drafts.json").write_text(damage.replace("KEY", key))
        lm = make_lm(river_directory=tmp_path)
        _check(_lossless(lm, PROMPTS[0], DraftConfig()), _backbone(lm, PROMPTS[0]))
        again = make_lm(river_directory=tmp_path)._decoder("lossless", DraftConfig())
        assert again is not None
        assert again.learnt()["rate"] > 0

    @pytest.mark.parametrize("make_lm", ["cpu"], indirect=True)
    @pytest.mark.parametrize(
        "damage",
        [None, "x", [], {}, -1, -1.5, 10**400, math.inf, -math.inf, math.nan],
        ids=lambda damage: repr(damage)[:6],
    )
    @pytest.mark.parametrize(
        "path",
        [
            "rate",
            "verification",
            "verification scale",
            "verification shape",
            "verification shape 2",
            "ngrams",
            "ngrams tried",
            "ngrams accepted 3",
            "rivers",
            "rivers 4",
            "rivers 4 value",
            "rivers 4 worth",
            "rivers 4 drafts",
            "rivers 4 token_seconds",
            "rivers 4 tried 4",
        ],
    )
    def test_of_damaged_numbers_does_no_harm(
        self,
        make_lm: Callable[..., RiverLM],
        tmp_path: Path,
        path: str,
        damage: Any,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """What is learnt stays numbers, and drafts that are accepted come to be made again."""
        drafts = DraftConfig(exit_layer=NUM_LAYERS, lm_head_bits=16, ngram=False)
        first = make_lm(river_directory=tmp_path)
        Clock(first.engine, monkeypatch, drafted_token=0.1)
        expected = _backbone(first, PROMPTS[0])
        _check(_lossless(first, PROMPTS[0], drafts), expected)
        kept = json.loads((tmp_path / "drafts.json").read_text())
        (place,) = kept["entries"].values()
        *parts, last = path.split()
        for part in parts:
            place = place[int(part) if isinstance(place, list) else part]
        assert (int(last) < len(place)) if isinstance(place, list) else last in place
        place[int(last) if isinstance(place, list) else last] = damage
        (tmp_path / "drafts.json").write_text(json.dumps(kept))
        lm = make_lm(river_directory=tmp_path)
        Clock(lm.engine, monkeypatch, drafted_token=0.1)
        for _ in range(3):
            result = _lossless(lm, PROMPTS[0], drafts)
            _check(result, expected)
        assert _statistics(result).accepted_tokens > 30
        assert _are_finite(json.loads((tmp_path / "drafts.json").read_text()))

    def test_in_a_folder_that_is_gone_is_no_error(
        self, make_lm: Callable[..., RiverLM], tmp_path: Path
    ) -> None:
        lm = make_lm(river_directory=tmp_path / "nowhere")
        _check(_lossless(lm, PROMPTS[0], DraftConfig()), _backbone(lm, PROMPTS[0]))
        assert not (tmp_path / "nowhere").exists()


class TestBadInput:
    @pytest.mark.parametrize("mode", ["x", "", "Lossless", None])
    def test_an_unknown_mode(self, lm: RiverLM, mode: Any) -> None:
        wanted = f"^mode is {mode!r}; choose one of river, lossless$"
        for answer in _verbs(lm, mode=mode):
            with pytest.raises(ConfigError, match=wanted):
                answer()

    def test_drafts_in_river_mode(self, lm: RiverLM) -> None:
        for answer in _verbs(lm, drafts=DraftConfig()):
            with pytest.raises(ConfigError, match=r'^drafts are for mode="lossless"$'):
                answer()

    def test_an_exit_layer_that_the_model_has_not(self, lm: RiverLM) -> None:
        wanted = (
            r"^the draft's exit layer is 5, but the model has 4 layers; choose one in \[0, 4\]$"
        )
        for answer in _verbs(lm, mode="lossless", drafts=DraftConfig(exit_layer=5)):
            with pytest.raises(ConfigError, match=wanted):
                answer()

    @pytest.mark.parametrize("make_lm", ["torch"], indirect=True)
    @pytest.mark.parametrize("bits", [8, 4])
    def test_a_narrow_head_on_the_torch_engine(self, lm: RiverLM, bits: int) -> None:
        wanted = f"^the torch engine has no LM head of {bits} bits for drafts; choose 16$"
        for answer in _verbs(lm, mode="lossless", drafts=DraftConfig(lm_head_bits=bits)):
            with pytest.raises(ConfigError, match=wanted):
                answer()

    def test_a_head_wider_than_the_engines(self) -> None:
        subject = subject_with(CONTEXT)
        engine = subject.engine(lm_head_bits=8)
        lm = RiverLM(engine, character_tokenizer(), subject.river.config)
        with pytest.raises(
            ConfigError, match=r"the cpu engine has no LM head of 16 bits.*choose 8$"
        ):
            lm.generate("x", mode="lossless", drafts=DraftConfig(lm_head_bits=16))

    @pytest.mark.parametrize(
        ("settings", "wanted"),
        [
            ({"tokens": 0}, "a draft of 0 tokens; it must have 1 to 64"),
            ({"tokens": -1}, "a draft of -1 tokens; it must have 1 to 64"),
            ({"tokens": 65}, "a draft of 65 tokens; it must have 1 to 64"),
            ({"exit_layer": -1}, "the draft's exit layer is -1; it must be 0 or more"),
            ({"lm_head_bits": 5}, "the drafts' LM head has 5 bits; choose 16, 8 or 4"),
            ({"lm_head_bits": 0}, "the drafts' LM head has 0 bits; choose 16, 8 or 4"),
        ],
    )
    def test_settings_out_of_range(self, settings: dict[str, Any], wanted: str) -> None:
        with pytest.raises(ConfigError) as raised:
            DraftConfig(**settings)
        assert str(raised.value) == wanted

    def test_leaves_the_model_usable(self, lm: RiverLM) -> None:
        conversation = Conversation(lm, max_new_tokens=5)
        _answer(conversation, "Hi")
        cached = list(lm._cached_tokens)
        with pytest.raises(ConfigError):
            lm.generate("x", mode="lossless", drafts=DraftConfig(exit_layer=9))
        with pytest.raises(ConfigError):
            lm.generate_batch(["x"], drafts=DraftConfig())
        assert lm._cached_tokens == cached
        _check(_lossless(lm, PROMPTS[0], None), _backbone(lm, PROMPTS[0]))

    @any_drafts
    def test_the_longest_draft_fits_any_context(self, lm: RiverLM, drafts: DraftConfig) -> None:
        drafts = DraftConfig(64, drafts.exit_layer, ngram=drafts.ngram)
        for prompt in PROMPTS[:2]:
            _check(_lossless(lm, prompt, drafts), _backbone(lm, prompt))


class Clock:
    """Stands for the time that rounds measure: a verification takes a second and a bit for each
    row, a drafted token a part of a second.

    Attributes:
        now: seconds.
        drafts: how many the engine has made.
        row: seconds of a row in a verification.
    """

    def __init__(
        self, engine: Engine, monkeypatch: pytest.MonkeyPatch, drafted_token: float = 0.25
    ) -> None:
        self.now = 0.0
        self.drafts = 0
        self.row = 0.02
        self._drafted_token = drafted_token
        self._draft, self._verify = engine.draft, engine.verify
        monkeypatch.setattr(engine, "draft", self.draft)
        monkeypatch.setattr(engine, "verify", self.verify)
        clock = SimpleNamespace(perf_counter=lambda: self.now)
        monkeypatch.setattr("river_llm.lossless.rounds.time", clock)

    def draft(self, *args: Any) -> list[Draft]:
        drafts = self._draft(*args)
        self.drafts += 1
        self.now += self._drafted_token * max(len(draft.tokens) for draft in drafts)
        return drafts

    def verify(self, token_ids: Tensor, counts: Sequence[int] | None = None) -> StepResult:
        self.now += 1 + self.row * (token_ids.numel() if counts is None else sum(counts))
        return self._verify(token_ids, counts)


class InterruptingDrafts(Interrupting):
    """A draft counts as one pass for each of its tokens."""

    def draft(self, *args: Any) -> Any:
        drafted = self._core.draft(*args)
        passes = sum(map(len, drafted[0]))
        if 0 < self._passes <= passes:
            signal.raise_signal(signal.SIGINT)
        self._passes -= passes
        return drafted


@cache
def _subject_with_noise() -> Subject:
    """The river's codes are random: its layers have nothing to do with the backbone's."""
    subject = Subject("Llama", {"max_position_embeddings": 512})
    sharpened(subject.model)
    generator = torch.Generator().manual_seed(4)

    def noise(matrix: QuantizedMatrix) -> QuantizedMatrix:
        packed = torch.randint(0, 256, matrix.packed.shape, generator=generator).to(torch.uint8)
        return QuantizedMatrix(packed, matrix.scales, matrix.zeros, matrix.bits, matrix.group_size)

    exit_layers = [
        {name: noise(matrix) for name, matrix in layer.items()}
        for layer in subject.river.exit_layers
    ]
    river = subject.river
    subject.river = River(river.config, exit_layers, river.fingerprint, river.model_type)
    return subject


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


def _backbone(lm: RiverLM, prompt: str, **settings: Any) -> GenerationResult:
    """What the prompt gives without exits and drafts."""
    lm.policy = ExitPolicy.never()
    result = lm.generate(prompt, raw=True, **settings)
    lm.policy = MIXED
    return result


def _backbone_batch(lm: RiverLM, prompts: list[str], **settings: Any) -> list[GenerationResult]:
    lm.policy = ExitPolicy.never()
    rows = lm.generate_batch(prompts, raw=True, **settings)
    lm.policy = MIXED
    return rows


def _lossless(
    lm: RiverLM, prompt: str, drafts: DraftConfig | None, **settings: Any
) -> GenerationResult:
    return lm.generate(prompt, raw=True, mode="lossless", drafts=drafts, **settings)


def _lossless_batch(
    lm: RiverLM, prompts: list[str], drafts: DraftConfig, **settings: Any
) -> list[GenerationResult]:
    return lm.generate_batch(prompts, raw=True, mode="lossless", drafts=drafts, **settings)


def _stream(
    lm: RiverLM, prompt: str, drafts: DraftConfig, **settings: Any
) -> Iterator[GenerationResponse]:
    return lm.stream(prompt, raw=True, mode="lossless", drafts=drafts, **settings)


def _given_until_interrupted(stream: Iterator[GenerationResponse]) -> list[int]:
    """The tokens that came before Ctrl-C."""
    tokens: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        tokens.extend(response.token for response in stream)
    return tokens


def _continue(lm: RiverLM, token_ids: list[int], reuse_cache: bool) -> list[int]:
    """The next tokens in lossless mode."""
    sampling = SamplingConfig(max_new_tokens=12)
    stream = lm.stream_tokens(token_ids, sampling, reuse_cache, mode="lossless", drafts=POOR)
    return [response.token for response in stream]


def _answer(conversation: Conversation, question: str) -> str:
    return "".join(response.text for response in conversation.stream(question))


def _check(result: GenerationResult, expected: GenerationResult) -> None:
    """See that an answer of lossless mode is the backbone's, in every field but the measured."""
    assert result.mode == "lossless"
    for name in SAME:
        assert getattr(result, name) == getattr(expected, name), name


def _statistics(result: GenerationResult) -> Any:
    assert result.lossless is not None
    return result.lossless


def _verifications(response: GenerationResponse) -> int:
    assert response.lossless is not None
    return response.lossless.verifications


def _check_statistics(result: GenerationResult) -> None:
    """Of an answer that ran to its greatest length, so that all verified tokens are in it."""
    assert result.finish_reason in ("length", "context")
    statistics = _statistics(result)
    tokens = len(result.tokens) - 1  # the first is the prefill's
    accepted = statistics.accepted_tokens
    assert tokens == accepted + statistics.verifications
    assert statistics.tokens_per_verification == pytest.approx(tokens / statistics.verifications)
    assert statistics.draft_share == pytest.approx(accepted / tokens)
    assert 0 <= statistics.ngram_tokens <= accepted <= statistics.drafted_tokens
    assert all(0 <= share <= 1 for share in statistics.acceptance_by_position)
    assert statistics.verify_seconds > 0
    assert statistics.draft_seconds > 0


def _are_finite(values: Any) -> bool:
    """Whether all numbers in JSON values are."""
    if isinstance(values, dict):
        return all(map(_are_finite, values.values()))
    if isinstance(values, list):
        return all(map(_are_finite, values))
    return not isinstance(values, float) or math.isfinite(values)


def _key(lm: RiverLM) -> str:
    decoder = lm._decoder("lossless", DraftConfig())
    assert decoder is not None
    return decoder.key


def _verbs(lm: RiverLM, **settings: Any) -> list[Callable[[], object]]:
    """All that take a mode and drafts."""
    return [
        partial(lm.generate, "x", **settings),
        partial(lm.stream, "x", **settings),
        partial(lm.chat, "x", **settings),
        partial(lm.generate_batch, ["x", "yz"], **settings),
        partial(lm.stream_tokens, [5], SamplingConfig(), **settings),
        lambda: next(Conversation(lm, **settings).stream("x")),
    ]

"""Lossless mode on a tiny model, both engines: the answer is the backbone's, whatever drafts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from lossless_lm import (
    CONTEXT,
    DRAFTS,
    MIXED,
    NUM_LAYERS,
    PERFECT,
    POOR,
    PROMPTS,
    RANDOM,
    any_drafts,
    backbone,
    backbone_batch,
    check_answer,
    check_answers,
    check_statistics,
    lossless,
    lossless_after,
    lossless_batch,
    lossless_stream,
    statistics_of,
    subject_with,
)
from tiny_lm import character_tokenizer
from tiny_models import VOCABULARY
from torch import Tensor
from transformers import NoRepeatNGramLogitsProcessor, SuppressTokensLogitsProcessor

from river_llm import DraftConfig, RiverLM
from river_llm.engines import StepResult

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


def _tilted(token_ids: Tensor, logits: Tensor) -> Tensor:
    """Early characters or late ones more likely, by the whole text."""
    shift = torch.linspace(-2, 2, logits.shape[-1], device=logits.device)
    return logits + shift * (1 if int(token_ids.sum()) % 2 else -1)


PROCESSORS: dict[str, list[Any]] = {
    "no repeats": [NoRepeatNGramLogitsProcessor(2)],
    "suppressed": [SuppressTokensLogitsProcessor(list(range(20, 60)))],
    "a function": [_tilted],
    "all": [
        _tilted,
        NoRepeatNGramLogitsProcessor(2),
        SuppressTokensLogitsProcessor(list(range(20, 60))),
    ],
}


class TestGreedy:
    @pytest.mark.parametrize("exit_layer", [0, 2, NUM_LAYERS])
    @pytest.mark.parametrize("ngram", [True, False], ids=["ngrams", "river"])
    def test_tokens_are_the_backbones(self, lm: RiverLM, exit_layer: int, ngram: bool) -> None:
        for prompt in PROMPTS:
            expected = backbone(lm, prompt, max_new_tokens=24)
            for tokens in (None, 1, 2, 3, 4, 5, 6):
                drafts = DraftConfig(tokens, exit_layer, ngram=ngram)
                check_answer(lossless(lm, prompt, drafts, max_new_tokens=24), expected)

    def test_tokens_are_the_backbones_whatever_chooses_the_exit_layer(self, lm: RiverLM) -> None:
        expected = [backbone(lm, prompt) for prompt in PROMPTS]
        for i in (0, 1, 2, 3, 2, 1, 0):
            check_answer(lossless(lm, PROMPTS[i], None), expected[i])

    @pytest.mark.parametrize("exit_layer", [0, 2, NUM_LAYERS])
    @pytest.mark.parametrize("lm_head_bits", [16, 8, 4])
    @pytest.mark.parametrize("make_lm", ["cpu"], indirect=True)
    def test_tokens_are_the_backbones_whatever_head_drafts(
        self, lm: RiverLM, exit_layer: int, lm_head_bits: int
    ) -> None:
        for prompt in PROMPTS:
            drafts = DraftConfig(4, exit_layer, lm_head_bits)
            check_answer(lossless(lm, prompt, drafts), backbone(lm, prompt))

    @pytest.mark.parametrize("backbone_bits", [16, 8])
    def test_tokens_are_those_of_a_backbone_with_8_bits_in_its_head(
        self, backbone_bits: int
    ) -> None:
        subject = subject_with(CONTEXT)
        engine = subject.engine(MIXED, backbone_bits=backbone_bits, lm_head_bits=8)
        lm = RiverLM(engine, character_tokenizer(), subject.river.config)
        for prompt, drafts in itertools.product(PROMPTS, (DraftConfig(), DraftConfig(4, 0))):
            check_answer(lossless(lm, prompt, drafts), backbone(lm, prompt))

    @pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7, 8])
    @any_drafts
    def test_stops_at_max_new_tokens(
        self, lm: RiverLM, drafts: DraftConfig, max_new_tokens: int
    ) -> None:
        result = lossless(lm, PROMPTS[0], drafts, max_new_tokens=max_new_tokens)
        assert len(result.tokens) == max_new_tokens
        check_answer(result, backbone(lm, PROMPTS[0], max_new_tokens=max_new_tokens))

    @pytest.mark.parametrize("prompt_length", [CONTEXT - n for n in (14, 8, 7, 6, 5, 2, 1, 0)])
    @any_drafts
    def test_stops_where_the_context_is_full(
        self, lm: RiverLM, drafts: DraftConfig, prompt_length: int
    ) -> None:
        prompt = ("abcd" * CONTEXT)[:prompt_length]
        result = lossless(lm, prompt, drafts)
        assert result.finish_reason == "context"
        assert len(result.tokens) == CONTEXT - prompt_length + 1
        check_answer(result, backbone(lm, prompt))

    def test_every_mode_and_draft_in_turn_leaves_nothing_behind(self, lm: RiverLM) -> None:
        settings = {"max_new_tokens": 20}
        expected = [backbone(lm, prompt, **settings) for prompt in PROMPTS]
        for drafts, i in itertools.product(DRAFTS, range(len(PROMPTS))):
            check_answer(lossless(lm, PROMPTS[i], drafts, **settings), expected[i])
            lm.generate(PROMPTS[i - 1], max_new_tokens=5)
        assert backbone(lm, PROMPTS[0], **settings).tokens == expected[0].tokens


class TestSampled:
    @pytest.mark.parametrize("sampling", SAMPLING, ids=str)
    @any_drafts
    def test_tokens_are_the_backbones_with_the_same_seed(
        self, lm: RiverLM, drafts: DraftConfig, sampling: dict[str, Any]
    ) -> None:
        for seed, prompt in enumerate(PROMPTS):
            settings = {"max_new_tokens": 24, "seed": seed, **sampling}
            check_answer(lossless(lm, prompt, drafts, **settings), backbone(lm, prompt, **settings))

    @pytest.mark.parametrize("penalty", [0.7, 1.3, 1.8])
    @any_drafts
    def test_greedy_tokens_are_penalised_as_the_backbones(
        self, lm: RiverLM, drafts: DraftConfig, penalty: float
    ) -> None:
        for prompt in PROMPTS:
            settings = {"max_new_tokens": 24, "repetition_penalty": penalty}
            check_answer(lossless(lm, prompt, drafts, **settings), backbone(lm, prompt, **settings))

    def test_a_seed_decides_alone(self, lm: RiverLM) -> None:
        def answer(seed: int | None) -> str:
            return lossless(lm, PROMPTS[0], None, temperature=2.0, seed=seed).text

        first = answer(1)
        assert answer(1) == first
        assert len({first, answer(2), answer(None), answer(None)}) == 4

    def test_drafts_of_the_backbone_are_accepted(self, lm: RiverLM) -> None:
        """They see the same random numbers."""
        result = lossless(lm, PROMPTS[0], PERFECT, max_new_tokens=31, temperature=2.0, seed=3)
        assert statistics_of(result).acceptance_by_position == (1.0,) * 5


class TestProcessors:
    """Logits processors of the user's own: drafts see them too."""

    @pytest.mark.parametrize("sampling", [{}, RANDOM, {"repetition_penalty": 1.3}], ids=str)
    @pytest.mark.parametrize("processors", PROCESSORS)
    @any_drafts
    def test_tokens_are_the_backbones(
        self,
        lm: RiverLM,
        drafts: DraftConfig,
        processors: str,
        sampling: dict[str, Any],
    ) -> None:
        settings = {"max_new_tokens": 24, "processors": PROCESSORS[processors], **sampling}
        changed = 0
        for prompt in PROMPTS:
            expected = backbone(lm, prompt, **settings)
            check_answer(lossless(lm, prompt, drafts, **settings), expected)
            changed += (
                expected.tokens != backbone(lm, prompt, **{**settings, "processors": ()}).tokens
            )
        assert changed

    @pytest.mark.parametrize("processors", PROCESSORS)
    @pytest.mark.parametrize("vocabulary", [2, 40])
    def test_tokens_are_the_backbones_where_drafts_have_a_part_of_the_vocabulary(
        self, lm: RiverLM, vocabulary: int, processors: str
    ) -> None:
        drafts = DraftConfig(3, NUM_LAYERS, vocabulary=vocabulary, ngram=False)
        for sampling in ({}, RANDOM):
            settings = {"max_new_tokens": 24, "processors": PROCESSORS[processors], **sampling}
            for prompt in PROMPTS:
                result = lossless(lm, prompt, drafts, **settings)
                check_answer(result, backbone(lm, prompt, **settings))

    @any_drafts
    def test_rows_of_a_batch_are_the_backbones(self, lm: RiverLM, drafts: DraftConfig) -> None:
        settings = {"processors": PROCESSORS["all"], "max_new_tokens": 24, **RANDOM}
        expected = backbone_batch(lm, PROMPTS, **settings)
        check_answers(lossless_batch(lm, PROMPTS, drafts, **settings), expected)

    @pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0, "seed": 3}], ids=str)
    def test_drafts_of_the_backbone_are_accepted(
        self, lm: RiverLM, sampling: dict[str, Any]
    ) -> None:
        settings = {"max_new_tokens": 31, "processors": PROCESSORS["all"], **sampling}
        result = lossless(lm, PROMPTS[0], PERFECT, **settings)
        assert statistics_of(result).acceptance_by_position == (1.0,) * 5


class TestVocabulary:
    """Of drafts that are made of the first tokens alone."""

    @pytest.mark.parametrize("sampling", [{}, *SAMPLING], ids=str)
    @pytest.mark.parametrize("vocabulary", [2, 50, VOCABULARY])
    def test_tokens_are_the_backbones(
        self, lm: RiverLM, vocabulary: int, sampling: dict[str, Any]
    ) -> None:
        drafts = DraftConfig(4, NUM_LAYERS, 16, vocabulary, ngram=False)
        settings = {"max_new_tokens": 24, "seed": 5, **sampling}
        for prompt in PROMPTS[:2]:
            result = lossless(lm, prompt, drafts, **settings)
            check_answer(result, backbone(lm, prompt, **settings))

    @pytest.mark.parametrize("sampling", [{}, {"temperature": 2.0, "seed": 3}], ids=str)
    def test_drafts_of_the_backbone_are_accepted_up_to_the_first_other_token(
        self, lm: RiverLM, sampling: dict[str, Any]
    ) -> None:
        vocabulary = 60
        drafts = DraftConfig(5, NUM_LAYERS, 16, vocabulary, ngram=False)
        responses = list(lossless_stream(lm, PROMPTS[0], drafts, max_new_tokens=40, **sampling))
        tokens = [response.token for response in responses]
        assert any(token < vocabulary for token in tokens)
        assert any(token >= vocabulary for token in tokens)
        in_round = 0
        for response in responses[1:-6]:
            if response.origin == "backbone":
                assert response.token >= vocabulary or in_round == 5
                in_round = 0
            else:
                assert response.token < vocabulary
                in_round += 1


class TestStopping:
    """Within a round of six tokens, all of them the backbone's own drafts and one more."""

    @pytest.mark.parametrize("place", [0, 1, 2, 4, 6, 7, 10])
    def test_at_a_stop_token(self, lm: RiverLM, place: int) -> None:
        whole = backbone(lm, PROMPTS[0], max_new_tokens=14, **RANDOM)
        assert lossless(lm, PROMPTS[0], PERFECT, max_new_tokens=14, **RANDOM).tokens == whole.tokens
        lm.stop_tokens = frozenset({whole.tokens[place]})
        expected = backbone(lm, PROMPTS[0], max_new_tokens=14, **RANDOM)
        assert expected.finish_reason == "stop"
        check_answer(lossless(lm, PROMPTS[0], PERFECT, max_new_tokens=14, **RANDOM), expected)
        check_answer(lossless(lm, PROMPTS[0], POOR, max_new_tokens=14, **RANDOM), expected)

    @pytest.mark.parametrize(("start", "length"), [(0, 1), (2, 3), (4, 3), (6, 1), (8, 3), (11, 2)])
    def test_at_a_stop_string(self, lm: RiverLM, start: int, length: int) -> None:
        whole = backbone(lm, PROMPTS[0], max_new_tokens=20, **RANDOM)
        settings = {"max_new_tokens": 20, "stop": ("no", whole.text[start : start + length])}
        expected = backbone(lm, PROMPTS[0], **settings, **RANDOM)
        assert expected.finish_reason == "stop"
        for drafts in DRAFTS:
            responses = list(lossless_stream(lm, PROMPTS[0], drafts, **settings, **RANDOM))
            assert [response.token for response in responses] == expected.tokens
            assert "".join(response.text for response in responses) == expected.text
            assert responses[-1].finish_reason == "stop"

    def test_a_token_behind_the_stop_is_not_in_the_next_answer(
        self, lm: RiverLM, prefilled: list[int]
    ) -> None:
        """The cache holds tokens of the last round that the answer doesn't."""
        token_ids = lm.tokenizer(PROMPTS[0]).input_ids
        whole = lossless(lm, PROMPTS[0], PERFECT, max_new_tokens=14, **RANDOM)
        for place in range(2, 7):  # the second of a round to the last but one
            if whole.tokens[place] in whole.tokens[:place]:
                continue
            lm.stop_tokens = frozenset({whole.tokens[place]})
            text = [*token_ids, *lossless(lm, PROMPTS[0], PERFECT, **RANDOM).tokens]
            lm.stop_tokens = frozenset()
            tokens = lossless_after(lm, [*text, 7, 8, 9], reuse_cache=True)
            assert prefilled[-1] in (3, 4)  # the round's last token is not in the cache yet
            assert tokens == lossless_after(lm, [*text, 7, 8, 9], reuse_cache=False)

    @pytest.mark.parametrize("sampling", [{}, RANDOM], ids=str)
    def test_drafts_end_with_a_stop_token(self, lm: RiverLM, sampling: dict[str, Any]) -> None:
        """Also those out of the text."""
        whole = backbone(lm, PROMPTS[2], max_new_tokens=24, **sampling)
        for token in set(whole.tokens):
            lm.stop_tokens = frozenset({token})
            seen: list[list[int]] = []
            verify = lm.engine.verify

            def spy(
                token_ids: Tensor,
                counts: Sequence[int] | None = None,
                seen: list[list[int]] = seen,
                verify: Callable[..., StepResult] = verify,
            ) -> StepResult:
                seen.append(token_ids[0].tolist())
                return verify(token_ids, counts)

            with pytest.MonkeyPatch.context() as patched:
                patched.setattr(lm.engine, "verify", spy)
                for drafts in DRAFTS:
                    lossless(lm, PROMPTS[2], drafts, max_new_tokens=24, **sampling)
            assert all(token not in row[1:-1] for row in seen)


class TestBatch:
    @pytest.mark.parametrize("exit_layer", [0, 2, NUM_LAYERS])
    def test_rows_are_the_backbones(self, lm: RiverLM, exit_layer: int) -> None:
        expected = backbone_batch(lm, PROMPTS, max_new_tokens=24)
        for tokens in (None, 1, 2, 3, 4, 5, 6):
            drafts = DraftConfig(tokens, exit_layer)
            rows = lossless_batch(lm, PROMPTS, drafts, max_new_tokens=24)
            check_answers(rows, expected)

    @pytest.mark.parametrize("sampling", [*SAMPLING[1:6], {"repetition_penalty": 1.5}], ids=str)
    @any_drafts
    def test_sampled_rows_are_the_backbones(
        self, lm: RiverLM, drafts: DraftConfig, sampling: dict[str, Any]
    ) -> None:
        settings = {"max_new_tokens": 24, "seed": 8, **sampling}
        expected = backbone_batch(lm, PROMPTS, **settings)
        check_answers(lossless_batch(lm, PROMPTS, drafts, **settings), expected)

    @any_drafts
    @pytest.mark.parametrize("kind", ["tokens", "strings"])
    def test_rows_that_stop_leave_the_others_alone(
        self, lm: RiverLM, drafts: DraftConfig, kind: str
    ) -> None:
        whole = backbone_batch(lm, PROMPTS, max_new_tokens=24, **RANDOM)
        settings: dict[str, Any] = {"max_new_tokens": 24, **RANDOM}
        if kind == "tokens":
            lm.stop_tokens = frozenset(row.tokens[6 * i] for i, row in enumerate(whole))
        else:
            settings["stop"] = tuple(row.text[5 * i : 5 * i + 2] for i, row in enumerate(whole))
        expected = backbone_batch(lm, PROMPTS, **settings)
        assert len({len(row.tokens) for row in expected}) > 1
        check_answers(lossless_batch(lm, PROMPTS, drafts, **settings), expected)

    @any_drafts
    @pytest.mark.parametrize("room", [1, 2, 4, 7, 20])
    @pytest.mark.parametrize("longest", [0, 2])
    def test_rows_end_where_the_longest_fills_the_context(
        self, lm: RiverLM, drafts: DraftConfig, room: int, longest: int
    ) -> None:
        prompts = list(PROMPTS)
        prompts[longest] = ("abcd" * CONTEXT)[: CONTEXT - room + 1]
        expected = backbone_batch(lm, prompts)
        assert [len(row.tokens) for row in expected] == [room] * 4
        check_answers(lossless_batch(lm, prompts, drafts), expected)

    @any_drafts
    def test_a_single_prompt_is_generate(self, lm: RiverLM, drafts: DraftConfig) -> None:
        for prompt in PROMPTS:
            (row,) = lossless_batch(lm, [prompt], drafts, max_new_tokens=20)
            check_answer(row, lossless(lm, prompt, drafts, max_new_tokens=20))

    def test_statistics_are_each_rows_own(self, lm: RiverLM) -> None:
        rows = lossless_batch(lm, PROMPTS, PERFECT, max_new_tokens=19)
        for row in rows:
            assert statistics_of(row).verifications == 3
            assert statistics_of(row).accepted_tokens == 15
        rows = lossless_batch(lm, PROMPTS, POOR, max_new_tokens=19)
        assert len({statistics_of(row).verifications for row in rows}) > 1
        for row in rows:
            check_statistics(row)

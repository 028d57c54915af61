"""Lossless mode on real models: its tokens are those that the backbone alone gives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lossless_lm import (
    CONTEXT,
    MIXED,
    NUM_LAYERS,
    PERFECT,
    POOR,
    PROMPTS,
    RANDOM,
    any_drafts,
    backbone,
    both_engines,
    check_answer,
    lm_on,
    lossless,
    overflowing_subject,
)
from native_engines import CASES, subject_of
from torch import Tensor
from transformers import NoRepeatNGramLogitsProcessor

from river_llm import ConfigError, Conversation, DraftConfig, ExitPolicy, RiverLM
from river_llm.errors import LogitsError

TEXT = "".join(chr(code) for code in range(ord(" "), ord("~")))
SAMPLING = [
    {},
    RANDOM,
    {"temperature": 0.7, "top_p": 0.8},
    {"temperature": 1.5, "top_k": 5, "min_p": 0.1},
    {"repetition_penalty": 1.4},
    {"temperature": 1.0, "processors": (NoRepeatNGramLogitsProcessor(2),)},
]


@settings(max_examples=10)
@given(
    prompts=st.lists(st.text(TEXT, min_size=1, max_size=40), min_size=1, max_size=3),
    tokens=st.sampled_from([None, 1, 2, 3, 7]),
    exit_layer=st.integers(0, NUM_LAYERS),
    ngram=st.booleans(),
    sampling=st.sampled_from(SAMPLING),
    seed=st.integers(0, 2**63 - 1),
)
@both_engines
def test_answers_are_the_backbones(
    kind: str,
    prompts: list[str],
    tokens: int | None,
    exit_layer: int,
    ngram: bool,
    sampling: dict[str, Any],
    seed: int,
) -> None:
    """Token for token, greedy or sampled, alone or together, whatever is drafted."""
    lm = lm_on(kind)
    asked = {**sampling, "max_new_tokens": 16, "seed": seed}
    drafts = DraftConfig(tokens, exit_layer, ngram=ngram)
    check_answer(lossless(lm, prompts[0], drafts, **asked), backbone(lm, prompts[0], **asked))
    expected = lm.generate_batch(prompts, raw=True, policy=ExitPolicy.never(), **asked)
    for result, own in zip(
        lm.generate_batch(prompts, raw=True, policy=None, drafts=drafts, **asked),
        expected,
        strict=True,
    ):
        check_answer(result, own)


@pytest.mark.parametrize(
    ("name", "kind"), [*((name, "cpu") for name in CASES), ("phi3, longrope", "torch")]
)
def test_answers_are_the_backbones_on_every_architecture(name: str, kind: str) -> None:
    """And where a text outgrows the positions that its rotary angles are for."""
    lm = lm_on(kind, subject_of(name))
    for prompt, sampling in (("y", RANDOM), (PROMPTS[0], {}), (PROMPTS[2], {})):
        asked = {"max_new_tokens": 24, **sampling}
        expected = backbone(lm, prompt, **asked)
        for drafts in (POOR, PERFECT):
            check_answer(lossless(lm, prompt, drafts, **asked), expected)


@pytest.fixture(params=["torch", "cpu"])
def lm(request: pytest.FixtureRequest) -> RiverLM:
    return lm_on(request.param)


class TestDrafts:
    def test_of_the_backbone_are_accepted(self, lm: RiverLM) -> None:
        for sampling in ({}, RANDOM, {"processors": (NoRepeatNGramLogitsProcessor(2),)}):
            result = lossless(lm, PROMPTS[0], PERFECT, max_new_tokens=31, **sampling)
            assert result.lossless is not None
            assert result.lossless.acceptance_by_position == (1.0,) * 5
            assert result.lossless.verifications == 5

    def test_that_are_no_numbers_cost_nothing_but_time(self) -> None:
        for kind in ("torch", "cpu"):
            lm = lm_on(kind, overflowing_subject())
            for sampling in ({}, RANDOM):
                asked = {"max_new_tokens": 20, **sampling}
                expected = backbone(lm, PROMPTS[0], **asked)
                for drafts in (POOR, DraftConfig()):
                    check_answer(lossless(lm, PROMPTS[0], drafts, **asked), expected)

    @any_drafts
    def test_fit_any_context(self, lm: RiverLM, drafts: DraftConfig) -> None:
        for length in (CONTEXT - 3, CONTEXT - 1, CONTEXT):
            expected = backbone(lm, "ab" * (length // 2) + "c" * (length % 2))
            result = lossless(lm, "ab" * (length // 2) + "c" * (length % 2), drafts)
            check_answer(result, expected)
            assert result.finish_reason == "context"


class TestEnds:
    @pytest.mark.parametrize("place", [0, 2, 4, 7, 10])
    def test_at_a_stop_token_within_a_draft(self, lm: RiverLM, place: int) -> None:
        asked = {"max_new_tokens": 14, **RANDOM}
        lm.stop_tokens = frozenset({backbone(lm, PROMPTS[0], **asked).tokens[place]})
        expected = backbone(lm, PROMPTS[0], **asked)
        assert expected.finish_reason == "stop"
        for drafts in (PERFECT, POOR):
            check_answer(lossless(lm, PROMPTS[0], drafts, **asked), expected)

    @pytest.mark.parametrize(("start", "length"), [(0, 1), (4, 3), (11, 2)])
    def test_at_a_stop_string_within_a_draft(self, lm: RiverLM, start: int, length: int) -> None:
        asked = {"max_new_tokens": 20, **RANDOM}
        whole = backbone(lm, PROMPTS[0], **asked)
        asked["stop"] = ("no", whole.text[start : start + length])
        expected = backbone(lm, PROMPTS[0], **asked)
        for drafts in (PERFECT, POOR):
            result = lossless(lm, PROMPTS[0], drafts, **asked)
            check_answer(result, expected)
            # what was verified behind the stop is in no other answer
            text = PROMPTS[0] + result.text
            again = lm.generate(text, raw=True, policy=None, reuse_cache=True, **asked)
            assert again.tokens == backbone(lm, text, **asked).tokens


class TestStatistics:
    @any_drafts
    def test_are_of_the_tokens_so_far(self, lm: RiverLM, drafts: DraftConfig) -> None:
        responses = list(
            lm.stream(PROMPTS[2], raw=True, policy=None, drafts=drafts, max_new_tokens=24)
        )
        origins = [response.origin for response in responses]
        assert origins[0] == "backbone"
        last = responses[-1].lossless
        assert last is not None
        assert sum(origin != "backbone" for origin in origins) == last.accepted_tokens
        assert origins.count("ngram") == last.ngram_tokens
        verifications = [r.lossless.verifications for r in responses if r.lossless]
        assert verifications == sorted(verifications)
        assert verifications[0] == 0
        assert len(last.acceptance_by_position) <= 12
        assert all(0 <= share <= 1 for share in last.acceptance_by_position)

    def test_of_one_token_have_no_verification(self, lm: RiverLM) -> None:
        statistics = lossless(lm, PROMPTS[0], max_new_tokens=1).lossless
        assert statistics is not None
        assert (statistics.verifications, statistics.draft_share) == (0, None)


class TestBadInput:
    def test_what_the_engine_has_not(self, lm: RiverLM) -> None:
        with pytest.raises(ConfigError, match="drafts are for lossless mode"):
            lm.generate("a", policy=MIXED, drafts=DraftConfig())
        lm.engine.depth_limit = 2
        try:
            with pytest.raises(ConfigError, match="it can't go with no_miss"):
                lm.generate("a")
        finally:
            lm.engine.depth_limit = None

    def test_tokens_that_can_not_be_chosen(self, lm: RiverLM) -> None:
        """They end an answer behind those before them, and nothing else."""
        asked = {"raw": True, "max_new_tokens": 12}
        expected = backbone(lm, PROMPTS[0], max_new_tokens=12).tokens

        def ban_after(count: int) -> Callable[[Tensor, Tensor], Tensor]:
            def ban(token_ids: Tensor, logits: Tensor) -> Tensor:
                is_long = token_ids.shape[1] >= len(PROMPTS[0]) + count
                return torch.full_like(logits, -torch.inf) if is_long else logits

            return ban

        for policy, drafts in ((ExitPolicy.never(), None), (None, PERFECT), (None, POOR)):
            found: list[int] = []
            settings = {**asked, "policy": policy, "drafts": drafts, "processors": (ban_after(4),)}
            with pytest.raises(LogitsError, match="the logits processors leave no token"):
                found.extend(r.token for r in lm.stream(PROMPTS[0], **settings))
            assert found == expected[:4]
            with pytest.raises(LogitsError, match=r"^prompt 1 of 2: "):
                lm.generate_batch(PROMPTS[:2], **settings)
        assert lm.generate(PROMPTS[0], **asked, reuse_cache=True).tokens == expected
        assert len(lm.engine.sequences()) == 1


def test_a_conversation_keeps_what_the_backbone_wrote(lm: RiverLM, rows: list[int]) -> None:
    conversation = Conversation(lm, drafts=POOR, max_new_tokens=5)
    for question in ("Hi", "And you?"):
        answered = [r.token for r in conversation.stream(question)]
        assert rows[0] < (30 if question == "Hi" else 16)
        expected = lm.chat(
            conversation.messages[:-1], policy=ExitPolicy.never(), max_new_tokens=5
        ).tokens
        assert answered == expected
        rows.clear()

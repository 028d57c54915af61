"""Lossless mode on the real SmolLM2: greedy answers are the backbone's, token for token."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from test_smollm2 import PARAGRAPH
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from river_llm import (
    DraftConfig,
    ExitPolicy,
    GenerationResult,
    River,
    RiverConfig,
    RiverLM,
    attach_river,
    detach_river,
)
from river_llm.engines import CpuEngine, TorchEngine

pytest.importorskip("river_llm._core", reason="the native engine was not built")

NEVER = ExitPolicy.never()
LAYERS = (0, 3, 10)
PROMPTS = [
    "Why is the sky blue?",
    "Write a Python function that returns the n-th Fibonacci number.",
    f"Repeat this text word for word: {PARAGRAPH[:240]}",
    "List the numbers from 1 to 30, separated by commas.",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"]} as YAML:',
    "Summarise in one sentence: " + PARAGRAPH[:400],
    "Qu'est-ce que la photosynthèse ? Réponds en français.",
    "SELECT name FROM",
]
SUBJECTS = ["rivers", "glaciers", "bees", "compilers", "Roman roads", "tides", "sourdough bread"]
QUESTIONS = [
    "Explain {0} to a child of ten.",
    "Give five facts about {0}, numbered.",
    "Write a short dialogue between two friends about {0}.",
    "Compare {0} and {1} in a table.",
    "Copy this line three times: I like {0} more than {1}.",
    "Complete the list: {0}, {1},",
    'Correct the spelling: "I hav red a lot abuot {0} and {1}."',
    "def describe_{0}(count: int) -> str:",
    "{0} {1} {0} {1} {0}",
    "In German: what are {0}?",
]
SEVENTY_PROMPTS = [
    question.format(SUBJECTS[i], SUBJECTS[i - 1])
    for question, i in itertools.product(QUESTIONS, range(len(SUBJECTS)))
]


@pytest.fixture(scope="module")
def river(smollm2_bf16: PreTrainedModel) -> River:
    return River.build(smollm2_bf16)


@pytest.fixture(scope="module")
def lm(smollm2_bf16: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, river: River) -> RiverLM:
    """On the native engine; what chat turns end with ends an answer."""
    engine = CpuEngine(smollm2_bf16, river, threads=1)
    return _river_lm(engine, tokenizer, river)


@pytest.fixture(scope="module")
def expected(lm: RiverLM) -> list[GenerationResult]:
    """The backbone's answers."""
    return [lm.generate(prompt, max_new_tokens=48, policy=NEVER) for prompt in PROMPTS]


@pytest.mark.parametrize("drafts", [(1, 0), (4, 3), (8, 10), (None, 3)], ids=str)
def test_answers_are_the_backbones(
    lm: RiverLM, expected: list[GenerationResult], drafts: tuple[int | None, int]
) -> None:
    for prompt, own in zip(PROMPTS, expected, strict=True):
        _check(lm.generate(prompt, max_new_tokens=48, drafts=DraftConfig(*drafts)), own)


def test_answers_are_the_backbones_by_default_alone_and_in_a_batch(
    lm: RiverLM, expected: list[GenerationResult]
) -> None:
    results = [lm.generate(prompt, max_new_tokens=48) for prompt in PROMPTS]
    rows = lm.generate_batch(PROMPTS, max_new_tokens=48)
    for result, row, own in zip(results, rows, expected, strict=True):
        _check(result, own)
        _check(row, own)
    statistics = [result.lossless for result in results if result.lossless is not None]
    assert sum(found.accepted_tokens for found in statistics) > 40
    assert sum(found.ngram_tokens for found in statistics) > 0


@pytest.mark.parametrize(
    "sampling",
    [{"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.1}],
    ids=str,
)
def test_sampled_answers_are_the_backbones(lm: RiverLM, sampling: dict[str, Any]) -> None:
    for seed, prompt in enumerate(PROMPTS[:4]):
        settings: dict[str, Any] = {"max_new_tokens": 32, "seed": seed, **sampling}
        drafts = DraftConfig((None, 4)[seed % 2])
        result = lm.generate(prompt, drafts=drafts, **settings)
        _check(result, lm.generate(prompt, policy=NEVER, **settings))


def test_a_wider_river_is_accepted_more_often(
    smollm2_bf16: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, lm: RiverLM
) -> None:
    """And its answers are the same."""
    wide = River.build(smollm2_bf16, RiverConfig(bits=8, quantizer="rtn"))
    engine = CpuEngine(smollm2_bf16, wide, threads=1)
    wide_lm = _river_lm(engine, tokenizer, wide)
    drafts = DraftConfig(4, 0, 16, ngram=False)
    shares = []
    for each in (lm, wide_lm):
        results = [
            each.generate(prompt, max_new_tokens=32, drafts=drafts) for prompt in PROMPTS[:3]
        ]
        found = [result.lossless for result in results if result.lossless is not None]
        drafted = sum(statistics.drafted_tokens for statistics in found)
        shares.append(sum(statistics.accepted_tokens for statistics in found) / drafted)
        texts = [result.tokens for result in results]
        assert texts == [
            lm.generate(p, max_new_tokens=32, policy=NEVER).tokens for p in PROMPTS[:3]
        ]
    assert shares[0] < shares[1]
    assert shares[1] > 0.8


@pytest.mark.slow
class TestSeventyPrompts:
    """In batches of four, with every length of a draft and every exit layer in turn."""

    DRAFTS = tuple(
        DraftConfig(tokens, layer) for tokens in (*range(1, 9), None) for layer in LAYERS
    )

    def test_on_the_native_engine(self, lm: RiverLM) -> None:
        self.check(lm, max_new_tokens=64)

    def test_on_the_torch_engine_in_float32(
        self, smollm2: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        attached = attach_river(smollm2, policy=ExitPolicy.never())
        try:
            river_lm = RiverLM(
                TorchEngine(attached), tokenizer, attached.config, _stop_tokens(tokenizer)
            )
            self.check(river_lm, max_new_tokens=16)
        finally:
            detach_river(smollm2)

    def check(self, lm: RiverLM, max_new_tokens: int) -> None:
        settings = {"max_new_tokens": max_new_tokens}
        for number, first in enumerate(range(0, len(SEVENTY_PROMPTS), 4)):
            batch = SEVENTY_PROMPTS[first : first + 4]
            drafts = self.DRAFTS[number % len(self.DRAFTS)]
            rows = lm.generate_batch(batch, drafts=drafts, **settings)
            for prompt, row, own in zip(
                batch, rows, lm.generate_batch(batch, policy=NEVER, **settings), strict=True
            ):
                assert row.tokens == own.tokens, f"{prompt!r} with {drafts}"


def _river_lm(engine: CpuEngine, tokenizer: PreTrainedTokenizerBase, river: River) -> RiverLM:
    return RiverLM(engine, tokenizer, river.config, _stop_tokens(tokenizer))


def _stop_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    return frozenset({tokenizer.eos_token_id})


def _check(result: GenerationResult, expected: GenerationResult) -> None:
    assert result.tokens == expected.tokens
    assert (result.text, result.finish_reason) == (expected.text, expected.finish_reason)

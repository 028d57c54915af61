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
LENGTHS = (1, 4, 8, None)
PROMPTS = [
    "Why is the sky blue?",
    "Write a Python function that returns the n-th Fibonacci number.",
    f"Repeat this text word for word: {PARAGRAPH[:240]}",
    "List the numbers from 1 to 30, separated by commas.",
    "Translate into French: The river rises in the mountains and flows to the sea.",
    "Tell me a story about a lighthouse keeper and a whale.",
    '{"name": "Ada", "born": 1815, "fields": ["mathematics", "computing"]} as YAML:',
    "What is 17 * 23? Think step by step.",
    "Summarise in one sentence: " + PARAGRAPH[:400],
    "A poem of four lines about rain",
    "Qu'est-ce que la photosynthèse ? Réponds en français.",
    "SELECT name FROM",
]
SUBJECTS = ["rivers", "glaciers", "bees", "compilers", "Roman roads", "tides", "sourdough bread"]
QUESTIONS = [
    "Explain {} to a child of ten.",
    "Write a haiku about {}.",
    "Give five facts about {}, numbered.",
    "What do most people get wrong about {}?",
    "Write a short dialogue between two friends about {}.",
    "Compare {} and {other} in a table.",
    "Copy this line three times: I like {} more than {other}.",
    "Complete the list: {}, {other},",
    'Correct the spelling: "I hav red a lot abuot {} and {other}."',
    "def describe_{}(count: int) -> str:",
    "Who first wrote about {}, and when?",
    "Name a book on {} and say why it is good.",
    "Turn into a headline: a town had to close its school because of {}.",
    "{} {other} {} {other} {}",
    "In German: what are {}?",
]


def hundred_prompts() -> list[str]:
    """Questions, orders, code and lists on many subjects, of many lengths."""
    pairs = itertools.product(QUESTIONS, range(len(SUBJECTS)))
    prompts = [
        question.replace("{other}", SUBJECTS[i - 1]).replace("{}", SUBJECTS[i])
        for question, i in pairs
    ]
    assert len(set(prompts)) >= 100
    return prompts[:100]


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


@pytest.mark.parametrize(
    ("tokens", "exit_layer", "first"),
    [(n, layer, i % 3) for i, (n, layer) in enumerate(itertools.product(LENGTHS, LAYERS))],
)
def test_answers_are_the_backbones(
    lm: RiverLM,
    expected: list[GenerationResult],
    tokens: int | None,
    exit_layer: int,
    first: int,
) -> None:
    """Every length of a draft with every exit layer, on a third of the prompts each."""
    drafts = DraftConfig(tokens, exit_layer)
    for prompt, own in list(zip(PROMPTS, expected, strict=True))[first::3]:
        result = lm.generate(prompt, max_new_tokens=48, drafts=drafts)
        _check(result, own)


def test_answers_are_the_backbones_by_default(
    lm: RiverLM, expected: list[GenerationResult]
) -> None:
    results = [lm.generate(prompt, max_new_tokens=48) for prompt in PROMPTS]
    for result, own in zip(results, expected, strict=True):
        _check(result, own)
    statistics = [result.lossless for result in results if result.lossless is not None]
    assert sum(found.accepted_tokens for found in statistics) > 60
    assert sum(found.ngram_tokens for found in statistics) > 0


@pytest.mark.parametrize("drafts", [DraftConfig(), DraftConfig(4, 3)], ids=["adaptive", "fixed"])
def test_answers_of_a_batch_are_the_backbones(
    lm: RiverLM, expected: list[GenerationResult], drafts: DraftConfig
) -> None:
    for chosen in ([0, 2, 3, 7], [8, 11, 1, 6]):
        prompts = [PROMPTS[i] for i in chosen]
        rows = lm.generate_batch(prompts, max_new_tokens=48, drafts=drafts)
        for row, i in zip(rows, chosen, strict=True):
            _check(row, expected[i])


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
class TestHundredPrompts:
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
        prompts = hundred_prompts()
        settings = {"max_new_tokens": max_new_tokens}
        for number, first in enumerate(range(0, len(prompts), 4)):
            batch = prompts[first : first + 4]
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

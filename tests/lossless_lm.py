"""What tests of lossless mode share: a tiny model on either engine, drafts to choose from, the
answers of both modes, and how they must compare."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from native_engines import Subject
from tiny_lm import character_tokenizer, sharpened
from torch import Tensor

from river_llm import (
    Conversation,
    DraftConfig,
    ExitPolicy,
    GenerationResponse,
    GenerationResult,
    River,
    RiverLM,
)
from river_llm.engines import Draft, Engine, StepResult
from river_llm.lossless import LosslessStatistics
from river_llm.quantization import QuantizedMatrix
from river_llm.sampling import SamplingConfig

CONTEXT = 64
NUM_LAYERS = 4
PROMPTS = ["Hello, river", "y", "abcabcabcab", "Who are you? Hm"]
MIXED = ExitPolicy.similarity(0.9)  # what lossless mode must not follow
RANDOM: dict[str, Any] = {"temperature": 1.0, "seed": 5}
# Drafts of the backbone itself: all are accepted.
PERFECT = DraftConfig(tokens=5, exit_layer=NUM_LAYERS, lm_head_bits=16, ngram=False)
POOR = DraftConfig(tokens=3, exit_layer=0)
DRAFTS = [DraftConfig(), POOR, PERFECT]
SAME = ("tokens", "text", "exit_layers", "finish_reason", "prompt_tokens", "policy", "num_layers")

both_engines = pytest.mark.parametrize("kind", ["torch", "cpu"])
any_drafts = pytest.mark.parametrize("drafts", DRAFTS, ids=["adaptive", "poor", "perfect"])


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


# ---- models ----


@cache
def subject_with(context_length: int) -> Subject:
    subject = Subject("Llama", {"max_position_embeddings": context_length})
    sharpened(subject.model)
    return subject


@cache
def subject_with_noise() -> Subject:
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


def overflowing_subject() -> Subject:
    """The river gives no numbers."""
    subject = Subject("Llama", {"max_position_embeddings": CONTEXT})
    for exit_layer in subject.river.exit_layers:
        exit_layer["mlp.down_proj"].scales.fill_(math.nan)
    return subject


def lm_on(
    kind: str,
    subject: Subject | None = None,
    river_directory: Path | None = None,
    kv_bits: int = 16,
) -> RiverLM:
    """A model on one of the engines, with an empty cache and nothing learnt: float32 on the torch
    engine, bfloat16 on the native one; no stop tokens."""
    subject = subject or subject_with(CONTEXT)
    engine = (
        subject.reference(MIXED, kv_bits)
        if kind == "torch"
        else subject.engine(MIXED, kv_bits=kv_bits)
    )
    tokenizer = character_tokenizer()
    return RiverLM(engine, tokenizer, subject.river.config, river_directory=river_directory)


# ---- answers ----


def backbone(lm: RiverLM, prompt: str, **settings: Any) -> GenerationResult:
    """What the prompt gives without exits and drafts."""
    lm.policy = ExitPolicy.never()
    result = lm.generate(prompt, raw=True, **settings)
    lm.policy = MIXED
    return result


def backbone_batch(lm: RiverLM, prompts: list[str], **settings: Any) -> list[GenerationResult]:
    lm.policy = ExitPolicy.never()
    rows = lm.generate_batch(prompts, raw=True, **settings)
    lm.policy = MIXED
    return rows


def lossless(
    lm: RiverLM, prompt: str, drafts: DraftConfig | None, **settings: Any
) -> GenerationResult:
    return lm.generate(prompt, raw=True, mode="lossless", drafts=drafts, **settings)


def lossless_batch(
    lm: RiverLM, prompts: list[str], drafts: DraftConfig, **settings: Any
) -> list[GenerationResult]:
    return lm.generate_batch(prompts, raw=True, mode="lossless", drafts=drafts, **settings)


def lossless_stream(
    lm: RiverLM, prompt: str, drafts: DraftConfig, **settings: Any
) -> Iterator[GenerationResponse]:
    return lm.stream(prompt, raw=True, mode="lossless", drafts=drafts, **settings)


def lossless_after(lm: RiverLM, token_ids: list[int], reuse_cache: bool) -> list[int]:
    """The next tokens in lossless mode."""
    sampling = SamplingConfig(max_new_tokens=12)
    stream = lm.stream_tokens(token_ids, sampling, reuse_cache, mode="lossless", drafts=POOR)
    return [response.token for response in stream]


def reply(conversation: Conversation, question: str) -> str:
    return "".join(response.text for response in conversation.stream(question))


def check_answer(result: GenerationResult, expected: GenerationResult) -> None:
    """See that an answer of lossless mode is the backbone's, in every field but the measured."""
    assert result.mode == "lossless"
    for name in SAME:
        assert getattr(result, name) == getattr(expected, name), name


def check_answers(results: list[GenerationResult], expected: list[GenerationResult]) -> None:
    """The same for every row of a batch."""
    for result, own in zip(results, expected, strict=True):
        check_answer(result, own)


def statistics_of(answer: GenerationResult | GenerationResponse) -> LosslessStatistics:
    assert answer.lossless is not None
    return answer.lossless


def check_statistics(result: GenerationResult) -> None:
    """See that they add up to the tokens of the answer."""
    statistics = statistics_of(result)
    tokens = len(result.tokens) - 1  # the first is the prefill's
    accepted = statistics.accepted_tokens
    # a verification gives one token more than it accepts, unless the answer ends within its draft
    ended_within = int(tokens == accepted + statistics.verifications - 1)
    assert tokens == accepted + statistics.verifications - ended_within
    if result.finish_reason != "stop":
        assert not ended_within
    if tokens:
        assert statistics.tokens_per_verification == pytest.approx(
            tokens / statistics.verifications
        )
        assert statistics.draft_share == pytest.approx(accepted / tokens)
    assert 0 <= statistics.ngram_tokens <= accepted <= statistics.drafted_tokens
    assert all(0 <= share <= 1 for share in statistics.acceptance_by_position)
    assert statistics.verify_seconds > 0 or not tokens
    assert statistics.draft_seconds > 0 or not tokens

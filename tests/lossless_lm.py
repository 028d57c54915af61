"""What tests of generation share: a tiny model on either engine, its backbone's answers, and how
those of lossless mode must compare."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
from native_engines import Subject
from tiny_lm import character_tokenizer, sharpened

from river_llm import DraftConfig, ExitPolicy, GenerationResult, RiverLM
from river_llm.engines import CpuEngine, TorchEngine
from river_llm.engines.step import Step, StepResult

CONTEXT = 64
NUM_LAYERS = 4
PROMPTS = ["Hello, river", "y", "abcabcabcab", "Who are you? Hm"]
MIXED = ExitPolicy.similarity(0.9)
RANDOM: dict[str, Any] = {"temperature": 1.0, "seed": 5}
# Drafts of the backbone itself: all are accepted.
PERFECT = DraftConfig(tokens=5, exit_layer=NUM_LAYERS, lm_head_bits=16, ngram=False)
POOR = DraftConfig(tokens=3, exit_layer=0)
DRAFTS = [DraftConfig(), POOR, PERFECT]
SAME = ("tokens", "text", "exit_layers", "finish_reason", "prompt_tokens", "policy", "num_layers")

both_engines = pytest.mark.parametrize("kind", ["torch", "cpu"])
any_drafts = pytest.mark.parametrize("drafts", DRAFTS, ids=["adaptive", "poor", "perfect"])


@cache
def subject_with(context_length: int) -> Subject:
    subject = Subject("Llama", {"max_position_embeddings": context_length})
    sharpened(subject.model)
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
    policy: ExitPolicy | None = None,
    **settings: Any,
) -> RiverLM:
    """A model on one of the engines, with an empty cache and nothing learnt: float32 on the torch
    engine, bfloat16 on the native one; no stop tokens."""
    subject = subject or subject_with(CONTEXT)
    engine = subject.reference(**settings) if kind == "torch" else subject.engine(**settings)
    return RiverLM(engine, character_tokenizer(), subject.river.config, policy=policy)


def backbone(lm: RiverLM, prompt: str, **settings: Any) -> GenerationResult:
    """What the prompt gives without exits and drafts."""
    return lm.generate(prompt, raw=True, policy=ExitPolicy.never(), **settings)


def lossless(
    lm: RiverLM, prompt: str, drafts: DraftConfig | None = None, **settings: Any
) -> GenerationResult:
    return lm.generate(prompt, raw=True, policy=None, drafts=drafts, **settings)


def check_answer(result: GenerationResult, expected: GenerationResult) -> None:
    """Validate that an answer of lossless mode is the backbone's, in every field but the measured,
    and that its statistics add up."""
    assert result.mode == "lossless"
    for name in SAME:
        assert getattr(result, name) == getattr(expected, name), name
    statistics = result.lossless
    assert statistics is not None
    tokens = len(result.tokens) - 1  # the first is the prefill's
    accepted = statistics.accepted_tokens
    # a verification gives one token more than it accepts, unless the answer ends within its draft
    assert tokens - accepted in {statistics.verifications, statistics.verifications - 1}
    assert 0 <= statistics.ngram_tokens <= accepted <= statistics.drafted_tokens
    if tokens:
        assert statistics.tokens_per_verification == tokens / statistics.verifications
        assert statistics.draft_share == accepted / tokens
        assert statistics.verify_seconds > 0


class RowSpy:
    """How many rows of each sequence the steps of an engine had since."""

    def __init__(self, engine: CpuEngine | TorchEngine, patched: pytest.MonkeyPatch) -> None:
        self.rows: list[int] = []
        forward = engine.forward

        def spy(step: Step) -> StepResult:
            self.rows.append(len(step.tokens))
            return forward(step)

        patched.setattr(engine, "forward", spy)

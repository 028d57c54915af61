"""Prompt caches on the real SmolLM2: questions about a text that is read once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from native_engines import cached_states
from test_smollm2 import PARAGRAPH
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from river_llm import ExitPolicy, RiverConfig, RiverLM, attach_river, detach_river
from river_llm.config import Mode
from river_llm.engines import StepResult, TorchEngine

QUESTIONS = ["Who climbed the stairs?", "What did his daughter teach, and where?"]
POLICY = ExitPolicy.similarity(0.97)


@pytest.fixture(scope="module")
def native() -> RiverLM:
    """In bfloat16 on the native engine."""
    return RiverLM.from_pretrained("smollm2", policy=POLICY, engine="cpu", threads=1)


@pytest.fixture
def reference(smollm2: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Iterator[RiverLM]:
    """In float32 on PyTorch's."""
    config = RiverConfig(quantizer="rtn")
    attached = attach_river(smollm2, config, policy=POLICY)
    yield RiverLM(TorchEngine(attached), tokenizer, config, frozenset({2}))
    detach_river(smollm2)


@pytest.mark.parametrize("mode", ["river", "lossless"])
def test_a_second_question_runs_alone(native: RiverLM, mode: Mode, tmp_path: Path) -> None:
    check_second_question(native, PARAGRAPH * 3, mode, tmp_path / "lighthouse")


def test_a_second_question_runs_alone_on_pytorch(reference: RiverLM, tmp_path: Path) -> None:
    check_second_question(reference, PARAGRAPH, "river", tmp_path / "lighthouse")


def check_second_question(lm: RiverLM, text: str, mode: Mode, path: Path) -> None:
    """See that its answer is that of the whole prompt."""
    ran: list[int] = []
    prefill = lm.engine.prefill

    def spy(token_ids: Tensor, padding_mask: Tensor | None = None) -> StepResult:
        ran.append(token_ids.numel())
        return prefill(token_ids, padding_mask)

    options: dict[str, Any] = {"mode": mode, "max_new_tokens": 8}
    first = lm.generate(f"{text}\n{QUESTIONS[0]}", **{**options, "max_new_tokens": 1})
    prompt = f"{text}\n{QUESTIONS[1]}"
    lm.save_prompt_cache(path, first.prompt_tokens)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(lm.engine, "prefill", spy)
        expected = lm.generate(prompt, **options)
        states = cached_states(lm.engine)
        lm.load_prompt_cache(path, mode)
        result = lm.generate(prompt, reuse_cache=True, **options)
    assert result.tokens == expected.tokens
    assert result.exit_layers == expected.exit_layers
    if lm.engine.name == "cpu":
        assert torch.equal(cached_states(lm.engine), states)
    assert ran == [expected.prompt_tokens, result.prompt_tokens - result.cached_prompt_tokens]
    assert ran[0] > 300
    assert ran[1] < 25

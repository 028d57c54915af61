"""The strategies on a real model, beside their definitions."""

from __future__ import annotations

import pytest
import torch
from strategy_models import WITH_EXITS, engine_on, exits_of, follow, logits_of
from strategy_reference import run_text
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from river_llm import ExitPolicy
from river_llm.config import Strategy

TEXT = "The river runs from the mountains to the sea, and the sea gives its water back."
PROMPT, NUM_LAYERS = 6, 30
POLICY = ExitPolicy.similarity(0.97)


@pytest.mark.parametrize("strategy", WITH_EXITS)
def test_follows_the_definition(
    smollm2: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, strategy: Strategy
) -> None:
    text = tokenizer(TEXT, return_tensors="pt").input_ids
    with engine_on(smollm2, strategy, POLICY) as engine:
        steps = follow(engine, text, PROMPT)
    thresholds = POLICY.thresholds(NUM_LAYERS)
    of_tokens = [None] * PROMPT + [thresholds] * (text.shape[1] - PROMPT)
    implementation = smollm2.config._attn_implementation
    smollm2.set_attn_implementation("eager")
    try:
        logits, exit_layers = run_text(smollm2, strategy, text[0].tolist(), of_tokens)
    finally:
        smollm2.set_attn_implementation(implementation)
    assert exits_of(steps) == exit_layers[PROMPT - 1 :]
    assert len(set(exit_layers)) >= (2 if strategy == "monotonic" else 4)
    torch.testing.assert_close(logits_of(steps), logits[PROMPT - 1 :], rtol=1e-3, atol=2e-3)


def test_a_token_that_goes_all_the_way_has_the_backbones_logits_after_recomputation(
    smollm2: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    text = tokenizer(TEXT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = smollm2(text).logits[:, -1]
    with engine_on(smollm2, "recompute", POLICY) as engine:
        follow(engine, text[:, :-1], PROMPT)
        engine.policy = ExitPolicy.never()
        found = engine.decode(text[:, -1]).logits
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)

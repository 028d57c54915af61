"""Lossless mode on every architecture of the native engine, beside the same engine alone."""

from __future__ import annotations

from typing import Any

import pytest
from native_engines import CASES, Subject
from tiny_lm import character_tokenizer, sharpened

from river_llm import DraftConfig, ExitPolicy, RiverLM

PROMPTS = ["y", "abcabcabcabc"]
DRAFTS = [DraftConfig(tokens=3, exit_layer=0), DraftConfig(tokens=5, exit_layer=1), DraftConfig()]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("engine", ["cpu", "torch"])
def test_has_the_tokens_of_the_backbone(name: str, engine: str) -> None:
    """Where angles depend on the length (longrope) too, to the end of the context."""
    model_type, settings = CASES[name]
    subject = Subject(model_type, {**settings, "max_position_embeddings": 64})
    sharpened(subject.model)
    made: Any = subject.engine if engine == "cpu" else subject.reference
    lm = RiverLM(made(ExitPolicy.never()), character_tokenizer(), subject.river.config)
    for i, prompt in enumerate(PROMPTS):
        for sampling in ({}, {"temperature": 1.0, "seed": i}):
            plain = lm.generate(prompt, raw=True, max_new_tokens=60, **sampling)
            for drafts in DRAFTS:
                found = lm.generate(
                    prompt, raw=True, max_new_tokens=60, mode="lossless", drafts=drafts, **sampling
                )
                assert found.tokens == plain.tokens

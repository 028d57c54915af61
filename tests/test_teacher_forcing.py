"""Texts along an engine: what they are held against is generation."""

from __future__ import annotations

import torch
from native_engines import engine_of, random_tokens
from steps import begin, decode_along, thresholds_of

from river_llm.measure.teacher_forcing import ScoredText, score_texts


def test_a_prompt_has_the_rotary_angles_of_its_length() -> None:
    """It is longer than the boundary, 16, and many of its tokens stand before that."""
    engine, tokens = engine_of("phi3, longrope"), random_tokens(30, seed=4)
    expected, _ = decode_along(engine, tokens, 20)
    begin(engine, [])
    ((found, _),) = score_texts(engine, [ScoredText(tokens, thresholds_of(engine), first=19)])
    assert torch.equal(found, expected)

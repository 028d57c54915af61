"""Tokens that the model's embedding has no row for: the same line on every engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lossless_lm import lm_on
from steps import append, begin
from tiny_lm import character_tokenizer
from tiny_models import VOCABULARY

from river_llm import RiverConfig, RiverError, RiverLM
from river_llm.engines import DraftRule
from river_llm.engines.step import Drafting

ABOVE = (
    rf"^there is no token {VOCABULARY}: the model's embedding has {VOCABULARY} rows, .* take the "
    r"model's own tokenizer, or resize the embedding \(resize_token_embeddings\)$"
)
BELOW = rf"^there is no token -2; token ids are 0 to {VOCABULARY - 1}$"
UNKNOWN = r"^there is no token -1; .* \(-1 comes from logits that are no numbers\)$"


@pytest.fixture(params=["torch", "cpu"])
def engine(request: pytest.FixtureRequest) -> Any:
    return lm_on(request.param).engine


@pytest.mark.parametrize(("token", "message"), [(VOCABULARY, ABOVE), (-2, BELOW), (-1, UNKNOWN)])
def test_are_refused_and_the_cache_stays(engine: Any, token: int, message: str) -> None:
    first, second = begin(engine, [0, 0])
    for sequence in (first, second):
        append(engine, {sequence: [5, 6, 7]})
    with pytest.raises(RiverError, match=message):
        append(engine, {first: [8, token, 9]})
    if isinstance(engine, Drafting):
        with pytest.raises(RiverError, match=message):
            engine.draft([first], [token], [2], DraftRule())
    assert engine.length(first) == 3
    found, expected = (append(engine, {one: [8]}).logits for one in (first, second))
    assert torch.equal(found, expected)


def test_come_from_a_tokenizer_that_is_larger_than_the_embedding(engine: Any) -> None:
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    lm = RiverLM(engine, tokenizer, RiverConfig())
    with pytest.raises(RiverError, match=ABOVE):
        lm.generate("Hi <|user|> there", raw=True, max_new_tokens=3)
    assert len(lm.generate("Hi there", raw=True, max_new_tokens=3).tokens) == 3

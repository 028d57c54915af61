"""Tokens that the model's embedding has no row for: the same line on every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from byte_models import byte_lm, byte_model, byte_tokenizer, save_folder
from lossless_lm import lm_on
from tiny_lm import character_tokenizer
from tiny_models import VOCABULARY

from river_llm import RiverError, RiverLM
from river_llm.engines import DraftRule

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
@pytest.mark.parametrize("verb", ["prefill", "decode", "score", "verify", "draft"])
def test_are_refused_and_the_cache_stays(engine: Any, verb: str, token: int, message: str) -> None:
    arguments: dict[str, tuple[Any, ...]] = {
        "decode": (torch.tensor([token]),),
        "draft": ([token], [2], DraftRule()),
    }
    engine.prefill(torch.tensor([[5, 6, 7]]))
    with pytest.raises(RiverError, match=message):
        getattr(engine, verb)(*arguments.get(verb, (torch.tensor([[8, token, 9]]),)))
    assert engine.length == 3
    found = engine.decode(torch.tensor([8])).logits
    engine.truncate(0)
    engine.prefill(torch.tensor([[5, 6, 7]]))
    assert torch.equal(engine.decode(torch.tensor([8])).logits, found)


@pytest.mark.parametrize("shape", [(0,), (1, 0), (1, 1, 1)])
def test_of_a_wrong_shape_or_type_are_refused(engine: Any, shape: tuple[int, ...]) -> None:
    with pytest.raises(RiverError, match=r"token ids are \[.*\]; give \[batch, tokens\]"):
        engine.prefill(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(RiverError, match="token ids are whole numbers, not float32"):
        engine.decode(torch.tensor([5.0]))


def test_come_from_a_tokenizer_that_is_larger_than_the_embedding(engine: Any) -> None:
    tokenizer = character_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>"]})
    lm = RiverLM(engine, tokenizer, None)
    with pytest.raises(RiverError, match=ABOVE):
        lm.generate("Hi <|user|> there", raw=True, max_new_tokens=3)
    assert len(lm.generate("Hi there", raw=True, max_new_tokens=3).tokens) == 3


@pytest.mark.parametrize(("extra", "is_told"), [("<|user|>", True), ("<image_soft_token>", False)])
def test_a_tokenizer_with_more_tokens_than_rows_is_told_when_it_is_loaded(
    extra: str, is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = save_folder(tmp_path / "model", byte_model(vocab_size=259), byte_tokenizer([extra]))
    for _ in range(2):  # from its files, then from its packed copy
        caplog.clear()
        byte_lm(folder)
        messages = [record.getMessage() for record in caplog.records]
        assert [extra in message for message in messages] == [True] * is_told

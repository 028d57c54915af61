"""Logits that are no numbers end an answer in one line on every engine, and harm no other."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from lossless_lm import MIXED, both_engines, lm_on
from tiny_lm import tiny_lm
from tiny_models import tiny_model

from river_llm import DraftConfig, RiverLM
from river_llm.engines import CpuEngine, StepResult
from river_llm.engines.step import check_logits
from river_llm.errors import LogitsError

PROMPT, OTHER = "Hello, river", "y"
SAMPLED = {"temperature": 1.0, "seed": 3}
NO_NUMBERS = "^the logits are no numbers: "
# all drafts are accepted
LOSSLESS = {"policy": None, "drafts": DraftConfig(tokens=3, exit_layer=4, ngram=False)}

greedy_and_sampled = pytest.mark.parametrize("settings", [{}, SAMPLED], ids=["greedy", "sampled"])

nan, inf = math.nan, math.inf
NONE_OF_THESE = {
    "nan": [0.5, nan, 2.0],
    "nan first": [nan, 0.5, 2.0],
    "all nan": [nan, nan, nan],
    "infinite": [0.5, inf, 2.0],
    "nan beside infinity": [inf, nan, -inf],
    "all banned": [-inf, -inf, -inf],
}


@contextmanager
def without_numbers(lm: RiverLM, token: int) -> Iterator[None]:
    """The embedding of a token is no number."""
    engine: Any = lm.engine
    if isinstance(engine, CpuEngine):
        row, broken = engine.embedding[token], 0x7FC0
    else:
        row, broken = engine.model.get_input_embeddings().weight.data[token].numpy(), nan
    before = row.copy()
    row[3] = broken
    try:
        yield
    finally:
        row[:] = before


@greedy_and_sampled
@pytest.mark.parametrize("mode", [{}, LOSSLESS], ids=["river", "lossless"])
@both_engines
class TestAnswers:
    def test_end_where_the_next_token_can_not_be_chosen(
        self, kind: str, mode: dict[str, Any], settings: dict[str, Any]
    ) -> None:
        lm = lm_on(kind, policy=MIXED)
        settings = {"raw": True, "max_new_tokens": 12, **settings, **mode}
        expected = lm.generate(PROMPT, **settings).tokens
        other = lm.generate(OTHER, **settings).tokens
        prompt = lm.tokenizer(PROMPT + OTHER).input_ids
        # the first token of the answer that is new, but for the first of all
        place = next(i for i, t in enumerate(expected) if i and t not in prompt + expected[:i])
        with without_numbers(lm, expected[place]):
            found: list[int] = []
            stream = lm.stream(PROMPT, **settings)
            with pytest.raises(LogitsError, match=NO_NUMBERS) as caught:
                found.extend(response.token for response in stream)
            assert found == expected[: place + 1]
            assert "\n" not in str(caught.value)
            if expected[place] not in other:
                assert lm.generate(OTHER, reuse_cache=True, **settings).tokens == other
        assert lm.generate(PROMPT, reuse_cache=True, **settings).tokens == expected

    def test_do_not_start_behind_such_a_prompt(
        self, kind: str, mode: dict[str, Any], settings: dict[str, Any]
    ) -> None:
        lm = lm_on(kind, policy=MIXED)
        settings = {"raw": True, "max_new_tokens": 3, **settings, **mode}
        (token,) = lm.tokenizer("y").input_ids
        with without_numbers(lm, token):
            with pytest.raises(LogitsError, match=NO_NUMBERS):
                next(iter(lm.stream("Hey", **settings)))
            with pytest.raises(LogitsError, match=f"^prompt 2 of 3: {NO_NUMBERS[1:]}"):
                lm.generate_batch(["abc", "Hey", "Hey"], **settings)
        assert len(lm.generate("Hey", **settings).tokens) == 3


@greedy_and_sampled
def test_an_overflow_of_float16_names_bfloat16(settings: dict[str, Any]) -> None:
    def overflowing(dtype: torch.dtype) -> RiverLM:
        model = tiny_model("Llama", intermediate_size=128)
        for name in ("up_proj", "gate_proj"):
            getattr(model.model.layers[1].mlp, name).weight.data.mul_(1000)
        return tiny_lm(model.to(dtype))

    settings = {"raw": True, "max_new_tokens": 3, **settings}
    assert len(overflowing(torch.bfloat16).generate(PROMPT, **settings).tokens) == 3
    with pytest.raises(LogitsError, match=r"left float16's range; take --dtype bfloat16$"):
        overflowing(torch.float16).generate(PROMPT, **settings)


@pytest.mark.parametrize("logits", NONE_OF_THESE.values(), ids=NONE_OF_THESE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_best_token_is_none_where_the_largest_logit_is_no_number(
    logits: list[float], dtype: torch.dtype
) -> None:
    good = torch.tensor([[0.5, -inf, 0.5]], dtype=dtype)
    check_logits(good)
    both = torch.cat([good, torch.tensor([logits], dtype=dtype)])
    assert StepResult(both, torch.zeros(2)).best_tokens.tolist() == [0, -1]
    reason = "take --dtype bfloat16" if dtype is torch.float16 else "may be damaged"
    with pytest.raises(LogitsError, match=f"^row: the logits are no numbers: .*{reason}"):
        check_logits(both, "row: ")

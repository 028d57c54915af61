from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_lm import sharpened, tiny_lm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from river_llm import ConfigError, ExitPolicy, GenerationResult, RiverLM

PROMPTS = ["Hi", "A rather longer prompt", "y", "In between?"]
POLICIES = [
    ExitPolicy.never(),
    ExitPolicy.always(),
    ExitPolicy.fixed(2, prefill="sequence"),
    ExitPolicy.similarity(0.87),
    ExitPolicy.similarity(0.87, prefill="token"),
    ExitPolicy.similarity(0.8, prefill="sequence"),
]


@pytest.fixture
def lm(tiny_llama: PreTrainedModel) -> RiverLM:
    return tiny_lm(sharpened(tiny_llama))


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: f"{policy.kind}-{policy.prefill}")
@pytest.mark.parametrize("sampling", [{}, {"temperature": 1.0, "seed": 40}], ids=["greedy", "seed"])
class TestRows:
    def test_are_the_prompts_alone(
        self, lm: RiverLM, policy: ExitPolicy, sampling: dict[str, Any]
    ) -> None:
        lm.policy = policy
        rows = lm.generate_batch(PROMPTS, raw=True, max_new_tokens=15, **sampling)
        _check_rows(lm, rows, max_new_tokens=15, **sampling)

    def test_leave_the_others_alone_when_they_end(
        self, lm: RiverLM, policy: ExitPolicy, sampling: dict[str, Any]
    ) -> None:
        lm.policy = policy
        whole = lm.generate_batch(PROMPTS, raw=True, max_new_tokens=15, **sampling)
        lm.stop_tokens = frozenset(row.tokens[4 * i] for i, row in enumerate(whole))
        rows = lm.generate_batch(PROMPTS, raw=True, max_new_tokens=15, **sampling)
        assert [row.finish_reason for row in rows] == ["stop"] * len(PROMPTS)
        assert len({len(row.tokens) for row in rows}) > 1
        _check_rows(lm, rows, max_new_tokens=15, **sampling)


def test_rows_of_a_model_with_absolute_positions_are_the_prompts_alone() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=64, n_layer=3, n_head=4)
    config.pad_token_id = config.eos_token_id = config.bos_token_id = None
    config.tie_word_embeddings = False
    model = sharpened(GPT2LMHeadModel(config).eval())
    model.transformer.wpe.weight.data.mul_(3)
    lm = tiny_lm(model)
    rows = lm.generate_batch(PROMPTS, raw=True, max_new_tokens=15)
    _check_rows(lm, rows, max_new_tokens=15)


def test_rows_leave_the_backbone_each_on_its_own(lm: RiverLM) -> None:
    lm.policy = ExitPolicy.similarity(0.87)
    rows = lm.generate_batch(PROMPTS, raw=True, max_new_tokens=15)
    steps = zip(*(row.exit_layers for row in rows), strict=True)
    assert any(len(set(layers)) > 1 for layers in steps)


def test_by_the_minimum_rows_leave_together(lm: RiverLM) -> None:
    lm.policy = ExitPolicy.similarity(0.8, batch="minimum")
    rows = lm.generate_batch(PROMPTS, raw=True, max_new_tokens=15)
    assert rows[0].exit_layers == rows[1].exit_layers == rows[2].exit_layers
    assert len(set(rows[0].exit_layers[1:])) > 1


def test_a_row_that_has_ended_runs_no_more(lm: RiverLM) -> None:
    whole = lm.generate_batch(PROMPTS, raw=True, max_new_tokens=15)
    lm.stop_tokens = frozenset(row.tokens[4 * i] for i, row in enumerate(whole))
    batches: list[int] = []
    decode = lm.engine.decode
    lm.engine.decode = lambda tokens: batches.append(len(tokens)) or decode(tokens)  # type: ignore[method-assign,func-returns-value]
    rows = lm.generate_batch(PROMPTS, raw=True, max_new_tokens=15)
    steps = max(len(row.tokens) for row in rows)
    assert batches == [sum(len(row.tokens) > step for row in rows) for step in range(1, steps)]
    assert batches[-1] < len(PROMPTS)


def test_a_row_that_has_ended_holds_no_other_back(lm: RiverLM) -> None:
    lm.policy = ExitPolicy.similarity(0.84, batch="minimum")
    lm.stop_tokens = frozenset(lm.generate(PROMPTS[0], raw=True, max_new_tokens=1).tokens)
    alone = lm.generate(PROMPTS[2], raw=True, max_new_tokens=20)
    rows = lm.generate_batch([PROMPTS[0], PROMPTS[2]], raw=True, max_new_tokens=20)
    assert len(rows[0].tokens) == 1
    assert rows[1].exit_layers == alone.exit_layers
    assert len(set(alone.exit_layers[1:])) > 1


def test_tokens_of_a_row_that_has_ended_count_as_held_back_no_more(lm: RiverLM) -> None:
    lm.engine.depth_limit = 2
    whole = lm.generate_batch(PROMPTS, raw=True, max_new_tokens=15)
    lm.stop_tokens = frozenset(row.tokens[4 * i] for i, row in enumerate(whole))

    def held_back(prompts: list[str]) -> int:
        before = lm.engine.offload_statistics.held_back
        lm.generate_batch(prompts, raw=True, max_new_tokens=15)
        return lm.engine.offload_statistics.held_back - before

    assert held_back(PROMPTS) == sum(held_back([prompt]) for prompt in PROMPTS) > 0


def test_a_single_prompt_is_generate(lm: RiverLM) -> None:
    _check_rows(lm, lm.generate_batch(PROMPTS[:1], raw=True, max_new_tokens=9), max_new_tokens=9)


def test_rows_end_where_the_longest_fills_the_context(lm: RiverLM) -> None:
    rows = lm.generate_batch(["x" * 60, "y"], raw=True)
    assert [row.finish_reason for row in rows] == ["context"] * 2
    assert [len(row.tokens) for row in rows] == [5, 5]
    assert rows[1].tokens == lm.generate("y", raw=True, max_new_tokens=5).tokens


def test_no_prompts_have_no_answers(lm: RiverLM) -> None:
    assert lm.generate_batch([]) == []


def test_one_string_is_no_list_of_prompts(lm: RiverLM) -> None:
    with pytest.raises(ConfigError, match="takes a list of prompts, not one string"):
        lm.generate_batch("hi")


def test_a_batch_leaves_nothing_behind(lm: RiverLM) -> None:
    expected = lm.generate(PROMPTS[1], raw=True, max_new_tokens=9).tokens
    lm.generate_batch(PROMPTS, raw=True, max_new_tokens=9)
    assert lm.generate(PROMPTS[1], raw=True, max_new_tokens=9).tokens == expected


def _check_rows(
    lm: RiverLM, rows: list[GenerationResult], seed: int | None = None, **sampling: Any
) -> None:
    """Row i is what its prompt alone gives with seed + i, in every field that isn't a measure."""
    for i, (prompt, row) in enumerate(zip(PROMPTS, rows, strict=False)):
        row_seed = None if seed is None else seed + i
        alone = lm.generate(prompt, raw=True, seed=row_seed, **sampling)
        for name in ("tokens", "text", "exit_layers", "finish_reason", "prompt_tokens", "policy"):
            assert getattr(row, name) == getattr(alone, name), name
        assert row.mean_exit_layer == pytest.approx(alone.mean_exit_layer)

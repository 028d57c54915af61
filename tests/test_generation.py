"""RiverLM: prompts to answers, one by one, together, and side by side."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lossless_lm import PROMPTS, lm_on, subject_with
from tiny_lm import interrupt_once, sharpened, tiny_lm
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedModel

from river_llm import (
    ConfigError,
    ContextFullError,
    ExitPolicy,
    GenerationResult,
    RiverError,
    RiverLM,
)
from river_llm.config import SamplingConfig
from river_llm.generate.responses import AnswerStatistics
from river_llm.river.residency import OffloadConfig, ResidencyPlan

PROMPT = "Hello, river"
NEVER = ExitPolicy.never()
MIXED = ExitPolicy.similarity(0.9)  # about half of the tiny model's tokens leave early
POLICIES = [
    None,
    NEVER,
    ExitPolicy.always(),
    ExitPolicy.fixed(2, prefill="sequence"),
    ExitPolicy.similarity(0.87),
    ExitPolicy.similarity(0.87, prefill="token"),
]
RANDOM: dict[str, Any] = {"temperature": 1.0, "seed": 5}


@pytest.fixture
def tiny_llama(tiny_llama: PreTrainedModel) -> PreTrainedModel:
    return sharpened(tiny_llama)


@pytest.fixture
def lm(tiny_llama: PreTrainedModel) -> RiverLM:
    """Float32, a context of 64 tokens, no stop tokens, never in the river."""
    return tiny_lm(copy.deepcopy(tiny_llama))


@pytest.fixture
def plain_logits(tiny_llama: PreTrainedModel) -> Callable[[list[int]], torch.Tensor]:
    """The untouched model's logits after a text, without a cache."""

    @torch.no_grad()
    def logits(token_ids: list[int]) -> torch.Tensor:
        return tiny_llama(torch.tensor([token_ids])).logits[0, -1]

    return logits


class TestTokens:
    @pytest.mark.parametrize("penalty", [1.0, 1.7])
    @pytest.mark.parametrize("policy", [NEVER, None])
    def test_are_those_of_the_plain_model(
        self,
        lm: RiverLM,
        plain_logits: Callable[[list[int]], torch.Tensor],
        penalty: float,
        policy: ExitPolicy | None,
    ) -> None:
        token_ids = lm.tokenizer(PROMPT).input_ids
        expected: list[int] = []
        for _ in range(20):
            logits = plain_logits(token_ids + expected).clone()
            for token in {*token_ids, *expected}:
                logits[token] *= 1 / penalty if logits[token] > 0 else penalty
            expected.append(int(logits.argmax()))
        asked = {"raw": True, "max_new_tokens": 20, "repetition_penalty": penalty}
        result = lm.generate(PROMPT, policy=policy, **asked)
        assert result.tokens == expected
        assert result.text == lm.tokenizer.decode(expected)

    def test_come_by_the_policy_of_the_model_or_of_the_call(self, lm: RiverLM) -> None:
        asked = {"raw": True, "max_new_tokens": 8}
        lm.policy = None
        assert lm.generate(PROMPT, **asked).mode == "lossless"
        expected = lm.generate(PROMPT, policy=ExitPolicy.fixed(1), **asked)
        assert (expected.mode, expected.exit_layers) == ("river", [4] + [1] * 7)
        lm.policy = ExitPolicy.fixed(1)
        assert lm.generate(PROMPT, **asked).tokens == expected.tokens
        assert lm.generate(PROMPT, policy=None, **asked).mode == "lossless"
        assert lm.generate_batch([PROMPT], policy=NEVER, **asked)[0].exit_layers == [4] * 8
        with pytest.raises(ConfigError, match="the exit layer is 5"):
            lm.policy = ExitPolicy.fixed(5)
        with pytest.raises(ConfigError, match="give an ExitPolicy"):
            lm.policy = 0.5  # type: ignore[assignment]


class TestStopping:
    @pytest.mark.parametrize(("start", "length"), [(0, 1), (4, 3), (11, 5), (17, 3)])
    def test_before_a_stop_string_across_tokens(self, lm: RiverLM, start: int, length: int) -> None:
        whole = lm.generate(PROMPT, max_new_tokens=20, **RANDOM)
        stop = whole.text[start : start + length]
        found = whole.text.index(stop)
        responses = list(lm.stream(PROMPT, max_new_tokens=20, stop=("no", stop), **RANDOM))
        assert "".join(response.text for response in responses) == whole.text[:found]
        assert [response.token for response in responses] == whole.tokens[: found + length]
        assert responses[-1].finish_reason == "stop"
        unfinished = lm.generate(PROMPT, max_new_tokens=20, stop=whole.text[-2:] + "no", **RANDOM)
        assert (unfinished.text, unfinished.finish_reason) == (whole.text, "length")


class TestRefusals:
    @pytest.mark.parametrize("prompt", ["", "  ", []])
    def test_of_an_empty_prompt(self, lm: RiverLM, prompt: Any) -> None:
        with pytest.raises(ConfigError, match="the prompt is empty"):
            lm.generate(prompt)
        with pytest.raises(ConfigError, match="the prompt is empty"):
            lm.generate_batch([PROMPT, prompt])
        with pytest.raises(ConfigError, match="the prompt is empty"):
            list(lm.stream_tokens([], SamplingConfig()))

    def test_of_a_long_prompt_and_of_unknown_settings_change_nothing(self, lm: RiverLM) -> None:
        expected = lm.generate(PROMPT, max_new_tokens=5).tokens
        with pytest.raises(ContextFullError, match=r"has 65 tokens.*holds 64; shorten"):
            lm.generate("x" * 65, raw=True)
        with pytest.raises(ContextFullError, match=r"^prompt 2 of 2: the prompt has 65 tokens"):
            lm.generate_batch(["a", "x" * 65], raw=True)
        with pytest.raises(ConfigError, match=r"^there is no setting 'do_sample'; there are "):
            lm.generate(PROMPT, do_sample=True)
        with pytest.raises(ConfigError, match="takes a list of prompts, not one string"):
            lm.generate_batch("hi")
        result = lm.generate(PROMPT, max_new_tokens=5, reuse_cache=True)
        assert result.tokens == expected
        assert result.cached_prompt_tokens == result.prompt_tokens - 1


class TestStatistics:
    @pytest.mark.parametrize(("prefill", "first"), [("backbone", 4), ("river", 0), ("token", 2)])
    def test_are_those_of_the_tokens_so_far(self, lm: RiverLM, prefill: Any, first: int) -> None:
        policy = ExitPolicy.fixed(2, prefill=prefill)
        responses = list(lm.stream(PROMPT, raw=True, policy=policy, max_new_tokens=6))
        assert [response.exit_layer for response in responses] == [first, 2, 2, 2, 2, 2]
        assert [response.generated_tokens for response in responses] == [1, 2, 3, 4, 5, 6]
        assert {response.prompt_tokens for response in responses} == {len(PROMPT)}
        means = [(first + 2 * count) / (count + 1) for count in range(6)]
        assert [response.mean_exit_layer for response in responses] == pytest.approx(means)
        assert [response.finish_reason for response in responses] == [None] * 5 + ["length"]
        speeds = [response.decode_tokens_per_second for response in responses]
        assert speeds[0] is None
        assert all(speed is not None and speed > 0 for speed in speeds[1:])
        assert responses[0].prompt_tokens_per_second
        assert len({response.time_to_first_token for response in responses}) == 1
        last = responses[-1]
        result = GenerationResult.of(lm.engine, responses, last.prompt_tokens, policy)
        for one in fields(AnswerStatistics):
            assert getattr(result, one.name) == getattr(last, one.name), one.name
        assert (result.finish_reason, result.num_layers, result.engine) == ("length", 4, "torch")
        assert (result.mode, result.policy) == ("river", policy.to_dict())

    def test_of_a_stream_cut_short_say_so(self, lm: RiverLM) -> None:
        responses = list(itertools.islice(lm.stream(PROMPT, max_new_tokens=10), 4))
        result = GenerationResult.of(lm.engine, responses, len(PROMPT), NEVER)
        assert result.finish_reason == "interrupted"
        assert result.tokens == lm.generate(PROMPT, max_new_tokens=4).tokens
        nothing = GenerationResult.of(lm.engine, [], len(PROMPT), NEVER)
        assert (nothing.finish_reason, nothing.text, nothing.tokens) == ("interrupted", "", [])
        assert nothing.mean_exit_layer is None


class TestInterruption:
    @pytest.mark.parametrize("passes", [0, 1, 4])
    def test_within_a_pass_leaves_the_model_usable(self, lm: RiverLM, passes: int) -> None:
        lm.policy = MIXED
        expected = lm.generate(PROMPT, max_new_tokens=10).tokens
        interrupt_once(lm.engine.attached.model, passes)
        stream = lm.stream(PROMPT, max_new_tokens=10)
        assert [next(stream).token for _ in range(passes)] == expected[:passes]
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        assert lm.generate(PROMPT, max_new_tokens=10).tokens == expected
        interrupt_once(lm.engine.attached.model, passes)
        with pytest.raises(KeyboardInterrupt):
            lm.generate_batch([PROMPT, "y"], max_new_tokens=10)
        assert len(lm.engine.sequences()) == 1


@settings(max_examples=12)
@given(
    policy=st.sampled_from(POLICIES),
    sampling=st.sampled_from([{}, {"temperature": 1.0, "seed": 40}]),
    ends=st.booleans(),
)
@pytest.mark.parametrize("kind", ["torch", "cpu"])
def test_answers_of_a_batch_are_those_of_the_prompts_alone(
    kind: str, policy: ExitPolicy | None, sampling: dict[str, Any], ends: bool
) -> None:
    lm = lm_on(kind, policy=policy)
    asked = {"raw": True, "max_new_tokens": 12, **sampling}
    if ends:
        whole = lm.generate_batch(PROMPTS, **asked)
        lm.stop_tokens = frozenset(row.tokens[3 * i] for i, row in enumerate(whole))
    rows = lm.generate_batch(PROMPTS, **asked)
    assert lm.generate_batch(PROMPTS[:1], **asked)[0].tokens == rows[0].tokens
    for prompt, row in list(zip(PROMPTS, rows, strict=True))[: 1 if sampling else None]:
        alone = lm.generate(prompt, **asked)
        for name in ("tokens", "text", "exit_layers", "finish_reason", "prompt_tokens", "policy"):
            assert getattr(row, name) == getattr(alone, name), name
    assert lm.generate_batch([]) == []


def test_answers_of_a_model_with_absolute_positions_are_those_of_the_prompts_alone() -> None:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=97, n_positions=64, n_embd=64, n_layer=3, n_head=4)
    config.pad_token_id = config.eos_token_id = config.bos_token_id = None
    config.tie_word_embeddings = False
    model = sharpened(GPT2LMHeadModel(config).eval())
    model.transformer.wpe.weight.data.mul_(3)
    lm = tiny_lm(model)
    rows = lm.generate_batch(PROMPTS, raw=True, max_new_tokens=15)
    alone = [lm.generate(prompt, raw=True, max_new_tokens=15) for prompt in PROMPTS]
    assert [row.tokens for row in rows] == [one.tokens for one in alone]


def test_answers_leave_together_by_the_minimum_and_else_each_on_its_own(lm: RiverLM) -> None:
    policy = ExitPolicy.similarity(0.85)
    rows = lm.generate_batch(PROMPTS, raw=True, policy=policy, max_new_tokens=15)
    assert any(len(set(layers)) > 1 for layers in zip(*(r.exit_layers for r in rows), strict=True))
    policy = ExitPolicy.similarity(0.8, batch="minimum")
    rows = lm.generate_batch(PROMPTS, raw=True, policy=policy, max_new_tokens=15)
    assert len({tuple(row.exit_layers) for row in rows}) == 1
    assert len(set(rows[0].exit_layers[1:])) > 1


@pytest.mark.parametrize("kind", ["torch", "cpu"])
def test_answers_of_many_threads_and_streams_side_by_side_are_what_they_are_alone(
    kind: str,
) -> None:
    lm = lm_on(kind)

    def settings(number: int) -> dict[str, Any]:
        return {"raw": True, "max_new_tokens": 8, "policy": POLICIES[number % 6], **RANDOM}

    def answer(number: int) -> list[int]:
        return lm.generate(PROMPTS[number % 4], reuse_cache=True, **settings(number)).tokens

    alone = [answer(number) for number in range(12)]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(answer, range(12))) == alone
    streams = [lm.stream(PROMPTS[number % 4], **settings(number)) for number in range(12)]
    together = [[r.token for r in row] for row in zip(*streams, strict=True)]
    assert [list(tokens) for tokens in zip(*together, strict=True)] == alone
    assert len(lm.engine.sequences()) <= 1


def test_depths_of_decoded_tokens_decide_over_the_layers_that_stay() -> None:
    """With a step's end, not with the prompt's."""
    subject = subject_with(64)
    engine = subject.reference()
    plan = ResidencyPlan(OffloadConfig("auto"), engine.layer_bytes, engine.rest_bytes, NEVER)
    kept: list[int] = []
    engine.keep_layers = kept.append  # type: ignore[method-assign]
    lm = RiverLM(engine, lm_on("torch").tokenizer, subject.river.config, residency=plan)
    result = lm.generate("y", raw=True, policy=ExitPolicy.fixed(2), max_new_tokens=40)
    assert kept == [2]
    assert result.offload is not None
    with pytest.raises(RiverError):
        lm.generate("y", policy=ExitPolicy.fixed(9))

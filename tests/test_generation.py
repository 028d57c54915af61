from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from river_llm.sampling import SamplingConfig
from tiny_lm import END, interrupt_once, sharpened, tiny_lm
from transformers import PreTrainedModel

from river_llm import (
    ConfigError,
    ContextFullError,
    ExitPolicy,
    GenerationResult,
    RiverError,
    RiverLM,
)

PROMPT = "Hello, river"
MIXED = ExitPolicy.similarity(0.9)  # about half of the tiny model's tokens leave early
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
    def test_are_the_likeliest_of_the_plain_model(
        self, lm: RiverLM, plain_logits: Callable[[list[int]], torch.Tensor]
    ) -> None:
        token_ids = lm.tokenizer(PROMPT).input_ids
        expected: list[int] = []
        for _ in range(20):
            expected.append(int(plain_logits(token_ids + expected).argmax()))
        result = lm.generate(PROMPT, raw=True, max_new_tokens=20)
        assert result.tokens == expected
        assert result.text == lm.tokenizer.decode(expected)

    def test_are_penalised_for_standing_in_the_text(
        self, lm: RiverLM, plain_logits: Callable[[list[int]], torch.Tensor]
    ) -> None:
        token_ids = lm.tokenizer(PROMPT).input_ids
        expected: list[int] = []
        for _ in range(20):
            logits = plain_logits(token_ids + expected).clone()
            for token in {*token_ids, *expected}:
                logits[token] *= 1 / 1.7 if logits[token] > 0 else 1.7
            expected.append(int(logits.argmax()))
        settings = {"raw": True, "max_new_tokens": 20}
        assert lm.generate(PROMPT, repetition_penalty=1.7, **settings).tokens == expected
        assert lm.generate(PROMPT, **settings).tokens != expected

    def test_are_the_same_with_the_same_seed_only(self, lm: RiverLM) -> None:
        def answer(seed: int | None) -> str:
            return lm.generate(PROMPT, temperature=1.0, seed=seed, max_new_tokens=20).text

        first = answer(1)
        state = torch.get_rng_state()
        torch.manual_seed(77)
        assert answer(1) == first
        torch.set_rng_state(state)
        assert answer(1) == first
        assert len({first, answer(2), answer(3), answer(None), answer(None)}) == 5
        assert torch.equal(torch.get_rng_state(), state)


class TestStopping:
    @pytest.mark.parametrize("max_new_tokens", [1, 2, 7])
    def test_at_max_new_tokens(self, lm: RiverLM, max_new_tokens: int) -> None:
        result = lm.generate(PROMPT, max_new_tokens=max_new_tokens)
        assert len(result.tokens) == max_new_tokens
        assert result.finish_reason == "length"

    def test_at_a_stop_token_which_gives_no_text(self, lm: RiverLM) -> None:
        whole = lm.generate(PROMPT, max_new_tokens=20, **RANDOM)
        stop_token = whole.tokens[9]
        length = whole.tokens.index(stop_token) + 1
        lm.stop_tokens = frozenset({stop_token, END})
        result = lm.generate(PROMPT, max_new_tokens=20, **RANDOM)
        assert result.tokens == whole.tokens[:length]
        assert result.text == whole.text[: length - 1]
        assert result.finish_reason == "stop"

    @pytest.mark.parametrize(("start", "length"), [(0, 1), (4, 3), (11, 5), (17, 3)])
    def test_before_a_stop_string_across_tokens(self, lm: RiverLM, start: int, length: int) -> None:
        whole = lm.generate(PROMPT, max_new_tokens=20, **RANDOM)
        stop = whole.text[start : start + length]
        found = whole.text.index(stop)
        responses = list(lm.stream(PROMPT, max_new_tokens=20, stop=("no", stop), **RANDOM))
        assert "".join(response.text for response in responses) == whole.text[:found]
        assert [response.token for response in responses] == whole.tokens[: found + length]
        assert responses[-1].finish_reason == "stop"

    def test_gives_what_only_began_like_a_stop_string(self, lm: RiverLM) -> None:
        whole = lm.generate(PROMPT, max_new_tokens=20, **RANDOM)
        stop = whole.text[-2:] + "never"
        result = lm.generate(PROMPT, max_new_tokens=20, stop=(stop,), **RANDOM)
        assert result.text == whole.text
        assert result.finish_reason == "length"

    def test_takes_a_lone_stop_string_as_one(self, lm: RiverLM) -> None:
        whole = lm.generate(PROMPT, max_new_tokens=20, **RANDOM)
        stop = whole.text[:10][::-1]
        assert stop not in whole.text
        result = lm.generate(PROMPT, max_new_tokens=20, stop=stop, **RANDOM)
        assert result.text == whole.text

    @pytest.mark.parametrize(("prompt_tokens", "expected"), [(50, 15), (63, 2), (64, 1)])
    def test_where_the_context_is_full(
        self, lm: RiverLM, prompt_tokens: int, expected: int
    ) -> None:
        result = lm.generate("x" * prompt_tokens, raw=True)
        assert result.prompt_tokens == prompt_tokens
        assert len(result.tokens) == expected
        assert result.finish_reason == "context"

    def test_refuses_a_prompt_longer_than_the_context(self, lm: RiverLM) -> None:
        expected = lm.generate(PROMPT, max_new_tokens=5).tokens
        with pytest.raises(ContextFullError, match=r"has 65 tokens.*holds 64; shorten"):
            lm.generate("x" * 65, raw=True)
        assert lm.generate(PROMPT, max_new_tokens=5).tokens == expected

    @pytest.mark.parametrize("prompt", ["", "  ", []])
    def test_refuses_an_empty_prompt(self, lm: RiverLM, prompt: Any) -> None:
        with pytest.raises(ConfigError, match="the prompt is empty"):
            lm.generate(prompt)
        with pytest.raises(ConfigError, match="the prompt is empty"):
            lm.generate_batch([PROMPT, prompt])

    def test_refuses_no_prompt_at_all(self, lm: RiverLM) -> None:
        with pytest.raises(ConfigError, match="the prompt is empty"):
            list(lm.stream_tokens([], SamplingConfig()))

    def test_refuses_an_unknown_setting(self, lm: RiverLM) -> None:
        wanted = r"^there is no setting 'do_sample'; the sampling settings are max_new_tokens, "
        with pytest.raises(ConfigError, match=wanted):
            lm.generate(PROMPT, do_sample=True)


class TestStatistics:
    @pytest.mark.parametrize(("prefill", "first"), [("backbone", 4), ("river", 0), ("token", 2)])
    def test_count_tokens_and_layers(self, lm: RiverLM, prefill: Any, first: int) -> None:
        lm.policy = ExitPolicy.fixed(2, prefill=prefill)
        responses = list(lm.stream(PROMPT, raw=True, max_new_tokens=6))
        assert [response.exit_layer for response in responses] == [first, 2, 2, 2, 2, 2]
        assert [response.generated_tokens for response in responses] == [1, 2, 3, 4, 5, 6]
        assert {response.prompt_tokens for response in responses} == {len(PROMPT)}
        means = [(first + 2 * count) / (count + 1) for count in range(6)]
        assert [response.mean_exit_layer for response in responses] == pytest.approx(means)
        assert [response.finish_reason for response in responses] == [None] * 5 + ["length"]

    def test_hold_the_prefills_exit_layer_and_then_the_tokens_own(self, lm: RiverLM) -> None:
        attached = lm.engine.attached
        lm.policy = ExitPolicy.similarity(0.87, prefill="token")
        result = lm.generate(PROMPT, raw=True, max_new_tokens=16)
        attached.phase = "prefill"
        with torch.no_grad():
            attached.model(torch.tensor([[*lm.tokenizer(PROMPT).input_ids, *result.tokens[:-1]]]))
        expected = attached.last_exit_layers[0, len(PROMPT) - 1 :].tolist()
        assert result.exit_layers == expected
        assert len(set(expected)) > 1

    def test_measure_speeds_from_the_second_token_on(self, lm: RiverLM) -> None:
        responses = list(lm.stream(PROMPT, max_new_tokens=4))
        speeds = [response.decode_tokens_per_second for response in responses]
        assert speeds[0] is None
        assert all(speed is not None and speed > 0 for speed in speeds[1:])
        assert responses[0].prompt_tokens_per_second > 0
        assert len({response.time_to_first_token for response in responses}) == 1
        assert responses[0].time_to_first_token > 0
        assert responses[0].peak_memory_bytes > 50e6

    def test_of_a_result_are_the_last_responses(self, lm: RiverLM) -> None:
        lm.policy = MIXED
        responses = list(lm.stream(PROMPT, max_new_tokens=10))
        result = GenerationResult.of(lm.engine, responses, responses[-1].prompt_tokens)
        last = responses[-1]
        shared = set(GenerationResult.__slots__) & set(type(last).__slots__) - {"text"}
        assert len(shared) == 10
        for name in shared:
            assert getattr(result, name) == getattr(last, name), name
        assert result.tokens == lm.generate(PROMPT, max_new_tokens=10).tokens
        assert (result.num_layers, result.engine) == (4, "torch")
        assert result.policy == MIXED.to_dict()

    def test_of_a_stream_cut_short_say_so(self, lm: RiverLM) -> None:
        responses = list(itertools.islice(lm.stream(PROMPT, max_new_tokens=10), 4))
        result = GenerationResult.of(lm.engine, responses, len(PROMPT))
        assert result.finish_reason == "interrupted"
        assert result.tokens == lm.generate(PROMPT, max_new_tokens=4).tokens
        nothing = GenerationResult.of(lm.engine, [], len(PROMPT))
        assert (nothing.finish_reason, nothing.text, nothing.tokens) == ("interrupted", "", [])
        assert nothing.mean_exit_layer is None


class TestInterruption:
    def test_of_a_stream_leaves_the_model_usable(self, lm: RiverLM) -> None:
        lm.policy = MIXED
        expected = lm.generate(PROMPT, max_new_tokens=10).tokens
        stream = lm.stream("Something else", max_new_tokens=10)
        next(stream)
        next(stream)
        stream.close()  # type: ignore[attr-defined]
        assert lm.generate(PROMPT, max_new_tokens=10).tokens == expected

    def test_by_another_answer_ends_a_stream_with_an_error(self, lm: RiverLM) -> None:
        stream = lm.stream(PROMPT, max_new_tokens=10)
        next(stream)
        lm.generate("Something else", max_new_tokens=10)
        with pytest.raises(RiverError):
            next(stream)

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

    def test_within_a_pass_leaves_the_cache_as_it_was(self, lm: RiverLM) -> None:
        token_ids = torch.tensor([lm.tokenizer(PROMPT).input_ids])
        engine = lm.engine
        logits = []
        for is_interrupted in (False, True):
            engine.truncate(0)
            engine.prefill(token_ids)
            if is_interrupted:
                interrupt_once(engine.attached.model, 0)
                with pytest.raises(KeyboardInterrupt):
                    engine.decode(torch.tensor([9]))
            assert engine.length == len(PROMPT)
            logits.append(engine.decode(torch.tensor([8])).logits)
        assert torch.equal(*logits)

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_tokenizers import TOKENIZERS
from tiny_lm import character_tokenizer
from transformers import PreTrainedTokenizerBase

from river_llm import ConfigError
from river_llm.text.decoder import IncrementalDecoder
from river_llm.text.prompt import encode_prompt

UNFINISHED = "\ufffd"

random_tokens = st.lists(st.integers(0, 300) | st.integers(0, 49151), max_size=40)
texts = st.lists(
    st.text(max_size=6)
    | st.sampled_from(
        ["👩\u200d🚀", "🇫🇷", "👍🏽", "漢字かな", "한국어", "e\u0301", " the", "\n\n"]
    ),
    max_size=8,
).map("".join)


class TestStreamedText:
    @settings(max_examples=200)
    @given(drawn=random_tokens | texts)
    def test_comes_as_soon_as_a_character_is_whole_and_joins_to_the_decoded_whole(
        self, tokenizer: PreTrainedTokenizerBase, drawn: list[int] | str
    ) -> None:
        token_ids = tokenizer(drawn).input_ids if isinstance(drawn, str) else drawn
        decoder = IncrementalDecoder(tokenizer)
        streamed = ""
        for count, token in enumerate(token_ids, start=1):
            streamed += decoder.add(token)
            so_far = _decode(tokenizer, token_ids[:count])
            assert so_far.startswith(streamed)
            assert not streamed.endswith(UNFINISHED)
            assert streamed == so_far or so_far.endswith(UNFINISHED)
        assert streamed + decoder.finish() == _decode(tokenizer, token_ids)

    @given(text=st.text(alphabet="ab ée漢🚀", max_size=20))
    def test_joins_to_the_whole_where_the_tokeniser_strips_the_first_blank(self, text: str) -> None:
        tokenizer = TOKENIZERS["sentencepiece"]
        token_ids = tokenizer(text).input_ids
        assert _decode(tokenizer, token_ids) == text
        assert "".join(_pieces(tokenizer, token_ids)) == text

    def test_keeps_the_blank_after_a_special_token(self) -> None:
        tokenizer = TOKENIZERS["sentencepiece"]
        token_ids = [*tokenizer("ab").input_ids, tokenizer.eos_token_id, *tokenizer("ba").input_ids]
        assert _decode(tokenizer, token_ids) == "ab ba"
        assert "".join(_pieces(tokenizer, token_ids)) == "ab ba"


class TestStopStrings:
    @settings(max_examples=150)
    @given(data=st.data(), text=texts | st.text(alphabet="ab", max_size=30))
    def test_end_the_text_before_their_first_appearance(
        self, tokenizer: PreTrainedTokenizerBase, data: st.DataObject, text: str
    ) -> None:
        _check_stop(tokenizer, text, data.draw(_substring(text) | st.text("ab", min_size=1)))

    @settings(max_examples=150)
    @given(text=st.text(alphabet="ab", max_size=30), stop=st.text("ab", min_size=1, max_size=6))
    def test_are_found_across_token_borders(self, text: str, stop: str) -> None:
        _check_stop(character_tokenizer(), text, stop)

    @given(data=st.data(), text=st.text(alphabet="abc", min_size=1, max_size=30))
    def test_several_end_the_text_before_one_of_them(
        self, tokenizer: PreTrainedTokenizerBase, data: st.DataObject, text: str
    ) -> None:
        stops = data.draw(st.lists(_substring(text) | st.just("abc"), min_size=1, max_size=3))
        token_ids = tokenizer(text).input_ids
        output = "".join(_pieces(tokenizer, token_ids, stops))
        assert text.startswith(output)
        assert not any(stop in output for stop in stops)
        assert (output == text) == (not any(stop in text for stop in stops))
        if output != text:
            assert text[len(output) :].startswith(tuple(stops))


class TestEncodePrompt:
    def test_a_string_is_a_users_message(self, tokenizer: PreTrainedTokenizerBase) -> None:
        token_ids = encode_prompt(tokenizer, "What's up?")
        assert tokenizer.decode(token_ids) == (
            "<|im_start|>system\n"
            "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
            "<|im_start|>user\nWhat's up?<|im_end|>\n<|im_start|>assistant\n"
        )

    @pytest.mark.parametrize("raw", [False, True])
    def test_messages_go_through_the_template(
        self, tokenizer: PreTrainedTokenizerBase, raw: bool
    ) -> None:
        messages = (
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "One?"},
            {"role": "assistant", "content": "Two."},
            {"role": "user", "content": "Three?"},
        )
        token_ids = encode_prompt(tokenizer, messages, raw)
        turns = [f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in messages]
        assert tokenizer.decode(token_ids) == "".join([*turns, "<|im_start|>assistant\n"])

    @pytest.mark.parametrize("has_template", [False, True])
    def test_a_raw_string_is_given_as_it_is(
        self, tokenizer: PreTrainedTokenizerBase, has_template: bool
    ) -> None:
        text = "  two blanks"
        given = copy.deepcopy(tokenizer)
        if not has_template:
            given.chat_template = None
            with pytest.raises(ConfigError, match="no chat template; give the prompt as one"):
                encode_prompt(given, [{"role": "user", "content": "Hi"}])
        assert tokenizer.decode(encode_prompt(given, text, raw=has_template)) == text

    @pytest.mark.parametrize("raw", [False, True])
    @pytest.mark.parametrize(
        ("prompt", "message"),
        [
            *((prompt, "empty") for prompt in ("", [])),
            (None, "prompt is of type NoneType; give a string, or a list of messages"),
            ({"role": "user", "content": "Hi"}, "prompt is of type dict"),
            (torch.tensor([1, 2]), "prompt is of type Tensor"),
            *(
                (prompt, "messages must be a list of")
                for prompt in (
                    ["Hi"],
                    [1, 2, 3],
                    [{"role": "user", "content": 5}],
                    [{"role": "user"}],
                    [{"content": "Hi"}],
                    [{"role": "user", "content": None}],
                    [{"role": "user", "content": "Hi"}, 5],
                    [[{"role": "user", "content": "Hi"}]],
                )
            ),
        ],
    )
    def test_refuses_what_is_no_prompt(
        self, tokenizer: PreTrainedTokenizerBase, prompt: Any, message: str, raw: bool
    ) -> None:
        with pytest.raises(ConfigError, match=message):
            encode_prompt(tokenizer, prompt, raw)

    def test_refuses_a_blank_message(self, tokenizer: PreTrainedTokenizerBase) -> None:
        with pytest.raises(ConfigError, match="empty"):
            encode_prompt(tokenizer, " \n\t")


def _decode(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> str:
    text: str = tokenizer.decode(token_ids, skip_special_tokens=True)
    return text


def _pieces(
    tokenizer: PreTrainedTokenizerBase, token_ids: list[int], stops: list[str] | None = None
) -> list[str]:
    """Everything that a decoder gives, until it stops."""
    decoder = IncrementalDecoder(tokenizer, stops or [])
    pieces = []
    for token in token_ids:
        pieces.append(decoder.add(token))
        if decoder.stopped:
            break
    return [*pieces, decoder.finish()]


def _substring(text: str) -> st.SearchStrategy[str]:
    start = st.integers(0, max(len(text) - 1, 0))
    return st.builds(
        lambda start, length: text[start : start + length] or "x", start, st.integers(1, 6)
    )


def _check_stop(tokenizer: PreTrainedTokenizerBase, text: str, stop: str) -> None:
    token_ids = tokenizer(text).input_ids
    whole = _decode(tokenizer, token_ids)
    expected = whole.split(stop)[0]
    decoder = IncrementalDecoder(tokenizer, [stop])
    streamed = ""
    for count, token in enumerate(token_ids, start=1):
        streamed += decoder.add(token)
        assert expected.startswith(streamed)
        so_far = _decode(tokenizer, token_ids[:count])
        assert decoder.stopped == (stop in so_far) or so_far.endswith(UNFINISHED)
        if decoder.stopped:
            break
    streamed += decoder.finish()
    assert streamed == expected
    assert decoder.stopped == (stop in whole)

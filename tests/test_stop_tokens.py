"""What ends an answer: stop tokens by configuration, name and chat template; special tokens in stop
strings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from byte_models import byte_id, byte_lm, byte_model, byte_tokenizer, save_folder, speaks_only
from odd_tokenizers import CHATML
from transformers import PreTrainedModel

from river_llm import ExitPolicy, RiverLM
from river_llm.text.decoder import IncrementalDecoder
from river_llm.text.prompt import encode_prompt
from river_llm.text.stop_tokens import stop_tokens

EOS, FIRST = 1, 259  # of a byte tokenizer: </s>, the first token that is added
WITHOUT_CLOSING = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
CLOSED_AT_THE_END = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }} {% if loop.last %}[END]{% endif %}{% endif %}{% endfor %}"
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}"
    "{% if loop.last and m.role == 'assistant' %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
)
IN_PARTS = (
    "{% for m in messages %}{% for part in m.content %}{% if part.type == 'text' %}"
    "<|turn|>{{ part.text }}<|over|>{% endif %}{% endfor %}{% endfor %}"
)
TURNS = "{% for m in messages %}<|turn|>{{ m.content }}<|over|>{% endfor %}"
NO_LAST_ANSWER = (
    "{% if messages[-1].role != 'user' %}{{ raise_exception('ask') }}{% endif %}" + TURNS
)
ONE_ANSWER = "{% if messages | length > 2 %}{{ raise_exception('ask once') }}{% endif %}" + TURNS


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return byte_model(vocab_size=270)


class TestStopTokens:
    @pytest.mark.parametrize("configured", [None, 5, [5, 6], (5, 6)])
    def test_are_those_of_the_tokenizer_and_of_the_generation_config(
        self, model: PreTrainedModel, configured: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model.generation_config, "eos_token_id", configured)
        listed = configured if isinstance(configured, list | tuple) else [configured]
        expected = {EOS, *listed} - {None}
        assert stop_tokens(model, byte_tokenizer(chat_template=None)) == expected

    @pytest.mark.parametrize(
        "name",
        [
            "<|im_end|>",
            "<|eot_id|>",
            "<|eom_id|>",
            "<end_of_turn>",
            "<｜end▁of▁sentence｜>",  # noqa: RUF001
            "_<EOT>",
            "<|file_sep|>",
            "<|tool_response>",
            "[e~[",
        ],
    )
    def test_are_special_tokens_of_such_a_name(self, model: PreTrainedModel, name: str) -> None:
        tokenizer = byte_tokenizer([name, "<|im_start|>"], chat_template=None)
        assert stop_tokens(model, tokenizer) == {EOS, FIRST}
        tokenizer = byte_tokenizer(chat_template=None)
        tokenizer.add_tokens([name])  # some files don't mark them
        assert stop_tokens(model, tokenizer) == {EOS, FIRST}

    @pytest.mark.parametrize("name", ["<eos>", "[EOS]", "<|im_start|>"])
    def test_are_no_other_added_tokens(self, model: PreTrainedModel, name: str) -> None:
        tokenizer = byte_tokenizer(chat_template=None)
        tokenizer.add_tokens([name])
        assert stop_tokens(model, tokenizer) == {EOS}

    @pytest.mark.parametrize("wrong", ["</s>", -1, 10**9, 270, 1.0, True])
    def test_are_tokens_of_the_model(
        self,
        model: PreTrainedModel,
        wrong: Any,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        tokenizer = byte_tokenizer(chat_template=None)
        for configured, expected in ((wrong, {EOS}), ([5, wrong], {EOS, 5})):
            monkeypatch.setattr(model.generation_config, "eos_token_id", configured)
            caplog.clear()
            assert stop_tokens(model, tokenizer) == expected
            (record,) = caplog.records
            assert f"no token of the model ({wrong!r});" in record.getMessage()

    @pytest.mark.parametrize(
        ("tokens", "template", "expected"),
        [
            (["<|turn|>", "<|over|>"], CHATML.replace("im_end", "over"), ["<|over|>"]),
            (["<|user|>", "<|assistant|>"], WITHOUT_CLOSING, ["<|user|>"]),
            (
                ["<|user|>", "<|assistant|>"],
                WITHOUT_CLOSING + "<|assistant|>",  # whoever's the last message is
                ["<|user|>"],
            ),
            (["[INST]", "[/INST]", "[END]"], CLOSED_AT_THE_END, ["[END]"]),
            (["<|turn|>", "<|over|>"], IN_PARTS, ["<|over|>"]),
            (
                ["<|start|>", "<|message|>", "<|end|>", "<|return|>", "<|call|>"],
                HARMONY,
                ["<|return|>", "<|call|>"],
            ),
            (["<|user|>"], "{% for m in messages %}{{ m.content }}\n{% endfor %}", []),
            (["<|user|>"], "{{ raise_exception('no') }}<|user|>", []),
            (["<|turn|>", "<|over|>"], NO_LAST_ANSWER, ["<|over|>"]),
            (["<|turn|>", "<|over|>"], ONE_ANSWER, ["<|over|>"]),
            (["<|user|>"], "{% if %}", []),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    @pytest.mark.parametrize("special", [True, False])
    def test_are_what_the_chat_template_closes_an_answer_with(
        self,
        model: PreTrainedModel,
        tokens: list[str],
        template: str,
        expected: list[str],
        special: bool,
    ) -> None:
        tokenizer = byte_tokenizer(tokens if special else (), template)
        if not special:
            tokenizer.add_tokens(tokens)
        ids = set(tokenizer.convert_tokens_to_ids(expected))
        assert stop_tokens(model, tokenizer) == {EOS} | ids

    @pytest.mark.parametrize("word", ["###", "User", "```"])
    def test_are_no_words_that_stand_behind_an_answer(
        self, model: PreTrainedModel, word: str
    ) -> None:
        template = f"{{% for m in messages %}}{word} {{{{ m.content }}}}\n{{% endfor %}}"
        tokenizer = byte_tokenizer(chat_template=template)
        tokenizer.add_tokens([word])
        assert stop_tokens(model, tokenizer) == {EOS}
        assert encode_prompt(tokenizer, word).count(FIRST) == 2  # a user's too


def test_an_answer_ends_with_its_turn(model: PreTrainedModel, tmp_path: Path) -> None:
    """The model says <|over|> for ever, which nothing but its chat template names."""
    tokenizer = byte_tokenizer(["<|im_start|>", "<|over|>"], CHATML.replace("im_end", "over"))
    directory = save_folder(tmp_path, speaks_only(byte_model(vocab_size=261), FIRST + 1), tokenizer)
    result = byte_lm(directory).generate("Hi", raw=True, max_new_tokens=4)
    assert (result.tokens, result.finish_reason, result.text) == ([FIRST + 1], "stop", "")


class TestSpecialTokensInStopStrings:
    @pytest.fixture(scope="class")
    def lm(self, tmp_path_factory: pytest.TempPathFactory) -> RiverLM:
        """Says token 259, <|stop|>, for ever."""
        tokenizer = byte_tokenizer(["<|stop|>"])
        model = speaks_only(byte_model(vocab_size=260), FIRST)
        return byte_lm(save_folder(tmp_path_factory.mktemp("lm"), model, tokenizer))

    @pytest.mark.parametrize("policy", [None, ExitPolicy.never()], ids=["lossless", "river"])
    def test_end_answers(self, lm: RiverLM, policy: ExitPolicy | None) -> None:
        assert FIRST not in lm.stop_tokens
        settings: dict[str, Any] = {"max_new_tokens": 6, "policy": policy}
        for stop, tokens in (("<|stop|>", 1), ("<|stop|><|stop|>", 2), ("<|other|>", 6)):
            alone = lm.generate("Hi", stop=stop, **settings)
            several = lm.generate_batch(["Hi", "Hello"], stop=["x", stop], **settings)
            for result in (alone, *several):
                assert result.tokens == [FIRST] * tokens
                assert result.finish_reason == ("length" if tokens == 6 else "stop")
                assert result.text == ""

    @pytest.mark.parametrize(
        ("stop", "expected"),
        [
            ("<|stop|>", "ab"),
            ("b<|stop|>", "a"),
            ("<|stop|>\n", "ab"),
            ("ab<|stop|>\nc", ""),
            ("<|stop|>c", "ab\ncd"),
            ("<|stop|", "ab\ncd"),  # not the whole token
            ("cd</s>", "ab\n"),
            ("</s>", "ab\ncd"),
        ],
    )
    def test_end_the_text_where_they_begin(self, stop: str, expected: str) -> None:
        tokenizer = byte_tokenizer(["<|stop|>"])
        token_ids = [byte_id("a"), byte_id("b"), FIRST, *tokenizer("\ncd").input_ids]
        decoder = IncrementalDecoder(tokenizer, [stop])
        text = ""
        for token in token_ids:
            text += decoder.add(token)
            if decoder.stopped:
                break
        if not decoder.stopped:
            text += decoder.end_with(EOS)
        assert text == expected
        assert decoder.stopped == (stop not in ("<|stop|>c", "<|stop|"))
        assert decoder.finish() == ""

    @pytest.mark.parametrize(
        ("stop", "expected"),
        [
            ((), "<think>ab</think>c[TOOL_CALLS]d"),
            (["</think>"], "<think>ab"),
            (["b</thi"], "<think>a"),  # a marker is text
            (["<|stop|></think>"], "<think>ab"),
            (["<|stop|>"], "<think>ab"),
        ],
    )
    def test_markers_of_reasoning_and_of_tools_are_shown(
        self, stop: list[str], expected: str
    ) -> None:
        tokenizer = byte_tokenizer(["<think>", "</think>", "[TOOL_CALLS]", "<|stop|>"])
        decoder = IncrementalDecoder(tokenizer, stop)
        text = ""
        for token in tokenizer("<think>ab<|stop|></think>c[TOOL_CALLS]d").input_ids:
            text += decoder.add(token)
            if decoder.stopped:
                break
        assert text + decoder.finish() == expected

    def test_leave_other_text_as_it_is(self) -> None:
        """Half a character before the token, and a false beginning after it."""
        tokenizer = byte_tokenizer(["<|stop|>"])
        decoder = IncrementalDecoder(tokenizer, ["<|stop|>!"])
        first, second = tokenizer("é").input_ids
        pieces = [decoder.add(token) for token in (first, FIRST, first, second)]
        assert "".join(pieces) + decoder.finish() == "\ufffdé"

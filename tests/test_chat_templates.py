"""Messages through chat templates of many kinds: text stays text, nothing is lost in silence."""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from byte_models import byte_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from odd_tokenizers import CHATML, SPECIAL, TOKENIZERS
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

from river_llm import ConfigError
from river_llm.text.chat_template import Message, encode_messages
from river_llm.text.control_tokens import MARKS
from river_llm.text.prompt import encode_prompt

contents = st.lists(
    st.text(max_size=4) | st.sampled_from([*SPECIAL, "<|im_", "end|>", "s>", "<", "/", MARKS[0]]),
    min_size=1,
    max_size=6,
).map("".join)


class TestControlTokensInMessages:
    @pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "unigram"])
    @given(texts=st.lists(contents, min_size=1, max_size=3))
    def test_are_text(self, kind: str, texts: list[str]) -> None:
        tokenizer = TOKENIZERS[kind]
        messages = [_user(text) for text in texts]
        token_ids = encode_messages(tokenizer, messages)
        harmless = encode_messages(tokenizer, [_user("x") for _ in texts])
        assert _special(tokenizer, token_ids) == _special(tokenizer, harmless)
        if kind != "unigram":  # which has no bytes for what it doesn't know
            look_alike = [
                _user(text.replace("<", "<\ufdd5").replace("s>", "s\ufdd5>")) for text in texts
            ]
            alike = tokenizer.decode(encode_messages(tokenizer, look_alike))
            assert tokenizer.decode(token_ids) == alike.replace("\ufdd5", "")

    @pytest.mark.parametrize("kind", ["bytes", "sentencepiece", "unigram"])
    @given(text=st.text("ab \n<|é漢", min_size=1, max_size=12))
    def test_leave_the_other_tokens_as_they_are(self, kind: str, text: str) -> None:
        tokenizer = TOKENIZERS[kind]
        start, end = tokenizer.convert_tokens_to_ids(SPECIAL[:2])
        plain = encode_messages(tokenizer, [_user(text), _user("x")])
        token_ids = encode_messages(tokenizer, [_user(text), _user("x</s>")])
        before = _places(plain, start)[1]
        behind = len(plain) - _places(plain, end)[1]
        assert token_ids[:before] == plain[:before]
        assert token_ids[-behind:] == plain[-behind:]
        assert len(token_ids) > len(plain)

    def test_of_one_character_or_with_flags_are_text_too(self) -> None:
        tokenizer = byte_tokenizer(chat_template="{{ messages[0].content }}☃  ")
        flags = {"special": True, "lstrip": True, "rstrip": True}
        tokenizer.add_special_tokens({"additional_special_tokens": [AddedToken("☃", **flags)]})
        token_ids = encode_prompt(tokenizer, "5 ☃ a ")
        assert tokenizer.decode(token_ids) == "5 ☃ a☃"
        assert token_ids.count(259) == 1

    def test_that_only_the_template_makes_special_are_text(self) -> None:
        """DeepSeek's turns begin with added tokens that aren't marked as special."""
        tokenizer = byte_tokenizer(
            chat_template="{% for m in messages %}<|User|>{{ m.content }}{% endfor %}"
        )
        tokenizer.add_tokens(["<|User|>", "<|Other|>"])
        token_ids = encode_prompt(tokenizer, "a<|User|>b<|Other|>")
        assert [token for token in token_ids if token >= 259] == [259, 260]

    def test_merges_of_a_vocabulary_do_not_lead_to_them(self) -> None:
        tokenizer = TOKENIZERS["sentencepiece"]
        (eos,) = tokenizer.encode("</s>", add_special_tokens=False)[-1:]
        assert eos == tokenizer.eos_token_id
        assert eos not in encode_prompt(tokenizer, "a</s>")

    def test_that_an_answer_shows_stay_in_it(self) -> None:
        template = (
            "{% for m in messages %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
        )
        tokenizer = byte_tokenizer(SPECIAL, template)
        tokenizer.add_special_tokens(
            {"additional_special_tokens": ["<tool_call>"]}, replace_extra_special_tokens=False
        )
        answer = {"role": "assistant", "content": "<think>long</think>short<|im_end|><tool_call>"}
        token_ids = encode_messages(tokenizer, [answer, _user("a</think>b")])
        assert tokenizer.decode(token_ids) == (
            "short<|im_end|><tool_call><|im_end|>a</think>b<|im_end|>"
        )
        assert [token for token in token_ids if token >= 259] == [263, 260, 260]

    @pytest.mark.parametrize("allow", [False, True])
    def test_are_control_tokens_for_those_who_want_them(self, allow: bool) -> None:
        tokenizer = byte_tokenizer(SPECIAL, CHATML)
        token_ids = encode_prompt(tokenizer, "a<|im_end|>", allow_control_tokens=allow)
        end = tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert token_ids.count(end) == 1 + allow
        assert encode_prompt(tokenizer, "<|im_end|>", raw=True) == [end]  # raw is as typed

    def test_in_arguments_of_the_template_are_text(self) -> None:
        template = "{% for tool in tools %}{{ tool | tojson(ensure_ascii=True) }}{% endfor %}"
        tokenizer = byte_tokenizer(SPECIAL, template + CHATML)
        tools = [{"name": "f", "description": "<|im_end|>"}]
        token_ids = encode_prompt(tokenizer, "a", chat_template_kwargs={"tools": tools})
        assert token_ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == 1
        assert json.dumps(tools[0]) in tokenizer.decode(token_ids)


class TestBeginningsAndEnds:
    @pytest.fixture
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """Puts <s> in front of a text and </s> behind it."""
        tokenizer = byte_tokenizer(chat_template="<s>{{ messages[0].content }}")
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        return tokenizer

    @pytest.mark.parametrize(
        ("text", "expected"), [("a", "<s>a"), ("<s>a", "<s>a"), ("<s><s>a</s>", "<s><s>a</s>")]
    )
    def test_a_raw_text_begins_once_and_has_no_end(
        self, tokenizer: PreTrainedTokenizerBase, text: str, expected: str
    ) -> None:
        assert tokenizer.decode(encode_prompt(tokenizer, text, raw=True)) == expected

    def test_a_chat_begins_as_its_template_says(self, tokenizer: PreTrainedTokenizerBase) -> None:
        assert tokenizer.decode(encode_prompt(tokenizer, "<s>a")) == "<s><s>a"
        assert encode_prompt(tokenizer, "<s>a").count(0) == 1

    def test_a_tokenizer_that_adds_nothing_stays_so(self) -> None:
        tokenizer = byte_tokenizer()
        assert encode_prompt(tokenizer, "<s>a", raw=True) == tokenizer("<s>a").input_ids


REFUSES_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate') }}{% endif %}{{ m.role[0] ~ ':' ~ m.content }}\n"
    "{% endfor %}"
)
DROPS_SYSTEM = (
    "{% for m in messages %}{% if m.role in ('user', 'assistant') %}"
    "{{ m.role[0] ~ ':' ~ m.content }}\n{% endif %}{% endfor %}"
)
WANTS_PARTS = (
    "{% for m in messages %}{{ m.role[0] }}:{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% else %}<image>{% endif %}{% endfor %}{{ '\n' }}"
    "{% endfor %}"
)
PLAIN = "{% for m in messages %}{{ m.role[0] ~ ':' ~ m.content }}\n{% endfor %}"
WANTS_ONE_PART = PLAIN.replace("m.content", "m.content[0]['text']")
ANSWER: Message = {"role": "assistant", "content": "yes"}


def _user(content: Any) -> Message:
    return {"role": "user", "content": content}


def _calling(arguments: Any) -> Message:
    function = {"name": "f", "arguments": arguments}
    calls = [{"id": "1", "type": "function", "function": function}]
    return {"role": "assistant", "content": None, "tool_calls": calls}


def _system(content: str) -> Message:
    return {"role": "system", "content": content}


def _rendered(template: Any, messages: list[Message], **arguments: Any) -> str:
    tokenizer = byte_tokenizer(chat_template=template)
    return tokenizer.decode(encode_prompt(tokenizer, messages, chat_template_kwargs=arguments))


class TestForms:
    @pytest.mark.parametrize("template", [REFUSES_SYSTEM, DROPS_SYSTEM])
    def test_a_system_text_goes_in_front_where_there_is_no_place_for_it(
        self, template: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        template += f"{{# {id(caplog)} #}}"  # said once for each template
        messages = [_system("Be brief."), _user("a"), ANSWER, _user("b")]
        expected = "u:Be brief.\n\na\na:yes\nu:b\n"
        with caplog.at_level(logging.WARNING):
            assert [_rendered(template, messages) for _ in range(2)] == [expected, expected]
        assert [record.message for record in caplog.records] == [
            "the chat template takes no system message; its text goes in front of the first user "
            "message"
        ]

    def test_a_system_message_stays_where_it_has_a_place(
        self, caplog: pytest.LogCaptureFixture
    ) -> None:
        assert _rendered(PLAIN, [_system("S"), _user("a")]) == "s:S\nu:a\n"
        assert not caplog.records

    @pytest.mark.parametrize("template", [PLAIN, WANTS_PARTS, WANTS_ONE_PART])
    @pytest.mark.parametrize(
        "content", ["a b", [{"type": "text", "text": "a "}, {"type": "text", "text": "b"}]]
    )
    def test_contents_are_given_as_the_template_wants_them(
        self, template: str, content: Any
    ) -> None:
        assert _rendered(template, [_user(content), ANSWER]) == "u:a b\na:yes\n"

    def test_parts_and_no_system_role_at_once(self) -> None:
        template = WANTS_PARTS.replace(
            "{{ m.role[0] }}", "{% if m.role == 'system' %}{{ raise_exception('no') }}{% endif %}u"
        )
        assert _rendered(template, [_system("S"), _user("a")]) == "u:S\n\na\n"

    @pytest.mark.parametrize(
        ("template", "messages", "reason"),
        [
            (REFUSES_SYSTEM, [_user("a"), _user("b")], "Roles must alternate"),
            (REFUSES_SYSTEM, [_system("S"), _user("a"), _user("b")], "Roles must alternate"),
            (REFUSES_SYSTEM, [_system("S")], "System role not supported"),
            (DROPS_SYSTEM, [_system("S")], r"leaves out message 1 of 1 \(role 'system'\)"),
            (
                DROPS_SYSTEM,
                [_system("S"), _user("a"), {"role": "tool", "content": "5"}],
                r"leaves out message 3 of 3 \(role 'tool'\)",
            ),
            ("{{ messages[-1].content }}", [_user("a"), _user("b")], "message 1 of 2"),
            ("{{ messages[0].contents }}", [_user("a")], r"leaves out message 1 of 1"),
            ("{{ messages[-1].content[0].text }}", [_user("a"), _user("b")], "message 1 of 2"),
            ("{{ 1 // 0 }}", [_user("a")], "zero"),
            ("{{ messages[0].x.y }}", [_user("a")], "no attribute 'x'"),
            ("{% for m in messages %}{{ m.content }}", [_user("a")], "can't be used .*endfor"),
            (
                {"tool_use": PLAIN, "rag": PLAIN},
                [_user("a")],
                r"can't be used .*multiple chat templates",
            ),
            (PLAIN, [_user([{"type": "image"}])], "messages must be a list of"),
            (PLAIN, [_user([{"type": "text", "text": 5}])], "messages must be a list of"),
        ],
        ids=str,
    )
    def test_what_a_template_cannot_take_is_told_in_one_line(
        self, template: Any, messages: list[Message], reason: str
    ) -> None:
        with pytest.raises(ConfigError, match=reason) as caught:
            _rendered(template, messages)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        "template",
        [
            "{% for m in messages %}{{ m.content | upper | trim }}{% endfor %}",
            "{% for m in messages %}{{ m.content | length }}{% endfor %}",
        ],
    )
    def test_a_content_that_is_changed_is_not_lost(self, template: str) -> None:
        assert _rendered(template, [_user(" ab "), _user("c")]) in ("ABC", "41")

    def test_an_answer_without_text_is_not_lost(self) -> None:
        assert _rendered(DROPS_SYSTEM, [_user("a"), {"role": "assistant", "content": ""}])


CALLING = (
    "{% for m in messages %}{{ m.content + '' }}{% for call in m.tool_calls or [] %}"
    "<tool_call>CALL</tool_call>{% endfor %};{% endfor %}"
)


class TestToolCalls:
    @pytest.mark.parametrize("arguments", ['{"city": "Paris"}', {"city": "Paris"}], ids=repr)
    @pytest.mark.parametrize("content", [None, "", [], "left out"], ids=repr)
    @pytest.mark.parametrize(
        "call",
        [
            "{{ f.name }} {{ f.arguments | tojson }}",
            "{{ f.name + ' ' + f.arguments }}",
            "{{ f.name }} {{ f.arguments }}",
            '{{ f.name }} {"{% for k, v in f.arguments | items %}{{ k }}": "{{ v }}"{% endfor %}}',
        ],
    )
    @pytest.mark.parametrize("wants_none", [False, True])
    def test_are_given_as_the_template_wants_them(
        self, arguments: Any, content: Any, call: str, wants_none: bool
    ) -> None:
        template = CALLING.replace("CALL", "{% set f = call.function %}" + call)
        if wants_none:
            template = template.replace("m.content + ''", "m.content")
            calls = "([] if m.content is string else m.tool_calls)"
            template = template.replace("m.tool_calls or []", calls)
        message = _calling(arguments) | {"content": content}
        if content == "left out":
            del message["content"]
        answer = {"role": "tool", "tool_call_id": "1", "content": "5"}
        expected = '<tool_call>f {"city": "Paris"}</tool_call>;5;'
        assert _rendered(template, [message, answer]) == expected

    def test_that_the_template_leaves_out_are_told(self) -> None:
        for content in (None, "I call."):
            with pytest.raises(ConfigError, match="leaves out the tool calls"):
                _rendered(PLAIN, [_user("a"), _calling("{}") | {"content": content}])

    @pytest.mark.parametrize("calls", [5, ["f"], [{"function": {"arguments": "{}"}}]], ids=str)
    def test_that_are_malformed_are_told(self, calls: Any) -> None:
        with pytest.raises(ConfigError, match="tool_calls of a message must be a list"):
            _rendered(CALLING, [{"role": "assistant", "content": None, "tool_calls": calls}])

    def test_that_are_no_text_are_told(self) -> None:
        with pytest.raises(ConfigError, match="half of a surrogate pair"):
            _rendered(CALLING, [_calling({"city": "\ud83d"})])

    @pytest.mark.parametrize("arguments", [{"</tool_call>": "</tool_call><s>"}, "</tool_call><s>"])
    def test_hold_no_control_tokens(self, arguments: Any) -> None:
        template = CALLING.replace("CALL", "{{ call.function | tojson }}")
        tokenizer = byte_tokenizer(["<tool_call>", "</tool_call>"], template)
        token_ids = encode_messages(tokenizer, [_calling(arguments), _user("<tool_call>")])
        assert [token for token in token_ids if token in (0, 259, 260)] == [259, 260]
        written = json.dumps({"name": "f", "arguments": arguments})
        assert f"<tool_call>{written}</tool_call>" in tokenizer.decode(token_ids)


class TestArguments:
    THINKING = PLAIN + (
        "{% if enable_thinking is not defined %}{% set enable_thinking = true %}{% endif %}"
        "{% if not enable_thinking %}<think></think>{% endif %}{{ bos_token }}{{ level }}"
    )

    def test_reach_the_template(self) -> None:
        assert _rendered(self.THINKING, [_user("a")]) == "u:a\n<s>"
        found = _rendered(self.THINKING, [_user("a")], enable_thinking=False, level=3)
        assert found == "u:a\n<think></think><s>3"

    @pytest.mark.parametrize(
        ("template", "reads"),
        [(THINKING, "it reads enable_thinking, level$"), (PLAIN, "it reads no arguments at all")],
    )
    @pytest.mark.parametrize("name", ["thinking", "messages", "add_generation_prompt", "tokenize"])
    def test_that_it_does_not_read_are_told(self, template: str, reads: str, name: str) -> None:
        tokenizer = byte_tokenizer(chat_template=template)
        with pytest.raises(ConfigError, match=f"reads no '{name}'; {reads}"):
            encode_prompt(tokenizer, "a", chat_template_kwargs={name: True})

    @pytest.mark.parametrize("raw", [True, False])
    def test_go_with_a_template_alone(self, raw: bool) -> None:
        tokenizer = byte_tokenizer(chat_template=PLAIN if raw else None)
        with pytest.raises(ConfigError, match="leave chat_template_kwargs out"):
            encode_prompt(tokenizer, "a", raw, chat_template_kwargs={"enable_thinking": False})

    def test_tools_choose_the_template_for_them(self) -> None:
        templates = {"default": PLAIN, "tool_use": "{{ tools[0].name }} " + PLAIN}
        assert _rendered(templates, [_user("a")]) == "u:a\n"
        assert _rendered(templates, [_user("a")], tools=[{"name": "f"}]) == "f u:a\n"
        with pytest.raises(ConfigError, match="reads no 'tools'"):
            _rendered(PLAIN, [_user("a")], tools=[{"name": "f"}])


def _special(tokenizer: PreTrainedTokenizerBase, token_ids: list[int]) -> list[int]:
    unknown = tokenizer.unk_token_id
    return [token for token in token_ids if token in tokenizer.all_special_ids and token != unknown]


def _places(token_ids: list[int], token: int) -> list[int]:
    return [place for place, one in enumerate(token_ids) if one == token]

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
from tiny_lm import interrupt_once, sharpened, tiny_lm
from transformers import PreTrainedModel

from river_llm import ConfigError, ContextFullError, Conversation, ExitPolicy, RiverLM
from river_llm.config import SamplingConfig
from river_llm.text.prompt import Message, encode_prompt

QUESTIONS = ["Who are you?", "And then?", "Why so?"]
SETTINGS: dict[str, Any] = {"max_new_tokens": 12, "temperature": 1.0, "seed": 1}


@pytest.fixture
def lm(tiny_llama: PreTrainedModel) -> RiverLM:
    """Float32, room for a few turns, some characters that end an answer."""
    return tiny_lm(sharpened(tiny_llama), context_length=256, stop_tokens=frozenset({50, 51}))


def test_turns_answer_as_the_whole_chat_at_once_would(lm: RiverLM) -> None:
    conversation = Conversation(lm, **SETTINGS)
    answers = [_answer(conversation, question) for question in QUESTIONS]
    messages: list[Message] = []
    for question, answer in zip(QUESTIONS, answers, strict=True):
        messages.append({"role": "user", "content": question})
        assert lm.chat(messages, **SETTINGS).text == answer
        messages.append({"role": "assistant", "content": answer})
    assert conversation.messages == messages
    assert len(set(answers)) == 3


def test_a_turn_is_a_string(lm: RiverLM) -> None:
    conversation = Conversation(lm)
    with pytest.raises(ConfigError, match="message is of type NoneType; give a string"):
        list(conversation.stream(None))  # type: ignore[arg-type]
    assert conversation.messages == []


def test_a_turn_runs_only_what_is_new(lm: RiverLM, rows: list[int]) -> None:
    lm.stop_tokens = frozenset()
    conversation = Conversation(lm, policy=ExitPolicy.never(), **SETTINGS)
    for question in QUESTIONS:
        _answer(conversation, question)
    first = len(encode_prompt(lm.tokenizer, QUESTIONS[0]))
    # The last token of an answer is chosen but not run: it is prefilled with the next question.
    others = [1 + len(f"\nu:{question}\na:") for question in QUESTIONS[1:]]
    assert [count for count in rows if count > 1] == [first, *others]


def test_the_same_prompt_again_runs_its_last_token_only(lm: RiverLM, rows: list[int]) -> None:
    token_ids = encode_prompt(lm.tokenizer, QUESTIONS[0])
    lm.policy = ExitPolicy.never()
    answers = [
        [
            response.token
            for response in lm.stream_tokens(token_ids, SamplingConfig(**SETTINGS), reuse_cache)
        ]
        for reuse_cache in (False, True)
    ]
    assert rows[0] == len(token_ids)
    assert set(rows[1:]) == {1}
    assert answers[0] == answers[1]


def test_what_exits_wrote_of_an_answer_is_read_anew(lm: RiverLM) -> None:
    lm.policy = ExitPolicy.similarity(0.9)
    conversation = Conversation(lm, **SETTINGS)
    _answer(conversation, QUESTIONS[0])
    responses = list(conversation.stream(QUESTIONS[1]))
    first = len(encode_prompt(lm.tokenizer, QUESTIONS[0]))
    assert {response.cached_prompt_tokens for response in responses} == {first}
    assert (
        "".join(r.text for r in responses) == lm.chat(conversation.messages[:-1], **SETTINGS).text
    )


@pytest.mark.parametrize("policy", [ExitPolicy.never(), ExitPolicy.always()])
def test_is_unaffected_by_other_answers_between_its_turns(lm: RiverLM, policy: ExitPolicy) -> None:
    lm.policy = policy
    conversation = Conversation(lm, **SETTINGS)
    for question in QUESTIONS:
        _answer(conversation, question)
    expected = conversation.messages
    conversation = Conversation(lm, **SETTINGS)
    others = [
        lambda: lm.generate("Something else", max_new_tokens=5),
        lambda: lm.generate_batch(["Two", "at once"], max_new_tokens=5),
        lambda: lm.chat([*conversation.messages, *conversation.messages], max_new_tokens=5),
    ]
    for question, between in zip(QUESTIONS, others, strict=True):
        _answer(conversation, question)
        between()
    assert conversation.messages == expected


def test_is_unaffected_by_an_old_stream_that_ends_late(lm: RiverLM) -> None:
    conversation = Conversation(lm, **SETTINGS)
    _answer(conversation, QUESTIONS[0])
    messages = [*conversation.messages, {"role": "user", "content": QUESTIONS[1]}]
    expected = lm.chat(messages, **SETTINGS).text
    stream = lm.stream(messages, **SETTINGS)
    next(stream)
    lm.generate("Something else, and longer than the chat before it", max_new_tokens=40)
    stream.close()  # type: ignore[attr-defined]
    assert _answer(conversation, QUESTIONS[1]) == expected


class TestCutShort:
    def test_the_partial_answer_stays(self, lm: RiverLM) -> None:
        lm.stop_tokens = frozenset()
        conversation = Conversation(lm, **SETTINGS)
        stream = conversation.stream(QUESTIONS[0])
        text = "".join(next(stream).text for _ in range(5))
        stream.close()
        assert conversation.messages[1:] == [{"role": "assistant", "content": text}]
        assert len(text) == 5
        _check_next_turn(conversation, lm)

    @pytest.mark.parametrize("passes", [1, 4])
    def test_by_ctrl_c_the_partial_answer_stays(self, lm: RiverLM, passes: int) -> None:
        lm.stop_tokens = frozenset()
        conversation = Conversation(lm, **SETTINGS)
        interrupt_once(lm.engine.attached.model, passes)
        stream = conversation.stream(QUESTIONS[0])
        text = "".join(next(stream).text for _ in range(passes))
        with pytest.raises(KeyboardInterrupt):
            next(stream)
        assert conversation.messages[-1] == {"role": "assistant", "content": text}
        _check_next_turn(conversation, lm)

    def test_before_the_first_token_the_question_goes_too(self, lm: RiverLM) -> None:
        conversation = Conversation(lm, **SETTINGS)
        _answer(conversation, QUESTIONS[0])
        messages = copy.deepcopy(conversation.messages)
        interrupt_once(lm.engine.attached.model, 0)
        with pytest.raises(KeyboardInterrupt):
            next(conversation.stream(QUESTIONS[2]))
        assert conversation.messages == messages
        _check_next_turn(conversation, lm)


def test_a_system_prompt_comes_first(lm: RiverLM) -> None:
    conversation = Conversation(lm, system="Be brief", **SETTINGS)
    answer = _answer(conversation, QUESTIONS[0])
    prompt = f"s:Be brief\nu:{QUESTIONS[0]}\na:"
    assert answer == lm.generate(prompt, raw=True, **SETTINGS).text
    assert [message["role"] for message in conversation.messages] == ["system", "user", "assistant"]
    assert Conversation(lm).messages == []


@pytest.mark.parametrize("text", ["", " \n"])
def test_refuses_an_empty_message(lm: RiverLM, text: str) -> None:
    conversation = Conversation(lm)
    with pytest.raises(ConfigError, match="the message is empty"):
        next(conversation.stream(text))
    assert conversation.messages == []


def test_refuses_what_no_longer_fits_and_stays_as_it_was(lm: RiverLM) -> None:
    conversation = Conversation(lm, **SETTINGS)
    _answer(conversation, QUESTIONS[0])
    messages = copy.deepcopy(conversation.messages)
    lm.generate("Something else", max_new_tokens=40)
    with pytest.raises(ContextFullError, match="shorten the prompt"):
        _answer(conversation, "x" * 250)
    assert conversation.messages == messages
    _check_next_turn(conversation, lm)


def test_refuses_unknown_settings_at_once(lm: RiverLM) -> None:
    with pytest.raises(ConfigError, match="'heat'"):
        Conversation(lm, heat=1)


class TestChatTemplates:
    def test_a_system_prompt_that_has_no_place_goes_in_front_and_is_told_once(
        self, lm: RiverLM, caplog: pytest.LogCaptureFixture
    ) -> None:
        lm.tokenizer.chat_template = (
            "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
            "{% for m in messages %}{{ m.role[0] ~ ':' ~ m.content ~ '\n' }}{% endfor %}a:"
        )
        with caplog.at_level(logging.WARNING):
            conversation = Conversation(lm, system="Be brief", **SETTINGS)
            assert caplog.text.count("takes no system message") == 1  # before the first answer
            answers = [_answer(conversation, question) for question in QUESTIONS[:2]]
        assert caplog.text.count("takes no system message") == 1
        prompt = f"u:Be brief\n\n{QUESTIONS[0]}\na:"
        assert answers[0] == lm.generate(prompt, raw=True, **SETTINGS).text

    def test_arguments_and_control_tokens_reach_every_turn(
        self, lm: RiverLM, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        lm.tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ level }}"
        prompts = []
        stream = lm.stream_tokens

        def spy(token_ids: list[int], *args: Any, **settings: Any) -> Any:
            prompts.append(lm.tokenizer.decode(token_ids))
            return stream(token_ids, *args, **settings)

        monkeypatch.setattr(lm, "stream_tokens", spy)
        text: dict[str, Any] = {"chat_template_kwargs": {"level": 7}, "max_new_tokens": 1}
        conversation = Conversation(lm, allow_control_tokens=True, **text)
        _answer(conversation, "Hi<end>")
        for policy in (None, ExitPolicy.never()):
            lm.generate("Hi", policy=policy, **text)
        lm.chat([{"role": "user", "content": "Hi"}], **text)
        assert prompts == ["Hi<end>7", "Hi7", "Hi7", "Hi7"]
        with pytest.raises(ConfigError, match="reads no 'height'; it reads level"):
            Conversation(lm, chat_template_kwargs={"height": 7})
        with pytest.raises(ConfigError, match="reads no 'height'"):
            lm.generate_batch(["Hi"], chat_template_kwargs={"height": 7})
        with pytest.raises(ConfigError, match=r"'enable_thinking'; .* chat_template_kwargs"):
            lm.generate("Hi", enable_thinking=False)


def _answer(conversation: Conversation, question: str) -> str:
    return "".join(response.text for response in conversation.stream(question))


def _check_next_turn(conversation: Conversation, lm: RiverLM) -> None:
    """It answers as the chat so far would with an empty cache."""
    messages = [*conversation.messages, {"role": "user", "content": QUESTIONS[1]}]
    answer = _answer(conversation, QUESTIONS[1])
    assert lm.chat(messages, **SETTINGS).text == answer

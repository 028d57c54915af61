"""Options of `generate` and `chat` that decide what the model is told, and where it stops."""

from __future__ import annotations

from typing import Any

import pytest
from byte_models import byte_model, byte_tokenizer, save_folder, speaks_only
from command_line import Outcome, run

from river_llm.text.prompt import encode_prompt

TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"
    "{% if level is defined %}{{ level }}{% endif %}<|answer|>"
)
SPOKEN = 259  # <|turn|>, which the model says for ever
TOKENIZER = byte_tokenizer(["<|turn|>", "<|answer|>"], TEMPLATE)
OPTIONS = ("--group-size", 32, "-n", 3, "--policy", "never")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    model = speaks_only(byte_model(vocab_size=261), SPOKEN)
    return str(save_folder(tmp_path_factory.mktemp("model"), model, TOKENIZER))


def answer(model: str, prompt: str, *options: object) -> dict[str, Any]:
    return run("generate", prompt, "-m", model, "--json", *OPTIONS, *options).json


def chat(model: str, *options: object) -> Outcome:
    return run("chat", "-m", model, *OPTIONS, *options, stdin="Hi\nHo\n/clear\nHi\n")


def test_control_tokens_in_a_prompt_are_text_unless_they_are_allowed(model: str) -> None:
    prompt = "a<|turn|>"
    text, token = answer(model, prompt), answer(model, prompt, "--allow-control-tokens")
    assert text["prompt_tokens"] == len(encode_prompt(TOKENIZER, prompt)) == 11
    assert token["prompt_tokens"] == 4
    assert answer(model, prompt, "--raw")["prompt_tokens"] == 2
    assert (text["allow_control_tokens"], token["allow_control_tokens"]) == (False, True)


def test_arguments_reach_the_template(model: str) -> None:
    plain = answer(model, "a")
    more = answer(model, "a", "--chat-template-kwargs", '{"level": 12}')
    assert more["prompt_tokens"] == plain["prompt_tokens"] + 2
    assert more["chat_template_kwargs"] == {"level": 12}
    assert chat(model, "--chat-template-kwargs", '{"level": 12}').exit_code == 0


@pytest.mark.parametrize("command", ["generate", "chat"])
@pytest.mark.parametrize(
    ("given", "exit_code", "reason"),
    [
        ('{"levels": 1}', 1, "reads no 'levels'; it reads level"),
        ("[1]", 2, "is no JSON object"),
        ("{level: 1}", 2, "is no JSON"),
    ],
)
def test_arguments_that_are_none_are_one_line(
    model: str, command: str, given: str, exit_code: int, reason: str
) -> None:
    prompt = ["Hi"] if command == "generate" else []
    outcome = run(command, *prompt, "-m", model, *OPTIONS, "--chat-template-kwargs", given)
    outcome.check_fails(exit_code, reason)


@pytest.mark.parametrize(
    "option", [("--chat-template-kwargs", '{"level": 1}'), ("--allow-control-tokens",)]
)
def test_a_raw_prompt_has_no_use_for_them(model: str, option: tuple[str, ...]) -> None:
    outcome = run("generate", "Hi", "-m", model, *OPTIONS, "--raw", *option)
    outcome.check_fails(2, "a raw prompt goes through no chat template")


def test_a_system_prompt_without_a_place_is_told_once(
    model: str, caplog: pytest.LogCaptureFixture
) -> None:
    outcome = chat(model, "--system", "Be brief.")
    assert outcome.exit_code == 0
    assert outcome.stderr.count("tokens (") == 3
    assert caplog.text.count("takes no system message") == 1


@pytest.mark.parametrize("mode", ["river", "lossless"])
def test_a_stop_string_may_spell_a_special_token(model: str, mode: str) -> None:
    command = ["generate", "Hi", "-m", model, "--json", "--group-size", 32, "-n", 3, "--raw"]
    stopped = run(*command, "--mode", mode, "--stop", "<|turn|>").json
    assert (stopped["tokens"], stopped["finish_reason"]) == ([SPOKEN], "stop")
    going_on = run(*command, "--mode", mode, "--stop", "<|answer|>").json
    assert going_on["finish_reason"] == "length"

"""`--prompt-cache FILE` of `generate` and `chat`, and what else shapes a prompt."""

from __future__ import annotations

from pathlib import Path

import pytest
from byte_models import byte_model, byte_tokenizer, save_folder, speaks_only
from command_line import Outcome, run
from test_cli import answer
from test_cli_chat import interrupt

from river_llm import ExitPolicy, RiverLM
from river_llm.cli.prompt_cache import is_worth_keeping

pytest_plugins = ["cli_models"]

DOCUMENT = "The river runs to the sea, past mills and towns, and never turns back. " * 3
QUESTIONS = ["Where does it run to?", "Past what does it run?"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "document.safetensors"


def generate(model: str, prompt: str, path: Path, *options: object) -> Outcome:
    return run("generate", prompt, "-m", model, "-n", 6, "--prompt-cache", path, *options)


def kept(model: str, path: Path) -> list[int]:
    """The tokens in a file."""
    lm = RiverLM.from_pretrained(model, policy=ExitPolicy.never(), device="cpu")
    lm.load_prompt_cache(path)
    return lm.prompt_cache_tokens


class TestPromptCache:
    @pytest.mark.parametrize(
        "options", [(), ("--exit-layer", 1), ("--exit-layer", 1, "--prefill", "river")], ids=str
    )
    @pytest.mark.parametrize("engine", ["cpu", "torch"])
    def test_a_document_is_read_once(
        self, model: str, path: Path, engine: str, options: tuple[object, ...]
    ) -> None:
        options = (*options, "--json", "--engine", engine)
        if engine == "torch":
            options += ("--dtype", "float32")
        first = generate(model, DOCUMENT + QUESTIONS[0], path, *options)
        assert first.json["cached_prompt_tokens"] == 0
        assert f" prompt tokens are kept in {path} (" in first.stderr
        content = path.read_bytes()
        second = generate(model, DOCUMENT + QUESTIONS[1], path, *options)
        expected = answer(model, *options, prompt=DOCUMENT + QUESTIONS[1], length=6)
        assert second.json["tokens"] == expected["tokens"]
        assert second.json["exit_layers"] == expected["exit_layers"]
        shared = second.json["cached_prompt_tokens"]
        assert shared > second.json["prompt_tokens"] // 2
        assert f"{shared} of {second.json['prompt_tokens']} prompt tokens come" in second.stderr
        assert path.read_bytes() == content

    def test_a_file_of_another_text_stays(self, model: str, path: Path) -> None:
        generate(model, DOCUMENT, path)
        content = path.read_bytes()
        outcome = generate(model, "Something else entirely, of some length.", path)
        assert "holds another text and stays as it is" in outcome.stderr
        assert path.read_bytes() == content

    def test_a_document_that_has_grown_is_kept_anew(self, model: str, path: Path) -> None:
        generate(model, DOCUMENT, path)
        before = len(kept(model, path))
        generate(model, 2 * DOCUMENT, path)
        assert len(kept(model, path)) > before

    def test_an_answer_that_is_cut_keeps_its_prompt(
        self, model: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interrupt(monkeypatch, 2)
        outcome = generate(model, DOCUMENT, path, "--json", "--policy", "never")
        assert outcome.json["finish_reason"] == "interrupted"
        assert len(kept(model, path)) == outcome.json["prompt_tokens"]

    def test_a_chat_keeps_its_first_prompt(self, model: str, path: Path) -> None:
        command = ("chat", "-m", model, "-n", 4, "--prompt-cache", path)
        run(*command, stdin=f"{DOCUMENT}\n")
        outcome = run(*command, stdin=f"{DOCUMENT}\nAnd?\n")
        assert "prompt tokens come from" in outcome.stderr

    def test_a_file_of_another_model_is_refused(
        self, model: str, other_model: str, path: Path
    ) -> None:
        generate(other_model, "Hi", path)
        generate(model, "Hi", path).check_fails(1, str(path))

    def test_a_folder_that_is_not_there_is_told(self, model: str, tmp_path: Path) -> None:
        generate(model, DOCUMENT, tmp_path / "none" / "file").check_fails(1, "none")


TEMPLATE = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    "{% for m in messages %}<|turn|>{{ m.content }}{% endfor %}"
    "{% if level is defined %}{{ level }}{% endif %}<|answer|>"
)
SPOKEN = 259  # <|turn|>, which the model says for ever
TOKENIZER = byte_tokenizer(["<|turn|>", "<|answer|>"], TEMPLATE)
OPTIONS = ("--group-size", 32)


class TestPrompt:
    @pytest.fixture(scope="class")
    def speaker(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        model = speaks_only(byte_model(vocab_size=261), SPOKEN)
        return str(save_folder(tmp_path_factory.mktemp("model"), model, TOKENIZER))

    def test_control_tokens_are_text_unless_they_are_allowed(self, speaker: str) -> None:
        of = {
            option: answer(speaker, *OPTIONS, *option.split(), prompt="a<|turn|>", length=3)
            for option in ("", "--allow-control-tokens", "--raw")
        }
        assert [output["prompt_tokens"] for output in of.values()] == [11, 4, 2]

    def test_arguments_reach_the_template(self, speaker: str) -> None:
        option = "--chat-template-kwargs"
        plain = answer(speaker, *OPTIONS, prompt="a", length=3)
        more = answer(speaker, *OPTIONS, option, '{"level": 12}', prompt="a", length=3)
        assert more["prompt_tokens"] == plain["prompt_tokens"] + 2
        assert more["chat_template_kwargs"] == {"level": 12}
        command = ("generate", "a", "-m", speaker, *OPTIONS, option)
        run(*command, '{"levels": 1}').check_fails(1, "reads no 'levels'; it reads level")
        run(*command, "[1]").check_fails(2, "is no JSON object")


@pytest.mark.parametrize(
    ("common", "kept", "new", "worth"),
    [
        (0, 0, 1, True),
        (1000, 20, 80, False),  # a longer one
        (1000, 20, 120, True),  # the document has grown
        (1000, 0, 70, True),
        (10, 1000, 5000, False),  # another text
        (500, 600, 5000, False),
        (30, 20, 8000, True),  # the first prompt was a short try
    ],
)
def test_a_prompt_is_kept_where_it_is_more_of_the_same_text(
    common: int, kept: int, new: int, worth: bool
) -> None:
    text = list(range(common))
    assert is_worth_keeping([*text, *[-1] * new], [*text, *[-2] * kept]) is worth

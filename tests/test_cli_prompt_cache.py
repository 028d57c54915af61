"""`--prompt-cache FILE` of `generate` and `chat`."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from command_line import Outcome, run
from test_cli import answer
from test_cli_chat import interrupt

from river_llm import ExitPolicy, RiverLM
from river_llm.cached_text import common_beginning
from river_llm.engines import CpuEngine
from river_llm.text.prompt import encode_prompt

pytest_plugins = ["cli_models"]

DOCUMENT = "The river runs to the sea, past mills and towns, and never turns back. " * 3
QUESTIONS = ["Where does it run to?", "Past what does it run?"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "document.safetensors"


@pytest.fixture
def lm(model: str) -> RiverLM:
    return RiverLM.from_pretrained(model, policy=ExitPolicy.never(), device="cpu")


def generate(model: str, prompt: str, path: Path, *options: object) -> Outcome:
    command = ("generate", prompt, "-m", model, "-n", 6, "--prompt-cache", path, *options)
    return run(*command)


def kept(lm: RiverLM, path: Path) -> list[int]:
    """The tokens in a file."""
    lm.load_prompt_cache(path)
    return lm.prompt_cache_tokens


def common(lm: RiverLM, first: str, second: str) -> int:
    texts = [encode_prompt(lm.tokenizer, text) for text in (first, second)]
    return common_beginning(*texts)


class TestGenerate:
    @pytest.mark.parametrize("options", [(), ("--mode", "lossless"), ("--prefill", "river")])
    @pytest.mark.parametrize("engine", ["cpu", "torch"])
    def test_reads_a_document_once(
        self, model: str, lm: RiverLM, path: Path, engine: str, options: tuple[str, ...]
    ) -> None:
        options = (*options, "--json", "--engine", engine)
        if engine == "torch":
            options += ("--dtype", "float32")
        first = generate(model, DOCUMENT + QUESTIONS[0], path, *options)
        tokens = encode_prompt(lm.tokenizer, DOCUMENT + QUESTIONS[0])
        assert first.json["cached_prompt_tokens"] == 0
        assert f"river-llm: {len(tokens)} prompt tokens are kept in {path} (" in first.stderr
        content = path.read_bytes()
        prompt = DOCUMENT + QUESTIONS[1]
        shared = common(lm, prompt, DOCUMENT + QUESTIONS[0])
        second = generate(model, prompt, path, *options)
        expected = answer(model, *options, prompt=prompt, length=6)
        assert second.json["tokens"] == expected["tokens"]
        assert second.json["exit_layers"] == expected["exit_layers"]
        assert second.json["cached_prompt_tokens"] == shared > len(tokens) // 2
        taken = f"{shared} of {second.json['prompt_tokens']} prompt tokens come from {path}\n"
        assert second.stderr == f"river-llm: {taken}"
        assert path.read_bytes() == content

    def test_keeps_exactly_the_prompt(self, model: str, lm: RiverLM, path: Path) -> None:
        for policy in ("never", "always", "similarity"):
            path.unlink(missing_ok=True)
            prefill = ("--prefill", "backbone", "--policy", policy)
            generate(model, DOCUMENT, path, *prefill)
            assert kept(lm, path) == encode_prompt(lm.tokenizer, DOCUMENT)

    def test_takes_a_file_of_the_other_mode(self, model: str, path: Path) -> None:
        generate(model, DOCUMENT + QUESTIONS[0], path, "--exit-layer", 1)
        lossless = ("--mode", "lossless", "--json")
        prompt = DOCUMENT + QUESTIONS[1]
        output = generate(model, prompt, path, *lossless).json
        assert output["cached_prompt_tokens"] > 20
        assert output["tokens"] == answer(model, *lossless, prompt=prompt, length=6)["tokens"]
        path.unlink()
        generate(model, DOCUMENT + QUESTIONS[0], path, *lossless)
        output = generate(model, prompt, path, "--exit-layer", 1, "--json").json
        assert output["cached_prompt_tokens"] > 20
        expected = answer(model, "--exit-layer", 1, prompt=prompt, length=6)
        assert output["tokens"] == expected["tokens"]

    def test_keeps_a_document_that_has_grown(self, model: str, lm: RiverLM, path: Path) -> None:
        generate(model, DOCUMENT + QUESTIONS[0], path)
        grown = DOCUMENT + "In spring it floods the meadows. "
        for question in QUESTIONS:
            outcome = generate(model, grown + question, path, "--json")
            expected = answer(model, prompt=grown + question, length=6)
            assert outcome.json["tokens"] == expected["tokens"]
            assert kept(lm, path) == encode_prompt(lm.tokenizer, grown + QUESTIONS[0])

    def test_leaves_the_file_of_another_text_alone(
        self, model: str, lm: RiverLM, path: Path
    ) -> None:
        generate(model, DOCUMENT + QUESTIONS[0], path)
        content = path.read_bytes()
        other = "A long story of a mountain, with a goat on its top. " * 9
        outcome = generate(model, other, path, "--json")
        assert outcome.json["tokens"] == answer(model, prompt=other, length=6)["tokens"]
        assert outcome.json["cached_prompt_tokens"] == common(lm, DOCUMENT, other)
        assert f"{path} holds another text and stays as it is" in outcome.stderr
        assert path.read_bytes() == content

    def test_shows_text_and_notes_apart(self, model: str, path: Path) -> None:
        for _ in range(2):
            outcome = generate(model, DOCUMENT, path)
            assert outcome.exit_code == 0
            text = answer(model, prompt=DOCUMENT, length=6)["text"]
            assert outcome.stdout == f"{text}\n"
        assert "6 tokens (length)" in outcome.stderr
        assert "prompt tokens come from" in outcome.stderr

    def test_compares_after_it_has_kept_the_prompt(
        self, model: str, lm: RiverLM, path: Path
    ) -> None:
        options = ("--compare", "--exit-layer", 1, "--json")
        output = generate(model, DOCUMENT, path, *options).json
        assert len(output["comparison"]) == 3
        assert kept(lm, path) == encode_prompt(lm.tokenizer, DOCUMENT)
        output = generate(model, DOCUMENT + QUESTIONS[0], path, "--exit-layer", 1, "--json").json
        expected = answer(model, "--exit-layer", 1, prompt=DOCUMENT + QUESTIONS[0], length=6)
        assert output["tokens"] == expected["tokens"]
        assert output["cached_prompt_tokens"] > 20


class TestChat:
    def test_begins_with_the_file(self, model: str, path: Path) -> None:
        generate(model, DOCUMENT + QUESTIONS[0], path)
        content = path.read_bytes()
        stdin = f"{DOCUMENT}{QUESTIONS[1]}\nAnd then?\n/clear\n{DOCUMENT}{QUESTIONS[0]}\n"
        command = ("chat", "-m", model, "-n", 6)
        outcome = run(*command, "--prompt-cache", path, stdin=stdin)
        assert outcome.exit_code == 0
        assert outcome.stdout == run(*command, stdin=stdin).stdout
        assert outcome.stderr.count("prompt tokens come from") == 1
        assert path.read_bytes() == content

    def test_keeps_its_first_prompt(self, model: str, lm: RiverLM, path: Path) -> None:
        command = ("chat", "-m", model, "-n", 6, "--prompt-cache", path)
        outcome = run(*command, stdin=f"{DOCUMENT}\nAnd then?\n")
        assert outcome.stderr.count("prompt tokens are kept in") == 1
        assert kept(lm, path) == encode_prompt(lm.tokenizer, DOCUMENT)

    def test_keeps_more_where_the_backbone_writes_all(
        self, model: str, lm: RiverLM, path: Path
    ) -> None:
        command = ("chat", "-m", model, "-n", 40, "--mode", "lossless", "--prompt-cache", path)
        outcome = run(*command, stdin=f"{DOCUMENT}\nAnd then?\n")
        assert outcome.stderr.count("prompt tokens are kept in") == 2
        assert len(kept(lm, path)) > len(encode_prompt(lm.tokenizer, DOCUMENT)) + 40

    def test_goes_on_where_the_file_cannot_be_written(
        self, model: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("river_llm.prompt_cache.save_file", _fail(OSError(28, "No space")))
        command = ("chat", "-m", model, "-n", 6)
        stdin = "Hello\nAnd you?\n"
        outcome = run(*command, "--prompt-cache", path, stdin=stdin)
        assert outcome.exit_code == 0
        assert outcome.stdout == run(*command, stdin=stdin).stdout
        assert "can't write the prompt cache" in outcome.stderr
        assert not path.exists()


class TestErrors:
    def test_a_damaged_file_is_refused_and_stays(self, model: str, path: Path) -> None:
        generate(model, DOCUMENT, path)
        content = path.read_bytes()
        for damaged in (content[:-1], content[:-1] + bytes([content[-1] ^ 1]), b"", b"words"):
            path.write_bytes(damaged)
            generate(model, DOCUMENT, path).check_fails(1, str(path), "damaged", "delete it")
            assert path.read_bytes() == damaged
        run("chat", "-m", model, "--prompt-cache", path, stdin="Hello\n").check_fails(1, "damaged")

    def test_a_file_of_another_model_or_engine_is_refused_and_stays(
        self, model: str, other_model: str, path: Path
    ) -> None:
        generate(model, "Hello", path)
        content = path.read_bytes()
        generate(other_model, "Hello", path).check_fails(1, "of another model")
        refused = generate(model, "Hello", path, "--engine", "torch")
        refused.check_fails(1, "engine cpu, this run has torch")
        refused = generate(model, "Hello", path, "--prefill", "river")
        refused.check_fails(1, "prefill rule")
        assert path.read_bytes() == content

    def test_a_place_that_cannot_be_is_refused_before_the_prompt_is_read(
        self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(CpuEngine, "prefill", _fail(AssertionError("the prompt is read")))
        generate(model, "Hello", tmp_path).check_fails(1, "is no file")
        generate(model, "Hello", tmp_path / "no" / "x").check_fails(1, "there is no folder")
        monkeypatch.setattr("os.access", lambda *_: False)
        generate(model, "Hello", tmp_path / "x").check_fails(1, "its folder is read-only")
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("json", [True, False])
    def test_an_answer_is_given_even_if_its_prompt_cannot_be_kept(
        self, model: str, path: Path, json: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with monkeypatch.context() as patched:
            patched.setattr("river_llm.prompt_cache.save_file", _fail(OSError(28, "No space")))
            outcome = generate(model, DOCUMENT, path, *["--json"] * json)
        assert outcome.exit_code == 1
        expected = answer(model, prompt=DOCUMENT, length=6)
        if json:
            assert f'"tokens": {expected["tokens"]}' in outcome.stdout
        else:
            assert outcome.stdout == f"{expected['text']}\n"
        assert outcome.stderr.splitlines()[-1].startswith("river-llm: can't write the prompt cache")
        assert not path.exists()

    def test_a_file_that_cannot_be_written_again_still_serves(
        self, model: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        generate(model, DOCUMENT, path)
        content = path.read_bytes()
        monkeypatch.setattr("os.access", lambda _, mode: not mode & os.W_OK)
        outcome = generate(model, DOCUMENT * 2, path, "--json")
        assert outcome.json["cached_prompt_tokens"] > 20
        assert "it is read-only" in outcome.stderr
        assert path.read_bytes() == content


class TestCtrlC:
    def test_in_an_answer_keeps_its_prompt(
        self, model: str, lm: RiverLM, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interrupt(monkeypatch, "decode", 2)
        output = generate(model, DOCUMENT, path, "--json").json
        assert output["finish_reason"] == "interrupted"
        assert kept(lm, path) == encode_prompt(lm.tokenizer, DOCUMENT)

    def test_before_an_answer_keeps_nothing(
        self, model: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        interrupt(monkeypatch, "prefill", 0)
        outcome = generate(model, DOCUMENT, path, "--json")
        assert outcome.json["finish_reason"] == "interrupted"
        assert outcome.json["cached_prompt_tokens"] == 0
        assert outcome.stderr == ""
        assert not path.exists()

    @pytest.mark.parametrize("is_there", [True, False])
    def test_while_the_file_is_written_leaves_the_old_one(
        self, model: str, path: Path, is_there: bool, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if is_there:
            generate(model, DOCUMENT, path)
        before = [entry.read_bytes() for entry in path.parent.iterdir()]
        monkeypatch.setattr("river_llm.prompt_cache.save_file", _fail(KeyboardInterrupt()))
        outcome = generate(model, DOCUMENT * 2, path, "--json")
        assert outcome.exit_code == 130
        told = f"river-llm: interrupted; the prompt is not kept in {path}"
        assert outcome.stderr.splitlines()[-1] == told
        expected = answer(model, prompt=DOCUMENT * 2, length=6)["tokens"]
        assert json.loads(outcome.stdout)["tokens"] == expected
        compared = generate(model, DOCUMENT * 2, path, "--json", "--compare")
        assert compared.exit_code == 130
        assert compared.stderr.splitlines()[-1] == (
            f"{told}; interrupted before the comparison was done"
        )
        assert "comparison" not in json.loads(compared.stdout)
        assert [entry.read_bytes() for entry in path.parent.iterdir()] == before

    def test_while_a_chat_writes_the_file_does_not_end_it(
        self, model: str, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("river_llm.prompt_cache.save_file", _fail(KeyboardInterrupt()))
        command = ("chat", "-m", model, "-n", 6)
        stdin = f"{DOCUMENT}\nAnd then?\n"
        outcome = run(*command, "--prompt-cache", path, stdin=stdin)
        assert outcome.exit_code == 0
        assert outcome.stdout == run(*command, stdin=stdin).stdout
        assert f"interrupted; the prompt is not kept in {path}" in outcome.stderr
        assert not path.exists()


def _fail(error: BaseException) -> Any:
    def fail(*_: object, **__: object) -> None:
        raise error

    return fail

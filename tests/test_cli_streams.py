"""Bytes in, bytes out: byte order marks, line breaks and encodings of stdin, files and stdout."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
from byte_models import byte_model, save_folder, speaks_only
from command_line import Outcome, run

from river_llm import RiverLM
from river_llm.cli import main
from river_llm.cli.check_exact import read_prompts
from river_llm.cli.streams import print_json

MARK = codecs.BOM_UTF8
TEXT = "Grüße\nan alle\n"
FORMS = {
    "plain": TEXT.encode(),
    "byte order mark": MARK + TEXT.encode(),
    "Windows": MARK + TEXT.replace("\n", "\r\n").encode(),
    "carriage returns alone": TEXT.replace("\n", "\r").encode(),
}
NO_TEXT = {
    "UTF-16": (TEXT.encode("utf-16"), "has NUL bytes, as UTF-16 has; convert it to UTF-8"),
    "Latin-1": (TEXT.encode("latin-1"), "is no UTF-8 text (at byte 2); convert it"),
}
of_forms = pytest.mark.parametrize("content", FORMS.values(), ids=FORMS.keys())
of_no_text = pytest.mark.parametrize(("content", "part"), NO_TEXT.values(), ids=NO_TEXT.keys())


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The directory of a model with a token for each byte."""
    return str(save_folder(tmp_path_factory.mktemp("streams") / "model", byte_model()))


@pytest.fixture
def prompts(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The text of every prompt that is answered, as the tokens have it."""
    given: list[str] = []
    stream_tokens = RiverLM.stream_tokens

    def spy(self: RiverLM, token_ids: list[int], *args: object, **options: object) -> Iterator:
        given.append(self.tokenizer.decode(token_ids))
        return stream_tokens(self, token_ids, *args, **options)

    monkeypatch.setattr(RiverLM, "stream_tokens", spy)
    return given


def pipe(content: bytes) -> io.TextIOWrapper:
    """A stdin that holds these bytes, with Python's own settings on Linux."""
    return io.TextIOWrapper(io.BytesIO(content), "utf-8", "strict", newline="\n")


def generate(model: str, *options: object, **stdin: io.TextIOBase) -> Outcome:
    return run("generate", "-m", model, "--group-size", 32, "-n", 2, *options, **stdin)


class TestTextThatComesIn:
    @of_forms
    def test_of_stdin_is_the_prompt(self, model: str, content: bytes, prompts: list[str]) -> None:
        assert generate(model, "--raw", "-", stdin=pipe(content)).exit_code == 0
        assert prompts == [TEXT]

    @of_no_text
    def test_of_stdin_that_is_none(self, model: str, content: bytes, part: str) -> None:
        generate(model, "-", stdin=pipe(content)).check_fails(2, f"stdin {part}")

    @of_forms
    def test_of_a_file_is_a_text_or_prompts(
        self, model: str, tmp_path: Path, content: bytes
    ) -> None:
        text, prompts = tmp_path / "text.txt", tmp_path / "prompts.jsonl"
        text.write_bytes(content)
        inspected = run("inspect", model, "--group-size", 32, "--json", "--text-file", text)
        assert len(inspected.json["tokens"]) == len(TEXT.encode())
        assert read_prompts(text) == ["Grüße", "an alle"]
        for words in ("Grüße", "an alle"):
            content = content.replace(words.encode(), json.dumps({"prompt": words}).encode())
        prompts.write_bytes(content)
        assert read_prompts(prompts) == ["Grüße", "an alle"]

    @of_no_text
    @pytest.mark.parametrize("command", ["inspect --text-file", "check-exact --prompts"])
    def test_of_a_file_that_is_none_is_refused_before_loading(
        self, tmp_path: Path, command: str, content: bytes, part: str
    ) -> None:
        path = tmp_path / "text.txt"
        path.write_bytes(content)
        run(*command.split(), path).check_fails(2, f"{path} {part}")


class TestChat:
    @pytest.fixture
    def chat(self, model: str) -> Callable[[bytes], Outcome]:
        options = ("chat", "-m", model, "--group-size", 32, "-n", 1)
        return lambda content: run(*options, stdin=pipe(content))

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_has_a_message_a_line_up_to_exit(
        self, chat: Callable[[bytes], Outcome], end: str, prompts: list[str]
    ) -> None:
        assert chat(MARK + f"/exit{end}Hi{end}".encode()).exit_code == 0
        assert prompts == []
        chat(MARK + f"Grüße{end}/clear{end}Hi{end}/exit{end}No{end}".encode())
        assert prompts == ["user: Grüße\nassistant: ", "user: Hi\nassistant: "]

    def test_leaves_out_a_line_that_is_no_text(
        self, chat: Callable[[bytes], Outcome], prompts: list[str]
    ) -> None:
        assert chat(b"caf\xe9\nH\0i\0\nHi\n").stderr.count("this line is no UTF-8 text") == 2
        assert prompts == ["user: Hi\nassistant: "]


def run_in(encoding: str, *arguments: object, errors: str = "strict") -> tuple[bytes, str]:
    """What a command that ends well writes to a stdout and a stderr of this encoding."""
    output, told = io.BytesIO(), io.BytesIO()
    stdout = io.TextIOWrapper(output, encoding, errors)
    stderr = io.TextIOWrapper(told, encoding, "backslashreplace")
    with (
        mock.patch.object(sys, "argv", ["river-llm", *map(str, arguments)]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
        pytest.raises(SystemExit) as ended,
    ):
        main()
    stdout.flush()
    stderr.flush()
    assert not ended.value.code, told.getvalue()
    return output.getvalue(), told.getvalue().decode(encoding)


class TestTextThatGoesOut:
    @pytest.fixture(scope="class")
    def speaker(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        """The directory of a model whose answers are of one byte that is no character: \ufffd."""
        speaks = speaks_only(byte_model(), 3 + 0xFF)
        return str(save_folder(tmp_path_factory.mktemp("streams") / "speaker", speaks))

    @pytest.mark.parametrize(
        ("encoding", "errors", "expected"),
        [
            ("cp1252", "strict", 3 * b"\\ufffd" + b"\n"),
            ("ascii", "strict", 3 * b"\\ufffd" + b"\n"),
            ("utf-8", "strict", "\ufffd\ufffd\ufffd\n".encode()),
            ("ascii", "xmlcharrefreplace", 3 * b"&#65533;" + b"\n"),
        ],
    )
    def test_has_an_escape_for_what_the_encoding_lacks(
        self, speaker: str, encoding: str, errors: str, expected: bytes
    ) -> None:
        command = ("generate", "-m", speaker, "--group-size", 32, "-n", 3, "--exit-layer", 1, "Hi")
        output, told = run_in(encoding, *command, errors=errors)
        assert output == expected
        assert "\\u" not in told

    def test_has_a_place_to_go(self, speaker: str, capsys: pytest.CaptureFixture[str]) -> None:
        argv = ["river-llm", "generate", "-m", speaker, "Hi"]
        with (
            mock.patch.object(sys, "argv", argv),
            mock.patch.object(sys, "stdout", None),
            mock.patch.object(RiverLM, "from_pretrained", side_effect=AssertionError),
            pytest.raises(SystemExit) as ended,
        ):
            main()
        told = capsys.readouterr().err
        assert told == "river-llm: standard output is closed; there is nowhere to write to\n"
        assert ended.value.code == 1

    @pytest.mark.parametrize(
        "command", ["inspect MODEL --text Grüße", "generate -m MODEL --exit-layer 1 -n 3 Hi"]
    )
    def test_is_ascii_as_json(self, speaker: str, command: str) -> None:
        words = command.replace("MODEL", speaker).split()
        output, told = run_in("ascii", *words, "--group-size", 32, "--json")
        found = json.loads(output.decode("ascii"))
        assert "\ufffd" in found.get("text", found.get("tokens"))
        assert told == ""


def test_json_has_null_for_numbers_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), 1.5], "b": {"c": (float("-inf"),)}, "d": "é\udce9"})
    assert capsys.readouterr().out == (
        '{"a": [null, 1.5], "b": {"c": [null]}, "d": "\\u00e9\\udce9"}\n'
    )

"""Bytes in, bytes out: byte order marks, line breaks and encodings of stdin, files and stdout."""

from __future__ import annotations

import codecs
import contextlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import pytest
from byte_models import byte_model, save_folder, speaks_only
from command_line import Outcome, run

from river_llm import RiverLM
from river_llm.cli import main
from river_llm.cli.check_exact import read_prompts
from river_llm.cli.streams import Replacement, print_json
from river_llm.errors import DataError
from river_llm.text.utf8 import decode_text

MARK = codecs.BOM_UTF8
TEXT = "Grüße\nan alle\n"
FORMS = {
    "plain": TEXT.encode(),
    "byte order mark": MARK + TEXT.encode(),
    "Windows": MARK + TEXT.replace("\n", "\r\n").encode(),
    "carriage returns alone": TEXT.replace("\n", "\r").encode(),
}
NO_TEXT = {
    "UTF-16": (TEXT.encode("utf-16"), "is UTF-16 text; convert it to UTF-8"),
    "UTF-16 of big endian": (codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"), "is UTF-16 text"),
    "UTF-16 without mark": (TEXT.encode("utf-16-le"), "is UTF-16 text"),
    "UTF-32": (TEXT.encode("utf-32"), "is UTF-32 text"),
    "Latin-1": (TEXT.encode("latin-1"), "is no UTF-8 text (at byte 2); convert it"),
    "a NUL byte": (b"one\0two three", "has NUL bytes"),
    "a NUL byte at the end": (b"Hi\0", "has NUL bytes"),
    "NUL bytes after words": (b"abc\0x\0", "has NUL bytes"),
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


def pipe(content: bytes, encoding: str = "utf-8") -> io.TextIOWrapper:
    """A stdin that holds these bytes, with Python's own settings on Linux."""
    return io.TextIOWrapper(io.BytesIO(content), encoding, "strict", newline="\n")


def generate(model: str, *options: object, **stdin: io.TextIOBase) -> Outcome:
    return run("generate", "-m", model, "--group-size", 32, "-n", 2, *options, **stdin)


class TestTextThatComesIn:
    @of_forms
    def test_is_utf8_with_single_line_feeds(self, content: bytes) -> None:
        assert decode_text(content, "it") == TEXT

    @of_no_text
    def test_is_refused_by_the_name_of_its_encoding(self, content: bytes, part: str) -> None:
        with pytest.raises(DataError) as caught:
            decode_text(content, "it")
        assert f"it {part}" in str(caught.value)

    @of_forms
    def test_of_stdin_is_the_prompt(self, model: str, content: bytes, prompts: list[str]) -> None:
        assert generate(model, "--raw", "-", stdin=pipe(content)).exit_code == 0
        assert prompts == [TEXT]

    @of_no_text
    def test_of_stdin_that_is_none(self, model: str, content: bytes, part: str) -> None:
        generate(model, "-", stdin=pipe(content)).check_fails(2, f"stdin {part}")

    @pytest.mark.parametrize("content", [TEXT.encode("latin-1"), TEXT.encode()])
    def test_of_stdin_is_in_the_locale_if_it_is_no_utf8(
        self, model: str, content: bytes, prompts: list[str]
    ) -> None:
        generate(model, "--raw", "-", stdin=pipe(content, "latin-1"))
        assert prompts == [TEXT]

    @of_forms
    def test_of_a_file_is_inspected(self, model: str, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "text.txt").write_bytes(content)
        options = ("--group-size", 32, "--json", "--text-file", tmp_path / "text.txt")
        assert len(run("inspect", model, *options).json["tokens"]) == len(TEXT.encode())

    @of_forms
    def test_of_a_file_has_a_prompt_a_line(self, tmp_path: Path, content: bytes) -> None:
        (tmp_path / "prompts.txt").write_bytes(content)
        assert read_prompts(tmp_path / "prompts.txt") == ["Grüße", "an alle"]

    @of_forms
    def test_of_a_file_has_an_object_a_line(self, tmp_path: Path, content: bytes) -> None:
        ends = {"Grüße": '{"prompt": "Grüße"}', "an alle": '{"prompt": "an alle"}'}
        for words, line in ends.items():
            content = content.replace(words.encode(), line.encode())
        (tmp_path / "prompts.jsonl").write_bytes(content)
        assert read_prompts(tmp_path / "prompts.jsonl") == list(ends)

    @of_no_text
    @pytest.mark.parametrize(
        "command",
        ["inspect --text-file", "check-exact --prompts"],
    )
    def test_of_a_file_that_is_none_is_refused_before_loading(
        self, tmp_path: Path, command: str, content: bytes, part: str
    ) -> None:
        path = tmp_path / "text.txt"
        path.write_bytes(content)
        run(*command.split(), path).check_fails(2, f"{path} {part}")


class TestChat:
    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    @pytest.mark.parametrize("mark", [b"", MARK], ids=["plain", "mark"])
    def test_ends_by_its_first_line(
        self, model: str, mark: bytes, end: str, prompts: list[str]
    ) -> None:
        stdin = pipe(mark + f"/exit{end}Hi{end}".encode())
        assert run("chat", "-m", model, "--group-size", 32, stdin=stdin).exit_code == 0
        assert prompts == []

    @pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
    def test_has_a_message_a_line(self, model: str, end: str, prompts: list[str]) -> None:
        stdin = pipe(MARK + f"Grüße{end}/clear{end}Hi{end}".encode())
        run("chat", "-m", model, "--group-size", 32, "-n", 1, stdin=stdin)
        assert prompts == ["user: Grüße\nassistant: ", "user: Hi\nassistant: "]

    def test_leaves_out_a_line_that_is_no_text(self, model: str, prompts: list[str]) -> None:
        stdin = pipe(b"caf\xe9\nHi\n")
        outcome = run("chat", "-m", model, "--group-size", 32, "-n", 1, stdin=stdin)
        assert "this line is no UTF-8 text" in outcome.stderr
        assert prompts == ["user: Hi\nassistant: "]

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le"])
    def test_refuses_utf16(self, model: str, encoding: str) -> None:
        stdin = pipe("Hi there\n".encode(encoding))
        outcome = run("chat", "-m", model, "--group-size", 32, stdin=stdin)
        assert outcome.exit_code == 2
        assert outcome.stderr.splitlines()[-1].startswith("river-llm: stdin is UTF-16 text")


def run_in(encoding: str, *arguments: object, errors: str = "strict") -> tuple[bytes, str]:
    """What a command that ends well writes to a stdout and a stderr of this encoding."""
    output, told = io.BytesIO(), io.BytesIO()
    stdout = io.TextIOWrapper(output, encoding, errors)
    stderr = io.TextIOWrapper(told, encoding, "backslashreplace")
    argv = ["river-llm", *map(str, arguments)]
    with (
        mock.patch.object(sys, "argv", argv),
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
    NOTE = "river-llm: ? stands for characters that {}, the encoding of stdout, lacks"

    @pytest.fixture(scope="class")
    def speaker(self, tmp_path_factory: pytest.TempPathFactory) -> str:
        """The directory of a model whose answers are of one byte that is no character: \ufffd."""
        speaks = speaks_only(byte_model(), 3 + 0xFF)
        return str(save_folder(tmp_path_factory.mktemp("streams") / "speaker", speaks))

    @pytest.mark.parametrize("encoding", ["cp1252", "latin-1", "ascii"])
    def test_has_a_mark_for_what_the_encoding_lacks(self, speaker: str, encoding: str) -> None:
        command = ("generate", "-m", speaker, "--group-size", 32, "-n", 3, "Hi")
        output, told = run_in(encoding, *command)
        assert output == b"???\n"
        assert "\\u" not in told  # the table's bars are of ASCII there
        assert told.splitlines()[-1].startswith(self.NOTE.format(encoding))

    def test_is_whole_in_utf8(self, speaker: str) -> None:
        command = ("generate", "-m", speaker, "--group-size", 32, "-n", 3, "Hi")
        output, told = run_in("utf-8", *command)
        assert output.decode() == "\ufffd" * 3 + "\n"
        assert "stands for" not in told

    def test_has_what_the_user_chose_in_its_place(self, speaker: str) -> None:
        command = ("generate", "-m", speaker, "--group-size", 32, "-n", 1, "Hi")
        output, _ = run_in("ascii", *command, errors="xmlcharrefreplace")
        assert output == b"&#65533;\n"

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

    def test_has_the_bytes_of_file_names(self) -> None:
        output = io.BytesIO()
        stdout = io.TextIOWrapper(output, "utf-8", "strict")
        with contextlib.redirect_stdout(stdout):
            replacement = Replacement()
            print("caf\udce9, \ud83d", flush=True)
        assert output.getvalue() == b"caf\xe9, ?\n"
        assert replacement.was_needed

    @pytest.mark.parametrize("command", ["inspect", "generate"])
    def test_is_ascii_as_json(self, speaker: str, command: str) -> None:
        options = {
            "inspect": ("inspect", speaker, "--text", "Grüße"),
            "generate": ("generate", "-m", speaker, "-n", 3, "Hi"),
        }[command]
        output, told = run_in("ascii", *options, "--group-size", 32, "--json")
        found = json.loads(output.decode("ascii"))
        assert "\ufffd" in found.get("text", found.get("tokens"))
        assert told == ""


def test_json_has_null_for_numbers_that_are_none(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), 1.5], "b": {"c": (float("-inf"),)}, "d": "é\udce9"})
    assert capsys.readouterr().out == (
        '{"a": [null, 1.5], "b": {"c": [null]}, "d": "\\u00e9\\udce9"}\n'
    )

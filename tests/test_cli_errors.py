"""What the command line says when it can't answer: exit codes 1 and 2, one line each."""

from __future__ import annotations

import errno
import io
import json
import os
from pathlib import Path

import pytest
import torch
from command_line import Outcome, run, run_process, start
from transformers import AutoTokenizer

from river_llm import River, RiverLM
from river_llm.cli.loading import check_device
from river_llm.engines import CpuEngine, TorchEngine
from river_llm.store import ENVIRONMENT_VARIABLE

pytest_plugins = ["cli_models"]

PROMPT = "Name three rivers."

WRONG_USAGE = [
    ("--threshold 1.5", "in [-1, 1]"),
    ("--threshold -1.5", "in [-1, 1]"),
    ("--threshold nan", "in [-1, 1]"),
    ("--threshold 0.9 --exit-layer 2", "not both"),
    ("--policy never --threshold 0.5", "--policy similarity, not never"),
    ("--policy always --exit-layer 2", "--policy fixed, not always"),
    ("--policy similarity --exit-layer 2", "--policy fixed, not similarity"),
    ("--policy fixed", "needs --exit-layer"),
    ("--exit-layer 2 --first-layer 5", "--first-layer goes with --policy similarity, not fixed"),
    ("--policy never --first-layer 5", "--policy similarity, not never"),
    ("--policy always --first-layer 5", "--policy similarity, not always"),
    ("--exit-layer -1", "0 or more"),
    ("--first-layer 0", "layers count from 1"),
    ("--bits 7", "2, 3, 4, 5, 6, 8"),
    ("--group-size 48", "32, 64, 128"),
    ("--temperature -1", "temperature"),
    ("--temperature nan", "temperature"),
    ("--top-p 0", "top_p"),
    ("--top-k -1", "top_k"),
    ("--min-p 1.1", "min_p"),
    ("--repetition-penalty 0", "repetition_penalty"),
    ("--max-new-tokens 0", "max_new_tokens"),
    ("--prefill sequence --prompt-cache prompt", "--prompt-cache doesn't go with"),
    ("--river somewhere --bits 8", "--river brings its own"),
    ("--river somewhere --group-size 32", "--river brings its own"),
    ("--river somewhere --quantizer rtn", "--river brings its own"),
]


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wrong usage is found before any model is loaded."""

    def load(*args: object, **kwargs: object) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr(RiverLM, "from_pretrained", load)
    monkeypatch.setattr("river_llm.pretrained.load_with_river", load)
    monkeypatch.setattr("river_llm.load.model.load_backbone", load)


@pytest.mark.usefixtures("no_loading")
class TestWrongUsage:
    @pytest.mark.parametrize(("options", "part"), WRONG_USAGE)
    def test_is_refused_in_one_line(self, options: str, part: str) -> None:
        run("generate", PROMPT, *options.split()).check_fails(2, part)

    @pytest.mark.parametrize("prompt", ["", " \n\t"])
    def test_an_empty_prompt_is_refused(self, prompt: str) -> None:
        run("generate", prompt).check_fails(2, "the prompt is empty")
        run("generate", "-", stdin=prompt).check_fails(2, "the prompt is empty")

    def test_an_empty_stop_string_is_refused(self) -> None:
        run("generate", PROMPT, "--stop", "").check_fails(2, "stop", "no empty string")

    @pytest.mark.parametrize("command", [["chat"], ["inspect"], ["build", "tiny", "-o", "river"]])
    def test_is_refused_by_every_command(self, command: list[str]) -> None:
        run(*command, "--bits", 7).check_fails(2, "2, 3, 4, 5, 6, 8")

    @pytest.mark.parametrize(
        "command", [["generate", "words"], ["chat"], ["inspect"], ["build", "tiny", "-o", "river"]]
    )
    def test_more_threads_than_any_engine_takes_are_refused(self, command: list[str]) -> None:
        before = torch.get_num_threads()
        outcome = run(*command, "--threads", 99999999999)
        outcome.check_fails(1, "threads is 99999999999; it must be a whole number from 1 to 1024")
        assert torch.get_num_threads() == before

    @pytest.mark.parametrize(
        ("options", "part"),
        [
            ("--plot figure.png", "give --text"),
            ("--max-tokens 4", "no text is read; leave --max-tokens out"),
            ("--text words --plot figure.jpg", ".png, .svg, .pdf, not figure.jpg"),
            ("--text words --plot figure", "not figure"),
            ("--text words --plot no/such/figure.png", "no directory no/such"),
            ("--text words --text-file words.txt", "not both"),
            ("--text-file no-such-file.txt", "no-such-file.txt can't be read"),
            ("--text-file bytes.txt", "bytes.txt is no UTF-8 text"),
        ],
    )
    def test_of_inspect_is_refused(
        self, options: str, part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        Path("bytes.txt").write_bytes(b"caf\xe9")
        run("inspect", *options.split()).check_fails(2, part)

    @pytest.mark.parametrize("text", ["", " \n"])
    def test_an_empty_text_is_refused(self, text: str) -> None:
        run("inspect", "--text", text).check_fails(2, "the text is empty")
        run("inspect", "--text", "-", stdin=text).check_fails(2, "the text is empty")

    @pytest.mark.parametrize("command", [["generate", "-"], ["chat"], ["inspect", "--text", "-"]])
    def test_a_closed_stdin_is_told(self, command: list[str]) -> None:
        run(*command, stdin=None).check_fails(2, "standard input is closed")

    def test_a_stdin_that_cannot_be_read_is_told(self) -> None:
        with Path(os.devnull).open("w") as write_only:
            process = start("generate", "-", stdin=write_only)
            output, errors = process.communicate(timeout=60)
        outcome = Outcome(process.returncode, output.decode(), errors.decode())
        outcome.check_fails(2, "stdin can't be read: Bad file descriptor")

    def test_a_plot_without_matplotlib_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("river_llm.measure.plots.has_matplotlib", lambda: False)
        outcome = run("inspect", "--text", "words", "--plot", "figure.png")
        outcome.check_fails(2, "pip install 'river-llm[plot]'")


class TestWrongUsageOfOptions:
    CASES = (
        ("generate words --frob", "--frob"),
        ("generate", "prompt"),
        ("generate words --bits many", "--bits"),
        ("generate words --policy sometimes", "--policy"),
        ("generate words --threads 0", "--threads"),
        ("build", "model"),
        ("frobnicate", "frobnicate"),
    )

    @pytest.mark.parametrize(("arguments", "part"), CASES)
    def test_is_named(self, arguments: str, part: str) -> None:
        outcome = run_process(*arguments.split())
        assert outcome.exit_code == 2
        assert outcome.stdout == ""
        assert part in outcome.stderr
        assert "Traceback" not in outcome.stderr

    @pytest.mark.parametrize(("arguments", "part"), CASES[:1])
    def test_is_refused_in_one_line(self, arguments: str, part: str) -> None:
        run_process(*arguments.split()).check_fails(2, part)

    def test_a_prompt_that_looks_like_an_option_is_told_how_to_give(self, model: str) -> None:
        prompt = "-5 + 3 is"
        outcome = run_process("generate", prompt)
        outcome.check_fails(2, "-5", "-- goes before a prompt that begins with -")
        assert run("generate", "-m", model, "-n", 2, "--", prompt).exit_code == 0

    def test_a_seed_beyond_64_bits_is_refused(self, model: str) -> None:
        run("generate", PROMPT, "-m", model, "--seed", 2**64).check_fails(2, "seed")


class TestFailure:
    def test_no_such_model(self, tmp_path: Path) -> None:
        run("generate", PROMPT, "-m", tmp_path / "none").check_fails(1, "no file or directory")
        run("inspect", tmp_path).check_fails(1, "it has no config.json")
        run("chat", "-m", "no-such-model").check_fails(1, "there is no model no-such-model")
        outcome = run("build", "no/such", "-o", tmp_path / "river")
        outcome.check_fails(1, "there is no model no/such")
        assert list(tmp_path.iterdir()) == []

    def test_no_such_river(self, model: str, tmp_path: Path) -> None:
        outcome = run("generate", PROMPT, "-m", model, "--river", tmp_path / "none")
        outcome.check_fails(1, "holds no river.json")

    def test_more_layers_than_the_model_has(self, model: str) -> None:
        for command in (
            ["generate", PROMPT, "-m", model],
            ["chat", "-m", model],
            ["inspect", model],
        ):
            run(*command, "--exit-layer", 99).check_fails(1, "the model has 4 layers")
        outcome = run("generate", PROMPT, "-m", model, "--first-layer", 5)
        outcome.check_fails(1, "the model has 4 layers")

    def test_a_group_size_that_does_not_fit(self, model: str, tmp_path: Path) -> None:
        wanted = ("model.layers.0.self_attn.q_proj", "input width 64", "choose 32 or 64")
        outcome = run("generate", PROMPT, "-m", model, "--group-size", 128)
        outcome.check_fails(1, *wanted)
        outcome = run("build", model, "-o", tmp_path / "river", "--group-size", 128)
        outcome.check_fails(1, *wanted)
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.usefixtures("no_loading")
    def test_a_place_that_no_river_can_take_is_told_before_loading(
        self, model: str, tmp_path: Path
    ) -> None:
        notes = tmp_path / "notes.txt"
        notes.write_text("mine")
        for place, part in (
            (tmp_path, "holds other files than a river's, as notes.txt"),
            (notes, "is a file"),
            (notes / "river", "is a file"),
        ):
            run("build", model, "-o", place).check_fails(1, part)
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
        assert notes.read_text() == "mine"

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device cuda here")
    def test_no_cuda(self, model: str, tmp_path: Path) -> None:
        for command in (
            ["generate", PROMPT, "-m", model],
            ["chat", "-m", model],
            ["inspect", model],
            ["build", model, "-o", tmp_path / "river"],
        ):
            run(*command, "--device", "cuda").check_fails(1, "no device 'cuda'", "--device cpu")

    def test_no_such_device(self, model: str) -> None:
        run("inspect", model, "--device", "abacus").check_fails(1, "no device 'abacus'")
        assert check_device("cpu") == torch.device("cpu")

    def test_a_prompt_beyond_the_context(self, other_model: str) -> None:
        outcome = run("generate", "river " * 200, "-m", other_model, "--raw")
        tokens = len(AutoTokenizer.from_pretrained(other_model)("river " * 200).input_ids)
        outcome.check_fails(1, f"{tokens} tokens", "holds 96", "shorten the prompt")

    def test_a_chat_whose_stdin_cannot_be_read(self, model: str) -> None:
        with Path(os.devnull).open("w") as write_only:
            process = start("chat", "-m", model, stdin=write_only)
            output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (2, b"")
        told = errors.decode().splitlines()
        assert told[-1] == "river-llm: stdin can't be read: Bad file descriptor"
        assert len(told) == 2  # below the help

    def test_a_text_of_one_token(self, model: str) -> None:
        run("inspect", model, "--text", "a").check_fails(1, "fewer than two tokens")

    @pytest.mark.parametrize(
        "error",
        [
            MemoryError(),
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\nyou tried"),
        ],
    )
    @pytest.mark.parametrize(
        "where", [(River, "build"), (CpuEngine, "prefill"), (TorchEngine, "prefill")]
    )
    def test_out_of_memory(
        self,
        model: str,
        where: tuple[type, str],
        error: Exception,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        def fail(*args: object) -> None:
            raise error

        monkeypatch.setenv(ENVIRONMENT_VARIABLE, "off")  # or the river may be there already
        monkeypatch.setattr(*where, fail)
        engine = getattr(where[0], "name", "auto")
        outcome = run("generate", PROMPT, "-m", model, "--engine", engine)
        outcome.check_fails(1, "not enough memory", "smaller model")

    def test_an_internal_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object, **kwargs: object) -> None:
            raise LookupError("no\nsuch   key")

        monkeypatch.setattr(RiverLM, "from_pretrained", fail)
        monkeypatch.delenv("RIVER_LLM_DEBUG", raising=False)
        outcome = run("generate", PROMPT)
        outcome.check_fails(1, "internal error: LookupError: no such key", "RIVER_LLM_DEBUG=1")
        monkeypatch.setenv("RIVER_LLM_DEBUG", "1")
        with pytest.raises(LookupError):
            run("generate", PROMPT)

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk here")
    @pytest.mark.parametrize("unbuffered", ["", "1"])
    @pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
    def test_an_answer_that_cannot_be_written(
        self, model: str, options: list[str], unbuffered: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYTHONUNBUFFERED", unbuffered)
        command = ("generate", PROMPT, "-m", model, "-n", 2, *options)
        with Path("/dev/full").open("w") as full:
            process = start(*command, stdout=full)
            _, errors = process.communicate(timeout=60)
        told = errors.decode().splitlines()[-1]
        assert told == "river-llm: can't write the answer: No space left on device"
        assert process.returncode == 1
        assert b"Exception" not in errors
        assert b"internal error" not in errors

    def test_another_error_of_the_system_is_an_internal_one(
        self, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: object) -> None:
            raise OSError(errno.EIO, "Input/output error")

        monkeypatch.setattr(CpuEngine, "decode", fail)
        monkeypatch.delenv("RIVER_LLM_DEBUG", raising=False)
        run("generate", PROMPT, "-m", model, "--json").check_fails(1, "internal error: OSError")

    def test_an_answer_that_breaks_off(self, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
        def fail(*args: object) -> None:
            raise LookupError("gone")

        monkeypatch.setattr(CpuEngine, "decode", fail)
        run("generate", PROMPT, "-m", model, "--json").check_fails(1, "internal error", "gone")

    @pytest.mark.parametrize("cut", [0, 200])
    def test_damaged_weights(self, model: str, tmp_path: Path, cut: int) -> None:
        for path in Path(model).iterdir():
            content = path.read_bytes()
            is_weights = path.name == "model.safetensors"
            (tmp_path / path.name).write_bytes(content[:cut] if is_weights else content)
        run("inspect", tmp_path).check_fails(1, str(tmp_path))

    @pytest.mark.parametrize("errors", ["strict", "surrogateescape"])  # by Python's locale
    @pytest.mark.parametrize("options", [[], ["--raw"]])
    def test_stdin_that_is_no_text(self, model: str, errors: str, options: list[str]) -> None:
        stdin = io.TextIOWrapper(io.BytesIO(b"caf\xe9"), "utf-8", errors)
        outcome = run("generate", "-", "-m", model, *options, stdin=stdin)
        outcome.check_fails(outcome.exit_code, "UTF-8")
        assert outcome.exit_code in (1, 2)

    def test_a_config_that_is_no_json(self, model: str, tmp_path: Path) -> None:
        for path in Path(model).iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        fields = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(fields)[:-10])
        run("inspect", tmp_path).check_fails(1, str(tmp_path))

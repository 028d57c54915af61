"""The command line on a tiny model: output, exit codes, one clear line for every failure."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from river_llm import River, RiverLM
from river_llm.cli import main

FIELDS = {
    "text",
    "tokens",
    "exit_layers",
    "mean_exit_layer",
    "num_layers",
    "prompt_tokens",
    "prompt_tokens_per_second",
    "decode_tokens_per_second",
    "time_to_first_token",
    "engine",
    "policy",
    "finish_reason",
    "peak_memory_bytes",
}


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> str:
    """A directory with a tiny random Llama and SmolLM2's tokeniser."""
    directory = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        initializer_range=0.1,
        eos_token_id=None,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return str(directory)


class Run:
    """The command line in this process."""

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str
    ) -> None:
        self.monkeypatch, self.capsys, self.model = monkeypatch, capsys, model

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """(exit code, stdout, stderr)"""
        self.monkeypatch.setattr(sys, "argv", ["river-llm", *arguments])
        self.capsys.readouterr()
        with pytest.raises(SystemExit) as exit_info:
            main()
        output, errors = self.capsys.readouterr()
        return int(exit_info.value.code or 0), output, errors

    def json(self, *arguments: str) -> dict[str, Any]:
        """The one JSON object on stdout of a `generate`."""
        code, output, _ = self("generate", "--model", self.model, "--json", *arguments)
        assert code == 0
        parsed: dict[str, Any] = json.loads(output)
        return parsed


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], model: str) -> Run:
    return Run(monkeypatch, capsys, model)


class TestGenerate:
    def test_json_has_the_documented_fields(self, run: Run) -> None:
        output = run.json("--exit-layer", "2", "-n", "6", "Hi")
        assert set(output) == FIELDS
        assert output["exit_layers"] == [4, 2, 2, 2, 2, 2]
        assert output["mean_exit_layer"] == pytest.approx(14 / 6)
        assert len(output["tokens"]) == 6
        assert output["finish_reason"] == "length"
        assert output["engine"] == "torch"
        assert output["policy"]["exit_layer"] == 2

    @pytest.mark.parametrize(
        ("options", "exit_layers"),
        [
            (["--policy", "never"], [4, 4, 4]),
            (["--policy", "always"], [0, 0, 0]),
            (["--policy", "always", "--prefill", "backbone"], [4, 0, 0]),
            (["--policy", "fixed", "--exit-layer", "3"], [4, 3, 3]),
            (["--threshold", "-1"], [4, 1, 1]),
            (["--threshold", "-1", "--first-layer", "2"], [4, 2, 2]),
            (["--threshold", "1"], [4, 4, 4]),
            (["--exit-layer", "1", "--prefill", "sequence"], [1, 1, 1]),
        ],
    )
    def test_leaves_where_the_options_say(
        self, run: Run, options: list[str], exit_layers: list[int]
    ) -> None:
        assert run.json(*options, "-n", "3", "Hi")["exit_layers"] == exit_layers

    def test_reads_stdin(self, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        (tmp_path / "prompt").write_text("Hi")
        with (tmp_path / "prompt").open() as file:
            monkeypatch.setattr(sys, "stdin", file)
            assert run.json("-n", "3", "-")["tokens"] == run.json("-n", "3", "Hi")["tokens"]

    def test_raw_leaves_the_chat_template_out(self, run: Run) -> None:
        plain, raw = run.json("-n", "2", "Hi"), run.json("-n", "2", "--raw", "Hi")
        assert raw["prompt_tokens"] == 1 < plain["prompt_tokens"]

    def test_the_seed_decides_what_is_sampled(self, run: Run) -> None:
        options = ["--temperature", "2", "-n", "12", "Hi"]
        first, second, other = (run.json("--seed", s, *options) for s in ("1", "1", "2"))
        assert first["tokens"] == second["tokens"] != other["tokens"]

    def test_stops_at_a_string(self, run: Run) -> None:
        text = run.json("-n", "12", "Hi")["text"]
        stopped = run.json("-n", "12", "--stop", text[5:9], "Hi")
        assert stopped["text"] == text.split(text[5:9])[0]
        assert stopped["finish_reason"] == "stop"

    def test_compares_the_arms(self, run: Run) -> None:
        arms = run.json("--compare", "-n", "5", "Hi")["comparison"]
        assert [arm["name"] for arm in arms] == [
            "backbone",
            "full 4-bit",
            "River, similarity > 0.9",
        ]
        assert arms[0]["agreement"] == 1
        assert [arm["mean_exit_layer"] for arm in arms[:2]] == [4, 0]
        code, output, _ = run("generate", "-m", run.model, "--compare", "-n", "5", "Hi")
        assert code == 0
        assert "speed-up" in output
        assert "4.0 of 4" in output

    def test_shows_the_answer_on_stdout_and_the_rest_on_stderr(self, run: Run) -> None:
        code, output, errors = run("generate", "-m", run.model, "-n", "6", "Hi")
        assert code == 0
        assert output == run.json("-n", "6", "Hi")["text"] + "\n"
        assert "mean exit depth" in errors

    def test_a_saved_river_gives_what_a_new_one_gives(self, run: Run, tmp_path: Path) -> None:
        river = str(tmp_path / "river")
        code, output, errors = run("build", run.model, "-o", river, "--group-size", "32")
        assert (code, output) == (0, "")
        assert "4 exit layers" in errors
        saved = run.json("--river", river, "--policy", "always", "-n", "8", "Hi")
        new = run.json("--group-size", "32", "--policy", "always", "-n", "8", "Hi")
        assert saved["tokens"] == new["tokens"]
        code, _, errors = run("generate", "--river", river, "Hi")
        assert code == 1
        assert "this river was built for another model" in errors

    def test_ctrl_c_gives_what_there_is(self, model: str) -> None:
        command = [sys.executable, "-c", "from river_llm.cli import main; main()", "generate"]
        process = subprocess.Popen(
            [*command, "-m", model, "-n", "4000", "--threads", "1", "Hi"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert process.stdout is not None
        process.stdout.read(20)
        time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0, errors
        assert b"(interrupted)" in errors
        assert b"Traceback" not in errors


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--threshold", "1.5", "Hi"],
        ["generate", "--threshold", "nan", "Hi"],
        ["generate", "--threshold", "0.5", "--exit-layer", "3", "Hi"],
        ["generate", "--policy", "never", "--threshold", "0.5", "Hi"],
        ["generate", "--policy", "always", "--exit-layer", "1", "Hi"],
        ["generate", "--policy", "fixed", "Hi"],
        ["generate", "--exit-layer", "-1", "Hi"],
        ["generate", "--bits", "7", "Hi"],
        ["generate", "--group-size", "48", "Hi"],
        ["generate", "--river", "x", "--bits", "8", "Hi"],
        ["generate", "--temperature", "-1", "Hi"],
        ["generate", "--top-p", "0", "Hi"],
        ["generate", "-n", "0", "Hi"],
        ["generate", " "],
        ["chat", "--top-k", "-1"],
        ["build", "smollm2", "-o", "x", "--bits", "9"],
        ["inspect", "--text", " "],
        ["inspect", "--plot", "x.png"],
        ["inspect", "--text", "a b", "--plot", "x.txt"],
        ["inspect", "--text", "a b", "--plot", "absent/x.png"],
        ["inspect", "--text", "a", "--text-file", "b"],
        ["inspect", "--text-file", "absent"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_one_line_and_exit_code_2(run: Run, arguments: list[str]) -> None:
    code, output, errors = run(*arguments)
    assert (code, output) == (2, "")
    assert errors.startswith("river-llm: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "-m", "/absent", "Hi"], "there is no file or directory /absent"),
        (["generate", "--exit-layer", "99", "Hi"], "the model has 4 layers"),
        (["generate", "--group-size", "128", "Hi"], "layers.0.self_attn.q_proj: group size 128"),
        (["generate", "--device", "cuda:7", "Hi"], "no device 'cuda:7'"),
        (["generate", "--device", "abacus", "Hi"], "no device 'abacus'"),
        (["generate", "--river", "/absent", "Hi"], "holds no river.json"),
        (["generate", "many " * 5000], "the model's context holds 4096"),
        (["build", "MODEL", "-o", "/proc/river"], "can't write the river"),
        (["inspect", "MODEL", "--text", "a"], "fewer than two tokens"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_a_failure_is_one_line_and_exit_code_1(
    run: Run, arguments: list[str], message: str
) -> None:
    arguments = [run.model if argument == "MODEL" else argument for argument in arguments]
    if arguments[0] == "generate" and "-m" not in arguments:
        arguments[1:1] = ["-m", run.model]
    code, _, errors = run(*arguments)
    assert code == 1
    assert message in errors
    assert errors.startswith("river-llm: ")
    assert errors.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "not enough memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "not enough memory"),
        (ZeroDivisionError("two\nlines"), "internal error: ZeroDivisionError: two lines"),
    ],
    ids=["memory", "allocator", "bug"],
)
def test_any_other_error_is_one_line_too(
    run: Run, monkeypatch: pytest.MonkeyPatch, error: Exception, message: str
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(River, "build", fail)
    monkeypatch.setattr(RiverLM, "from_pretrained", fail)
    for command in (["generate", "-m", run.model, "Hi"], ["build", run.model, "-o", "x"]):
        code, _, errors = run(*command)
        assert code == 1
        assert errors.startswith(f"river-llm: {message}")
        assert errors.count("\n") == 1
    monkeypatch.setenv("RIVER_LLM_DEBUG", "1")
    monkeypatch.setattr(sys, "argv", ["river-llm", "generate", "-m", run.model, "Hi"])
    with pytest.raises(type(error)):
        main()


def test_help_and_version_need_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['river-llm', sys.argv[1]]\n"
        "from river_llm.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    for option, text in (("--help", "inspect"), ("--version", "river-llm 0.")):
        done = subprocess.run([sys.executable, "-c", code, option], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert text in done.stdout

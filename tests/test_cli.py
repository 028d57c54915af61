"""`river-llm generate` and `build`: what is answered, what is printed, what is refused."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import SCRIPT, Outcome, run, run_process, start
from transformers import PreTrainedTokenizerBase

from river_llm import ExitPolicy, River, RiverConfig, RiverLM
from river_llm import __version__ as version
from river_llm.config import (
    DraftConfig,
    EngineConfig,
    PolicyConfig,
    PromptConfig,
    SamplingConfig,
)
from river_llm.config import (
    RiverConfig as _River,
)
from river_llm.engines import CpuEngine
from river_llm.generate import GenerationResult
from river_llm.measure.comparison import Compared

pytest_plugins = ["cli_models"]

PROMPT = "Name three rivers."
FIELDS = {
    field.name
    for kind in (GenerationResult, EngineConfig, PromptConfig)
    for field in dataclasses.fields(kind)
} | {"version", "model", "river", "river_directory", "sampling", "drafts"}


def answer(model: str, *options: object, prompt: str = PROMPT, length: int = 8) -> dict[str, Any]:
    """The JSON of `river-llm generate`."""
    return run("generate", prompt, "-m", model, "-n", length, "--json", *options).json


class TestAsAProcess:
    def test_help_and_version_need_no_torch(self) -> None:
        heavy = {"torch", "transformers", "numpy", "safetensors", "matplotlib"}
        commands = ["generate", "chat", "build", "inspect", "bench", "check-exact"]
        for command in ([], *([name] for name in commands)):
            outcome = run_process(*command, "--help", python=("-X", "importtime", SCRIPT))
            assert outcome.exit_code == 0
            assert "Usage: " in outcome.stdout
            lines = outcome.stderr.splitlines()
            imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in lines}
            assert "typer" in imported
            assert not heavy & imported
        assert run_process("--version").stdout == f"river-llm {version}\n"

    def test_generate_shows_few_settings_before_the_advanced_ones(self) -> None:
        shown = run_process("generate", "--help").stdout
        daily = shown.partition("Advanced")[0]
        assert 10 <= sum(line.startswith("│ --") for line in daily.splitlines()) <= 15

    def test_an_answer_is_all_that_is_on_stdout(self, model: str) -> None:
        outcome = run_process("generate", PROMPT, "-m", model, "-n", 8)
        assert outcome.exit_code == 0
        assert outcome.stdout == answer(model)["text"] + "\n"
        assert "\x1b" not in outcome.stderr
        assert "8 tokens (length)" in outcome.stderr.splitlines()[-1]

    def test_json_is_all_that_is_printed(self, model: str) -> None:
        stdin = "Où est la rivière ?\n"
        command = ("generate", "-", "-m", model, "-n", 6, "--json")
        outcome = run_process(*command, stdin=stdin.encode())
        assert outcome.stderr == ""
        assert outcome.json["tokens"] == answer(model, prompt=stdin)["tokens"][:6]

    def test_a_reader_that_goes_away_ends_it_quietly(self, model: str) -> None:
        process = start("generate", PROMPT, "-m", model, "-n", 50_000)
        assert process.stdin
        assert process.stdout
        assert process.stderr
        process.stdin.close()
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no full disk here")
    @pytest.mark.parametrize("options", [[], ["--json"]], ids=["text", "json"])
    def test_an_answer_that_cannot_be_written(self, model: str, options: list[str]) -> None:
        with Path("/dev/full").open("w") as full:
            process = start("generate", PROMPT, "-m", model, "-n", 2, *options, stdout=full)
            _, errors = process.communicate(timeout=60)
        told = errors.decode().splitlines()[-1]
        assert told == "river-llm: can't write the answer: No space left on device"
        assert process.returncode == 1


class TestAnswer:
    def test_without_a_policy_is_the_backbones(self, model: str) -> None:
        """Lossless mode is the default."""
        for options in ((), ("--temperature", 1, "--top-p", 0.9, "--seed", 4)):
            expected = answer(model, "--policy", "never", *options, length=30)
            output = answer(model, *options, length=30)
            assert output["tokens"] == expected["tokens"]
            assert (output["mode"], expected["mode"]) == ("lossless", "river")
            assert output["lossless"]["verifications"] <= 29
            assert expected["lossless"] is expected["drafts"] is None

    def test_json_has_all_that_makes_the_answer_again(self, model: str) -> None:
        options = ("--raw", "--bits", 3, "--temperature", 1, "--top-k", 50, "--exit-layer", 2)
        first = answer(model, *options)
        assert set(first) == FIELDS
        engine = {field.name: first[field.name] for field in dataclasses.fields(EngineConfig)}
        lm = RiverLM.from_pretrained(
            first["model"], RiverConfig(**first["river"]), ExitPolicy(**first["policy"]), **engine
        )
        again = lm.generate(PROMPT, raw=first["raw"], **first["sampling"])
        assert again.tokens == first["tokens"]
        assert again.exit_layers == first["exit_layers"] == [4] + 7 * [2]
        assert first["mean_exit_layer"] == sum(first["exit_layers"]) / 8
        assert first["version"] == version
        assert answer(model, *options)["sampling"]["seed"] != first["sampling"]["seed"]

    def test_tells_how_often_it_looked_twice(self, model: str) -> None:
        options = ("-m", model, "-n", 4, "--exit-layer", 1, "--second-look", 1)
        outcome = run("generate", PROMPT, *options)
        assert "mean exit depth 4.0 of 4, second look at 75%, peak" in outcome.stderr

    def test_has_letters_in_ascii_escapes(
        self, model: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        letter = next(t for t in range(49152) if tokenizer.decode([t]) == "é")
        monkeypatch.setattr("river_llm.generate.sampler.Sampler.choose", lambda *_: letter)
        command = ("generate", PROMPT, "-m", model, "-n", 3, "--json", "--policy", "never")
        outcome = run(*command, "--temperature", 1)
        assert outcome.json["text"] == "ééé"
        assert outcome.stdout.isascii()

    def test_goes_through_the_chat_template_unless_raw(
        self, model: str, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        messages = [{"role": "user", "content": PROMPT}]
        template = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True
        )
        assert answer(model)["prompt_tokens"] == len(template["input_ids"])
        assert answer(model, "--raw")["prompt_tokens"] == len(tokenizer(PROMPT).input_ids)

    def test_ends_before_a_stop_string(self, model: str) -> None:
        whole = answer(model)["text"]
        output = answer(model, "--stop", "nowhere in it", "--stop", whole[6:10])
        assert output["text"] == whole[: whole.index(whole[6:10])]
        assert output["finish_reason"] == "stop"

    @pytest.mark.parametrize(
        ("options", "exit_layers"),
        [
            ("--policy never", [4, 4, 4, 4]),
            ("--policy always", [0, 0, 0, 0]),
            ("--exit-layer 2", [4, 2, 2, 2]),
            ("--exit-layer 0", [4, 0, 0, 0]),
            ("--exit-layer 4", [4, 4, 4, 4]),
            ("--threshold -1", [4, 1, 1, 1]),
            ("--threshold -1 --first-layer 3", [4, 3, 3, 3]),
            ("--threshold 1", [4, 4, 4, 4]),
            ("--exit-layer 2 --prefill river", [0, 2, 2, 2]),
            ("--policy always --prefill backbone", [4, 0, 0, 0]),
            ("--threshold -1 --prefill sequence", [1, 1, 1, 1]),
            ("--exit-layer 4 --offload 2 --no-miss", [2, 2, 2, 2]),
            ("--exit-layer 2 --prefill river --second-look 1", [4, 4, 4, 4]),
        ],
    )
    def test_leaves_where_the_options_say(
        self, model: str, options: str, exit_layers: list[int]
    ) -> None:
        output = answer(model, *options.split(), length=4)
        assert output["exit_layers"] == exit_layers

    def test_settings_reach_the_loader_and_the_sampler(
        self, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen: list[Any] = []
        of_loader = RiverLM.from_pretrained

        def load(*given: Any, progress: object, **settings: Any) -> RiverLM:
            seen.append((given, settings))
            return of_loader(*given, **settings)

        def stream(lm: RiverLM, tokens: object, sampling: object, *_: object, **more: Any) -> Any:
            seen.append((sampling, more["drafts"]))
            return iter(())

        monkeypatch.setattr(RiverLM, "from_pretrained", load)
        monkeypatch.setattr(RiverLM, "stream_tokens", stream)
        options = (
            "-n 3 --temperature 0.7 --seed 9 --stop one --bits 3 --threads 1 --kv-bits 8 "
            "--lm-head-bits 8 --backbone-bits 8 --draft-tokens 2"
        )
        outcome = run("generate", PROMPT, "-m", model, *options.split())
        engine = EngineConfig(threads=1, kv_bits=8, lm_head_bits=8, backbone_bits=8)
        assert seen == [
            ((model, _River(bits=3), None), engine.to_dict()),
            (SamplingConfig(3, 0.7, seed=9, stop=("one",)), DraftConfig(tokens=2)),
        ]
        for name in ("backbone", "LM head", "KV cache"):
            assert f"the {name} is in 8 bits" in outcome.stderr


class TestCompare:
    def test_has_four_variants_after_the_answer(self, model: str) -> None:
        options = ("--exit-layer", 2, "--bits", 3)
        output = answer(model, "--compare", *options)
        assert set(output) == {*FIELDS, "comparison"}
        assert output["tokens"] == answer(model, *options)["tokens"]
        variants = output["comparison"]
        assert all(set(v) == {f.name for f in dataclasses.fields(Compared)} for v in variants)
        names = ["backbone", "lossless", "River, exit after 2", "full 3-bit"]
        assert [variant["variant"] for variant in variants] == names
        assert [variant["mean_exit_layer"] for variant in variants] == [4, 4, 2, 0]
        assert variants[0]["agreement"] == variants[1]["agreement"] == 1
        outcome = run("generate", PROMPT, "-m", model, "-n", 8, *options, "--compare")
        assert outcome.stdout.startswith(output["text"] + "\n")
        table = outcome.stdout.removeprefix(output["text"])
        assert [table.index(part) for part in ("backbone", "lossless", "River,", "full 3-bit")]

    def test_needs_two_tokens(self, model: str) -> None:
        outcome = run("generate", PROMPT, "-m", model, "-n", 1, "--compare")
        assert outcome.exit_code == 0
        assert "too short to compare" in outcome.stderr


class TestBuild:
    def test_a_saved_river_gives_the_same_tokens(self, model: str, tmp_path: Path) -> None:
        settings = ["--bits", "2", "--group-size", "32", "--quantizer", "rtn"]
        outcome = run("build", model, "-o", tmp_path / "river", *settings)
        assert (outcome.exit_code, outcome.stdout) == (0, "")
        assert "2 bits in groups of 32 (rtn)" in outcome.stderr
        saved = answer(model, "--river", tmp_path / "river", "--policy", "always")
        assert saved["tokens"] == answer(model, *settings, "--policy", "always")["tokens"]
        assert saved["river"] == River.load(tmp_path / "river").config.to_dict()
        assert saved["river_directory"] == str(tmp_path / "river")

    def test_a_place_that_no_river_can_take_is_told_before_loading(self, tmp_path: Path) -> None:
        notes = tmp_path / "notes.txt"
        notes.write_text("mine")
        for place in (tmp_path, notes, notes / "river"):
            run("build", "no-model", "-o", place).check_fails(1)
        assert notes.read_text() == "mine"


REFUSED = [  # (arguments, exit code, part of the line); M is a model, A another one, T a folder
    ("generate", 2, "Missing argument"),
    ("generate Hi --no-such-option", 2, "--help shows what there is"),
    ("generate Hi --top-k -1", 2, "--top-k is -1"),
    ("generate Hi --threshold nan", 2, "--threshold is nan; it must be a cosine"),
    ("generate Hi --threshold 0.9 --exit-layer 2", 2, "exclude each other"),
    ("generate Hi --policy always --exit-layer 2", 2, "exclude each other"),
    ("generate Hi --engine cpu --dtype float32", 2, "computes in bfloat16, not in float32"),
    ("generate Hi --engine torch --lm-head-bits 8", 2, "take --engine cpu"),
    ("generate Hi --offload 2.5", 2, "--offload is '2.5'; give off, auto, a number of layers"),
    ("generate Hi --second-look 0.1", 2, "--second-look goes with a policy by which tokens leave"),
    ("generate Hi --exit-layer 1 --second-look 0", 2, "--second-look is 0.0; it must be above 0"),
    ("generate Hi --offload 1 --no-miss --exit-layer 1 --second-look 1", 2, "leave out --no-miss"),
    ("inspect --exit-layer 1 --second-look 1", 2, "No such option: --second-look"),
    ("generate Hi --no-miss --threshold 0.9", 2, "--no-miss goes with"),
    ("inspect --offload 1", 2, "No such option: --offload"),
    ("generate Hi --no-miss --offload 1", 2, "lossless mode verifies with the whole backbone"),
    ("generate Hi --offload 1 --no-miss --exit-layer 1 --compare", 2, "leave out --no-miss"),
    ("generate Hi --prompt-cache f --threshold 0.9 --prefill sequence", 2, "doesn't go with"),
    ("generate Hi --river T --bits 8", 2, "--river brings its own"),
    ("generate Hi --raw --allow-control-tokens", 2, "a raw prompt goes through no chat template"),
    ("generate Hi --stop=", 2, "no empty string"),
    ("generate -", 2, "the prompt is empty"),
    ("chat --draft-tokens 0", 2, "--draft-tokens is 0"),
    ("inspect --plot a.png", 2, "give --text"),
    ("inspect --text Hi --plot a.txt", 2, "--plot writes"),
    ("check-exact --prompts T/none", 2, "none"),
    ("bench --rounds 0", 2, "rounds"),
    ("generate Hi -m T/none", 1, "no file or directory"),
    ("generate Hi -m no-such-model", 1, "there is no model no-such-model"),
    ("inspect T", 1, "it has no config.json"),
    ("build no/such -o T/river", 1, "there is no model no/such"),
    ("generate Hi -m M --river T/none", 1, "holds no river.json"),
    ("generate Hi -m M --exit-layer 99", 1, "the model has 4 layers"),
    ("generate Hi -m M --threshold 0.9 --first-layer 5", 1, "the model has 4 layers"),
    ("generate Hi -m M --draft-exit-layer 9", 1, "but the model has 4 layers"),
    ("generate Hi -m M --engine torch --draft-lm-head-bits 8", 1, "no LM head of 8 bits"),
    ("generate Hi -m M --group-size 128", 1, "choose 32 or 64"),
    ("generate Hi -m M --offload 9", 1, "the model has 4"),
    ("inspect M --device abacus", 1, "no device 'abacus'"),
    ("inspect M --text a", 1, "fewer than two tokens"),
    (f"generate {'river' * 99} -m A --raw", 1, "holds 96; shorten the prompt"),
]


@pytest.mark.parametrize(("arguments", "exit_code", "part"), REFUSED)
def test_what_is_wrong_is_one_line(
    arguments: str, exit_code: int, part: str, model: str, other_model: str, tmp_path: Path
) -> None:
    places = {"M": model, "A": other_model, "T": str(tmp_path)}
    words = [
        places.get(word, word.replace("T/", f"{tmp_path}/") if word[:2] == "T/" else word)
        for word in arguments.split()
    ]
    run(*words).check_fails(exit_code, part)
    assert list(tmp_path.iterdir()) == []


class TestFailure:
    @pytest.mark.parametrize(
        "error",
        [
            MemoryError(),
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory:\nyou tried"),
        ],
    )
    def test_out_of_memory(
        self, model: str, error: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: object) -> None:
            raise error

        monkeypatch.setattr(CpuEngine, "forward", fail)
        outcome = run("generate", PROMPT, "-m", model, "--policy", "never")
        outcome.check_fails(1, "not enough memory", "smaller model")

    @pytest.mark.parametrize("error", [LookupError("no\nsuch   key"), OSError(5, "I/O error")])
    def test_an_internal_error(
        self, model: str, error: Exception, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*args: object) -> None:
            raise error

        monkeypatch.setattr(CpuEngine, "forward", fail)
        monkeypatch.delenv("RIVER_LLM_DEBUG", raising=False)
        outcome = run("generate", PROMPT, "-m", model, "--json")
        outcome.check_fails(1, f"internal error: {type(error).__name__}", "RIVER_LLM_DEBUG=1")
        monkeypatch.setenv("RIVER_LLM_DEBUG", "1")
        with pytest.raises(type(error)):
            run("generate", PROMPT, "-m", model, "--json")

    def test_stdin_that_is_closed(self, model: str) -> None:
        run("generate", "-", "-m", model, stdin=None).check_fails(2, "standard input is closed")

    def test_a_chat_whose_stdin_cannot_be_read(self, model: str) -> None:
        with Path(os.devnull).open("w") as write_only:
            process = start("chat", "-m", model, stdin=write_only)
            output, errors = process.communicate(timeout=60)
        assert (process.returncode, output) == (2, b"")
        told = errors.decode().splitlines()
        assert told[-1] == "river-llm: stdin can't be read: Bad file descriptor"


@pytest.mark.parametrize(
    ("options", "is_told"),
    [("--dtype bfloat16", True), ("--dtype float32", False), ("--policy never", False)],
)
def test_lossless_mode_on_pytorch_says_where_it_rounds(
    model: str, options: str, is_told: bool
) -> None:
    outcome: Outcome = run(
        "generate", PROMPT, "-m", model, "-n", 2, "--engine", "torch", *options.split()
    )
    assert ("rounds a pass over several tokens" in outcome.stderr) == is_told


def test_every_class_of_settings_has_its_options() -> None:
    shown = run_process("generate", "--help").stdout
    for kind in (RiverConfig, EngineConfig, PolicyConfig, SamplingConfig, PromptConfig):
        for field in dataclasses.fields(kind):
            if field.metadata["option"] != ("",):
                assert "--" + field.name.replace("_", "-")[:12] in shown

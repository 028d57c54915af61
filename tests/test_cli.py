"""`river-llm generate` and `build`: what the answers are."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import SCRIPT, run, run_process, start
from transformers import PreTrainedTokenizerBase

from river_llm import ExitPolicy, River, RiverConfig, RiverError, RiverLM, SamplingConfig
from river_llm import __version__ as version
<<<<<<< HEAD
from river_llm.measure.comparison import ArmResult
=======
>>>>>>> main
from river_llm.load.model import load_backbone
from river_llm.measure.comparison import Compared
from river_llm.residency import OffloadConfig

pytest_plugins = ["cli_models"]

PROMPT = "Name three rivers."
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
    "mode",
    "lossless",
    "offload",
    "cached_prompt_tokens",
    "version",
    "model",
    "device",
    "dtype",
    "backbone_bits",
    "lm_head_bits",
    "kv_bits",
    "river",
    "river_directory",
    "drafts",
    "no_miss",
    "raw",
    "chat_template_kwargs",
    "allow_control_tokens",
    "sampling",
}


def answer(model: str, *options: object, prompt: str = PROMPT, length: int = 8) -> dict[str, Any]:
    """The JSON of `river-llm generate`."""
    return run("generate", prompt, "-m", model, "-n", length, "--json", *options).json


class TestAsAProcess:
    def test_help_needs_no_torch(self) -> None:
        heavy = {"torch", "transformers", "numpy", "safetensors", "matplotlib"}
        for command in ([], ["build"], ["generate"], ["chat"], ["inspect"]):
            outcome = run_process(*command, "--help", python=("-X", "importtime", SCRIPT))
            assert outcome.exit_code == 0
            assert "Usage: " in outcome.stdout
            imported = {
                line.rpartition("|")[2].strip().partition(".")[0]
                for line in outcome.stderr.splitlines()
            }
            assert "typer" in imported
            assert not heavy & imported

    def test_version(self) -> None:
        outcome = run_process("--version", python=("-X", "importtime", SCRIPT))
        assert (outcome.exit_code, outcome.stdout) == (0, f"river-llm {version}\n")
        assert " torch\n" not in outcome.stderr
        assert run_process("--version").stdout == outcome.stdout

    def test_json_is_all_that_is_printed(self, model: str) -> None:
        outcome = run_process(
            "generate", "-", "-m", model, "-n", 6, "--json", stdin="Où est la rivière ?\n".encode()
        )
        assert outcome.stderr == ""
        assert outcome.json["tokens"] == answer(model, prompt="Où est la rivière ?\n")["tokens"][:6]

    def test_an_answer_is_all_that_is_on_stdout(self, model: str) -> None:
        outcome = run_process("generate", PROMPT, "-m", model, "-n", 8)
        assert outcome.exit_code == 0
        assert outcome.stdout == answer(model)["text"] + "\n"
        assert "\x1b" not in outcome.stderr
        assert "8 tokens (length)" in outcome.stderr.splitlines()[-1]

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


class TestJson:
    def test_has_the_documented_fields(self, model: str) -> None:
        output = answer(model)
        assert set(output) == FIELDS
        assert len(output["tokens"]) == len(output["exit_layers"]) == 8
        assert output["mean_exit_layer"] == sum(output["exit_layers"]) / 8
        assert output["num_layers"] == 4
        assert output["engine"] == "cpu"
        assert answer(model, "--engine", "torch")["engine"] == "torch"
        assert output["finish_reason"] == "length"
        assert output["policy"] == ExitPolicy.similarity(0.9).to_dict()
        for speed in ("prompt_tokens_per_second", "decode_tokens_per_second"):
            assert output[speed] > 0
        assert output["time_to_first_token"] > 0
        assert output["peak_memory_bytes"] > 2**20

    def test_has_all_that_makes_the_answer_again(self, model: str) -> None:
        options = ("--raw", "--bits", 3, "--temperature", 1, "--top-k", 50, "--exit-layer", 2)
        first = answer(model, *options)
        again = RiverLM.from_pretrained(
            first["model"],
            RiverConfig.of(first["river"]),
            ExitPolicy.fixed(2),
            getattr(torch, first["dtype"]),
            device=first["device"],
            engine=first["engine"],
            backbone_bits=first["backbone_bits"],
            lm_head_bits=first["lm_head_bits"],
            kv_bits=first["kv_bits"],
        ).generate(PROMPT, raw=first["raw"], mode=first["mode"], **first["sampling"])
        assert again.policy == first["policy"]
        assert again.tokens == first["tokens"]
        assert first["version"] == version
        assert answer(model, *options)["sampling"]["seed"] != first["sampling"]["seed"]

    def test_tells_two_rivers_of_one_configuration_apart(self, model: str, tmp_path: Path) -> None:
        for name in ("one", "two"):
            assert run("build", model, "-o", tmp_path / name).exit_code == 0
        outputs = [answer(model, "--river", tmp_path / name) for name in ("one", "two")]
        assert outputs[0]["river"] == outputs[1]["river"]
        for output, name in zip(outputs, ("one", "two"), strict=True):
            assert output["river_directory"] == str(tmp_path / name)
        assert answer(model)["river_directory"] is None

    def test_is_what_the_library_answers(self, model: str) -> None:
        expected = RiverLM.from_pretrained(model, device="cpu").generate(PROMPT, max_new_tokens=8)
        output = answer(model)
        for name in ("text", "tokens", "exit_layers", "prompt_tokens", "policy"):
            assert output[name] == getattr(expected, name)

    def test_has_letters_in_ascii_escapes(
        self, model: str, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        letter = next(t for t in range(49152) if tokenizer.decode([t]) == "é")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("river_llm.sampling.Sampler.choose", lambda *_: letter)
            outcome = run("generate", PROMPT, "-m", model, "-n", 3, "--json", "--temperature", 1)
        assert outcome.json["text"] == "ééé"
        assert r"\u00e9\u00e9\u00e9" in outcome.stdout
        assert outcome.stdout.isascii()


class TestPrompt:
    def test_goes_through_the_chat_template_unless_raw(
        self, model: str, tokenizer: PreTrainedTokenizerBase
    ) -> None:
        template = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=True
        )
        chat, raw = answer(model), answer(model, "--raw")
        assert chat["prompt_tokens"] == len(template["input_ids"])
        assert raw["prompt_tokens"] == len(tokenizer(PROMPT).input_ids)
        assert raw["tokens"] != chat["tokens"]

    def test_comes_from_stdin_for_a_dash(self, model: str) -> None:
        options = ("-m", model, "-n", 8, "--json")
        output = run("generate", "-", *options, stdin=PROMPT).json
        assert output["tokens"] == answer(model)["tokens"]
        longer = run("generate", "-", *options, stdin=f"{PROMPT}\nNow.").json
        assert longer["prompt_tokens"] > output["prompt_tokens"]


@pytest.mark.parametrize(
    ("options", "exit_layers", "policy"),
    [
        ("--policy never", [4, 4, 4, 4], ExitPolicy.never()),
        ("--policy always", [0, 0, 0, 0], ExitPolicy.always()),
        ("--policy fixed --exit-layer 2", [4, 2, 2, 2], ExitPolicy.fixed(2)),
        ("--exit-layer 3", [4, 3, 3, 3], ExitPolicy.fixed(3)),
        ("--exit-layer 0", [4, 0, 0, 0], ExitPolicy.fixed(0)),
        ("--exit-layer 4", [4, 4, 4, 4], ExitPolicy.fixed(4)),
        ("--policy similarity --threshold -1", [4, 1, 1, 1], ExitPolicy.similarity(-1)),
        ("--threshold -1 --first-layer 3", [4, 3, 3, 3], ExitPolicy.similarity(-1, 3)),
        ("--threshold 1", [4, 4, 4, 4], ExitPolicy.similarity(1)),
        ("--exit-layer 2 --prefill river", [0, 2, 2, 2], ExitPolicy.fixed(2, prefill="river")),
        ("--policy never --prefill river", [0, 4, 4, 4], ExitPolicy.never(prefill="river")),
        ("--policy always --prefill backbone", [4, 0, 0, 0], ExitPolicy.always(prefill="backbone")),
        (
            "--threshold -1 --prefill sequence",
            [1, 1, 1, 1],
            ExitPolicy.similarity(-1, prefill="sequence"),
        ),
    ],
)
def test_policy_options_say_where_tokens_leave(
    model: str, options: str, exit_layers: list[int], policy: ExitPolicy
) -> None:
    output = answer(model, *options.split(), length=4)
    assert output["exit_layers"] == exit_layers
    assert output["policy"] == policy.to_dict()


def test_sampling_options_reach_the_sampler(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[SamplingConfig] = []
    monkeypatch.setattr(
        RiverLM, "stream_tokens", lambda lm, ids, sampling, **_: seen.append(sampling)
    )
    options = "-n 3 --temperature 0.7 --top-p 0.8 --top-k 40 --min-p 0.05 --seed 9"
    others = "--repetition-penalty 1.2 --stop one --stop two"
    run("generate", PROMPT, "-m", model, *options.split(), *others.split())
    assert seen == [SamplingConfig(3, 0.7, 40, 0.8, 0.05, 1.2, 9, ("one", "two"))]


def test_loading_options_reach_the_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def load(name: str, river: object, policy: object, dtype: object, **others: Any) -> None:
        seen.append({"name": name, "river": river, "dtype": str(dtype), **others})
        raise RiverError("seen")

    monkeypatch.setattr(RiverLM, "from_pretrained", load)
    options = "--bits 3 --group-size 32 --quantizer rtn --dtype float16 --trust-remote-code"
    native = "--device cpu --engine cpu --threads 1 --backbone-bits 8 --lm-head-bits 8"
    native += " --kv-bits 8 --offload 2"
    for command in (["generate", PROMPT], ["chat"]):
        outcome = run(*command, "-m", "a-model", *options.split(), *native.split())
        outcome.check_fails(1, "seen")
        fields = seen.pop()
        assert fields.pop("progress")
        assert fields == {
            "name": "a-model",
            "river": RiverConfig(3, 32, "rtn"),
            "dtype": "torch.float16",
            "device": torch.device("cpu"),
            "engine": "cpu",
            "threads": 1,
            "backbone_bits": 8,
            "lm_head_bits": 8,
            "kv_bits": 8,
            "offload": OffloadConfig("layers", layers=2),
            "trust_remote_code": True,
        }


def test_the_width_of_the_kv_cache_reaches_the_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []

    def load(name: str, *others: object, kv_bits: int, **more: object) -> None:
        seen.append(kv_bits)
        raise RiverError("seen")

    monkeypatch.setattr(RiverLM, "from_pretrained", load)
    text = tmp_path / "text.txt"
    text.write_text("abc")
    run("check-exact", "a-model", "--prompts", text, "--kv-bits", 8).check_fails(1, "seen")
    assert seen == [8]


def test_the_same_seed_gives_the_same_text(model: str) -> None:
    options = ("--temperature", 1, "--seed")
    first = answer(model, *options, 1)
    assert answer(model, *options, 1)["text"] == first["text"]
    assert answer(model, *options, 2)["text"] != first["text"]


def test_stop_ends_the_answer_before_the_string(model: str) -> None:
    whole = answer(model)["text"]
    stop = whole[6:10]
    output = answer(model, "--stop", "nowhere in it", "--stop", stop)
    assert output["text"] == whole[: whole.index(stop)]
    assert output["finish_reason"] == "stop"


class TestCompare:
    def test_json_has_three_variants(self, model: str) -> None:
        options = ("--exit-layer", 2, "--bits", 3)
        output = answer(model, "--compare", *options)
        assert set(output) == {*FIELDS, "comparison"}
        assert output["tokens"] == answer(model, *options)["tokens"]
        assert output["policy"] == ExitPolicy.fixed(2).to_dict()
        variants = output["comparison"]
        fields = {field.name for field in dataclasses.fields(Compared)}
        assert all(set(one) == fields for one in variants)
        assert [one["variant"] for one in variants] == [
            "backbone",
            "full 3-bit",
            "River, exit after 2",
        ]
        assert [one["mean_exit_layer"] for one in variants] == [4, 0, 2]
        assert variants[0]["agreement"] == 1
        speeds = [one["tokens_per_second"] for one in variants]
        assert all(0 < x["lowest"] <= x["median"] <= x["highest"] for x in speeds)

    def test_table_comes_after_the_answer(self, model: str) -> None:
        outcome = run("generate", PROMPT, "-m", model, "-n", 8, "--exit-layer", 2, "--compare")
        assert outcome.exit_code == 0
        text = answer(model, "--exit-layer", 2)["text"]
        assert outcome.stdout.startswith(f"{text}\n")
        table = outcome.stdout.removeprefix(f"{text}\n")
        rows = ["backbone", "full 4-bit", "River,"]
        places = [table.index(row) for row in rows]
        assert places == sorted(places)
        assert [row for row in table.splitlines() if "backbone" in row and "1.00x" in row]
        for depth in ("4.0 of 4", "0.0 of 4", "2.0 of 4"):
            assert depth in table

    def test_needs_two_tokens(self, model: str) -> None:
        outcome = run("generate", PROMPT, "-m", model, "-n", 1, "--compare")
        assert outcome.exit_code == 0
        assert outcome.stdout == answer(model, length=1)["text"] + "\n"
        assert "too short to compare" in outcome.stderr


class TestBuild:
    def test_a_saved_river_gives_the_same_tokens(self, model: str, tmp_path: Path) -> None:
        settings = ["--bits", "2", "--group-size", "32", "--quantizer", "rtn"]
        outcome = run("build", model, "-o", tmp_path / "river", *settings)
        assert (outcome.exit_code, outcome.stdout) == (0, "")
        expected = River.build(load_backbone(model)[0], RiverConfig(2, 32, "rtn"))
        assert f"{expected.num_bytes / 1024:.1f} KiB" in outcome.stderr
        assert "2 bits in groups of 32 (rtn)" in outcome.stderr
        by_river = ("--policy", "always")
        tokens = answer(model, "--river", tmp_path / "river", *by_river)["tokens"]
        assert tokens == answer(model, *settings, *by_river)["tokens"]
        assert tokens != answer(model, *by_river)["tokens"]

    def test_a_river_of_other_weights_is_refused(
        self, model: str, other_model: str, tmp_path: Path
    ) -> None:
        river = tmp_path / "river"
        assert run("build", model, "-o", river).exit_code == 0
        for command in (["generate", PROMPT, "-m"], ["chat", "-m"], ["inspect"]):
            outcome = run(*command, other_model, "--river", river)
            outcome.check_fails(1, "this river was built for other weights")

    def test_a_place_that_is_taken_is_left_alone(self, model: str, tmp_path: Path) -> None:
        (tmp_path / "notes.txt").write_text("mine")
        run("build", model, "-o", tmp_path).check_fails(1, "holds other files than a river's")
        assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]

"""`river-llm inspect`: what it counts, what it measures, what it draws."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from command_line import run
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from river_llm import ExitPolicy, River, RiverConfig
from river_llm.measure.inspection import inspect_text
from river_llm.pretrained import load_with_river

pytest_plugins = ["cli_models"]

TEXT = "The river runs to the sea, [/slowly] and the sea is wide."
SHAPES = {
    "self_attn.q_proj": [64, 64],
    "self_attn.k_proj": [32, 64],
    "self_attn.v_proj": [32, 64],
    "self_attn.o_proj": [64, 64],
    "mlp.gate_proj": [128, 64],
    "mlp.up_proj": [128, 64],
    "mlp.down_proj": [64, 128],
}
WEIGHTS = 4 * sum(rows * columns for rows, columns in SHAPES.values())
DESCRIPTION = {
    "model",
    "architecture",
    "num_layers",
    "linears",
    "model_bytes",
    "backbone_linear_bytes",
    "river",
    "river_bytes",
    "bits_per_weight",
}
MEASURES = {
    "similarity",
    "key_cosine",
    "value_cosine",
    "tokens",
    "exit_layers",
    "mean_exit_layer",
    "policy",
}


def inspect(model: str, *options: object) -> dict[str, Any]:
    """The JSON of `river-llm inspect`."""
    return run("inspect", model, "--json", *options).json


class TestDescription:
    @pytest.mark.parametrize(
        ("bits", "group_size", "bits_per_weight"), [(4, 64, 4.5), (4, 32, 5), (3, 64, 3.5)]
    )
    def test_tells_shapes_and_bytes(
        self, model: str, bits: int, group_size: int, bits_per_weight: float
    ) -> None:
        output = inspect(model, "--bits", bits, "--group-size", group_size)
        backbone = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
        assert set(output) == DESCRIPTION
        assert (output["model"], output["architecture"]) == (model, "LlamaForCausalLM")
        assert output["num_layers"] == 4
        assert output["linears"] == SHAPES
        assert output["river"] == {"bits": bits, "group_size": group_size, "quantizer": "hqq"}
        assert output["backbone_linear_bytes"] == 2 * WEIGHTS
        assert output["model_bytes"] == 2 * backbone.num_parameters()
        assert output["bits_per_weight"] == bits_per_weight
        river = River.build(backbone, RiverConfig(bits, group_size))
        assert output["river_bytes"] == river.num_bytes == bits_per_weight * WEIGHTS / 8

    def test_in_words(self, model: str) -> None:
        outcome = run("inspect", model)
        assert (outcome.exit_code, outcome.stderr) == (0, "")
        for name, (rows, columns) in SHAPES.items():
            assert f"{name} {rows} x {columns}" in _words(outcome.stdout)
        assert "linear weights 288 KiB" in outcome.stdout
        assert "river 81.0 KiB: 4 bits in groups of 64 (hqq), 4.50 bits a weight" in outcome.stdout
        assert "28 % of those weights" in outcome.stdout
        assert "key cosine" not in outcome.stdout

    def test_shows_what_offloading_keeps(self, model: str) -> None:
        output = run("inspect", model, "--offload", "1", "--json").json
        plan = output["offload"]
        assert plan["resident_layers"] == 1
        evicted = output["backbone_linear_bytes"] * 3 // 4
        assert plan["all_bytes"] - plan["resident_bytes"] == evicted
        assert plan["all_bytes"] == output["model_bytes"] + output["river_bytes"]
        assert "layers 1 to 1 of 4 stay" in run("inspect", model, "--offload", "1").stdout
        text = ["--text", "a long text " * 20, "--exit-layer", 2]
        assert (
            run("inspect", model, "--offload", "auto", *text, "--json").json["offload"][
                "resident_layers"
            ]
            == 2
        )
        run("inspect", model, "--offload", "9").check_fails(1, "the model has 4")

    def test_of_a_saved_river(self, model: str, tmp_path: Path) -> None:
        assert run("build", model, "-o", tmp_path / "river", "--bits", 6).exit_code == 0
        output = inspect(model, "--river", tmp_path / "river")
        assert output["river"]["bits"] == 6
        assert output["bits_per_weight"] == 6.5


class TestMeasures:
    def test_are_those_of_the_library(self, model: str, tokenizer: PreTrainedTokenizerBase) -> None:
        output = inspect(model, "--text", TEXT, "--threshold", 0.85)
        assert set(output) == DESCRIPTION | MEASURES
        policy = ExitPolicy.similarity(0.85)
        attached, _ = load_with_river(model, policy=policy, device="cpu")
        expected = inspect_text(attached, tokenizer(TEXT).input_ids)
        assert output["policy"] == policy.to_dict()
        assert output["exit_layers"] == expected.exit_layers.tolist()
        assert len(set(output["exit_layers"])) > 1
        for name in ("key_cosine", "value_cosine"):
            assert len(output[name]) == 4
            assert output[name] == getattr(expected, name).tolist()
        assert output["similarity"] == expected.similarities.mean(1).tolist()
        assert len(output["similarity"]) == 4
        assert "".join(output["tokens"]) == TEXT
        assert output["mean_exit_layer"] == pytest.approx(
            sum(output["exit_layers"]) / len(output["exit_layers"])
        )

    def test_on_a_file_and_on_stdin(self, model: str, tmp_path: Path) -> None:
        expected = inspect(model, "--text", TEXT)
        (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
        assert inspect(model, "--text-file", tmp_path / "text.txt") == expected
        assert run("inspect", model, "--json", "--text", "-", stdin=TEXT).json == expected

    def test_on_the_first_tokens_only(self, model: str) -> None:
        whole = inspect(model, "--text", TEXT)
        cut = inspect(model, "--text", TEXT, "--max-tokens", 5)
        assert cut["tokens"] == whole["tokens"][:5]
        assert cut["exit_layers"] == whole["exit_layers"][:5]

    def test_on_no_more_than_the_context(self, other_model: str) -> None:
        outcome = run("inspect", other_model, "--json", "--text", "river " * 200)
        if outcome.exit_code == 0:
            assert len(outcome.json["tokens"]) <= 96
        else:
            outcome.check_fails(1, "context", "96")

    @pytest.mark.parametrize(
        ("options", "exit_layer"),
        [
            (("--policy", "never"), 4),
            (("--policy", "always"), 0),
            (("--exit-layer", 3), 3),
            (("--threshold", -1, "--first-layer", 2), 2),
        ],
    )
    def test_by_the_policy(self, model: str, options: tuple[object, ...], exit_layer: int) -> None:
        output = inspect(model, "--text", TEXT, *options)
        assert output["exit_layers"] == [exit_layer] * len(output["tokens"])

    def test_in_words(self, model: str) -> None:
        options = ("--text", TEXT, "--threshold", 0.85)
        output = inspect(model, *options)
        outcome = run("inspect", model, *options)
        assert (outcome.exit_code, outcome.stderr) == (0, "")
        words = _words(outcome.stdout)
        assert f"on {len(output['tokens'])} tokens" in words
        for layer in range(4):
            numbers = [output[name][layer] for name in ("similarity", "key_cosine", "value_cosine")]
            leaving = output["exit_layers"].count(layer + 1)
            row = " ".join([str(layer + 1), *(f"{number:.4f}" for number in numbers), str(leaving)])
            assert row in words
        assert f"{output['exit_layers'].count(4)} (stay)" in words
        assert f"\n{TEXT}\n" in outcome.stdout
        assert f"mean exit depth {output['mean_exit_layer']:.1f} of 4" in words


class TestPlot:
    @pytest.mark.parametrize(
        ("suffix", "magic"),
        [("png", b"\x89PNG\r\n\x1a\n"), ("PNG", b"\x89PNG"), ("pdf", b"%PDF-"), ("svg", b"<?xml")],
    )
    def test_is_written(self, model: str, tmp_path: Path, suffix: str, magic: bytes) -> None:
        path = tmp_path / f"figure.{suffix}"
        outcome = run("inspect", model, "--text", TEXT, "--plot", path, "--json")
        assert set(outcome.json) == DESCRIPTION | MEASURES
        assert outcome.stderr == ""
        assert path.read_bytes().startswith(magic)

    def test_carries_the_command(
        self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        assert "river-llm inspect tiny --text 'Two words' --plot figure.svg" in drawn(
            model, "Two words", tmp_path, monkeypatch
        )

    @pytest.mark.parametrize("text", [r"It is $\frac b$ or so", "from $5 to $6"])
    def test_is_not_upset_by_dollars(
        self, model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str
    ) -> None:
        assert f"'{text}'" in drawn(model, text, tmp_path, monkeypatch)
        assert "Oblique" not in (tmp_path / "figure.svg").read_text()  # as formulas are set

    def test_is_not_upset_by_letters_of_other_scripts(
        self, model: str, tmp_path: Path, recwarn: pytest.WarningsRecorder
    ) -> None:
        outcome = run("inspect", model, "--text", "河流入海", "--plot", tmp_path / "figure.png")
        assert outcome.exit_code == 0
        assert [str(warning.message) for warning in recwarn] == []

    def test_to_a_place_that_can_not_be_written_is_refused(
        self, model: str, tmp_path: Path
    ) -> None:
        (tmp_path / "figure.png").mkdir()
        outcome = run("inspect", model, "--text", TEXT, "--plot", tmp_path / "figure.png")
        assert "internal error" not in outcome.stderr
        outcome.check_fails(outcome.exit_code, "figure.png")


def drawn(model: str, text: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The texts of the SVG that `inspect` draws, joined; matplotlib keeps them as comments."""
    (directory / "tiny").symlink_to(model)
    monkeypatch.chdir(directory)
    outcome = run("inspect", "tiny", "--text", text, "--plot", "figure.svg")
    assert outcome.exit_code == 0, outcome.stderr
    builder = ElementTree.TreeBuilder(insert_comments=True)
    root = ElementTree.parse("figure.svg", ElementTree.XMLParser(target=builder)).getroot()
    texts = [node.text or "" for node in root.iter()]
    return html.unescape(" ".join(texts)).replace("- -", "--")


def _words(text: str) -> str:
    return " ".join(text.replace("│", " ").split())

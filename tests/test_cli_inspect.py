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
from river_llm.config import EngineConfig
from river_llm.load.pretrained import load_with_river
from river_llm.measure.inspection import inspect_text

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


def inspect(model: str, *options: object) -> dict[str, Any]:
    """The JSON of `river-llm inspect`."""
    return run("inspect", model, "--json", *options).json


@pytest.mark.parametrize(
    ("bits", "group_size", "bits_per_weight"), [(4, 64, 4.5), (4, 32, 5), (3, 64, 3.5)]
)
def test_tells_shapes_and_bytes(
    model: str, tmp_path: Path, bits: int, group_size: int, bits_per_weight: float
) -> None:
    backbone = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    river = River.build(backbone, RiverConfig(bits, group_size))
    river.save(tmp_path / "river")
    output = inspect(model, "--bits", bits, "--group-size", group_size)
    assert output == {
        "model": model,
        "architecture": "LlamaForCausalLM",
        "num_layers": 4,
        "linears": SHAPES,
        "river": RiverConfig(bits, group_size).to_dict(),
        "average_bits": bits,
        "backbone_linear_bytes": 2 * WEIGHTS,
        "model_bytes": 2 * backbone.num_parameters(),
        "bits_per_weight": bits_per_weight,
        "river_bytes": bits_per_weight * WEIGHTS / 8,
    }
    assert river.num_bytes == output["river_bytes"]
    assert inspect(model, "--river", tmp_path / "river") == output


def test_measures_are_those_of_the_library(model: str, tokenizer: PreTrainedTokenizerBase) -> None:
    output = inspect(model, "--text", TEXT, "--threshold", 0.85)
    policy = ExitPolicy.similarity(0.85)
    attached, _ = load_with_river(model, policy=policy, config=EngineConfig(device="cpu"))
    expected = inspect_text(attached, tokenizer(TEXT).input_ids)
    exit_layers = expected.exit_layers.tolist()
    assert len(set(exit_layers)) > 1
    measures = {
        "similarity": expected.similarities.mean(1).tolist(),
        "key_cosine": expected.key_cosine.tolist(),
        "value_cosine": expected.value_cosine.tolist(),
        "exit_layers": exit_layers,
        "mean_exit_layer": pytest.approx(sum(exit_layers) / len(exit_layers)),
        "policy": policy.to_dict(),
    }
    assert {name: output[name] for name in measures} == measures
    assert "".join(output["tokens"]) == TEXT


def test_a_text_comes_from_a_file_or_stdin_as_far_as_it_fits(
    model: str, other_model: str, tmp_path: Path
) -> None:
    expected = inspect(model, "--text", TEXT)
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    assert inspect(model, "--text-file", tmp_path / "text.txt") == expected
    assert run("inspect", model, "--json", "--text", "-", stdin=TEXT).json == expected
    cut = inspect(model, "--text", TEXT, "--max-tokens", 5)
    for name in ("tokens", "exit_layers"):
        assert cut[name] == expected[name][:5]
    assert len(inspect(other_model, "--text", "river " * 200)["tokens"]) == 96


def test_in_words(model: str) -> None:
    options = ("--text", TEXT, "--threshold", 0.85)
    output, outcome = inspect(model, *options), run("inspect", model, *options)
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    words = " ".join(outcome.stdout.replace("│", " ").split())
    for name, (rows, columns) in SHAPES.items():
        assert f"{name} {rows} x {columns}" in words
    for layer in range(4):
        numbers = [output[name][layer] for name in ("similarity", "key_cosine", "value_cosine")]
        leaving = output["exit_layers"].count(layer + 1)
        row = " ".join([str(layer + 1), *(f"{number:.4f}" for number in numbers), str(leaving)])
        assert row in words
    for part in (
        "linear weights 288 KiB",
        "river 81.0 KiB: 4 bits in groups of 64 (hqq), 4.50 bits a weight with scales, "
        "28 % of those weights",
        f"on {len(output['tokens'])} tokens",
        f"{output['exit_layers'].count(4)} (stay)",
        f"mean exit depth {output['mean_exit_layer']:.1f} of 4",
    ):
        assert part in words
    assert f"\n{TEXT}\n" in outcome.stdout
    assert "key cosine" not in run("inspect", model).stdout


@pytest.mark.parametrize(
    ("suffix", "magic"),
    [("PNG", b"\x89PNG"), ("pdf", b"%PDF-")],
)
def test_a_plot_is_written(model: str, tmp_path: Path, suffix: str, magic: bytes) -> None:
    path = tmp_path / f"figure.{suffix}"
    outcome = run("inspect", model, "--text", TEXT, "--plot", path, "--json")
    assert (outcome.exit_code, outcome.stderr) == (0, "")
    assert path.read_bytes().startswith(magic)
    path.unlink()
    path.mkdir()
    outcome = run("inspect", model, "--text", TEXT, "--plot", path)
    assert "internal error" not in outcome.stderr
    outcome.check_fails(1, path.name)


@pytest.mark.parametrize("text", [r"It is $\frac b$ or so", "from $5 to $6", "河流 入海"])
def test_a_plot_carries_the_command(
    model: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
    text: str,
) -> None:
    (tmp_path / "tiny").symlink_to(model)
    monkeypatch.chdir(tmp_path)
    outcome = run("inspect", "tiny", "--text", text, "--plot", "figure.svg")
    assert outcome.exit_code == 0, outcome.stderr
    assert [str(warning.message) for warning in recwarn] == []
    builder = ElementTree.TreeBuilder(insert_comments=True)  # where matplotlib keeps the texts
    root = ElementTree.parse("figure.svg", ElementTree.XMLParser(target=builder)).getroot()
    drawn = html.unescape(" ".join(node.text or "" for node in root.iter()))
    command = f"river-llm inspect tiny --text '{text}' --plot figure.svg"
    assert command in drawn.replace("- -", "--")
    assert "Oblique" not in Path("figure.svg").read_text()  # as formulas are set

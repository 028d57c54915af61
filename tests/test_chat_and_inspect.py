"""`river-llm chat` and `river-llm inspect` on a tiny model."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
import torch
from test_command_line import Run, model, run
from transformers import AutoModelForCausalLM

from river_llm import River

__all__ = ["model", "run"]  # fixtures

TEXT = "The river runs to the sea, and the sea is full of rivers that have ended."


def test_chat_answers_every_line(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n\n/clear\nHi\nAgain\n/exit\nnever\n"))
    code, output, errors = run("chat", "-m", run.model, "-n", "5", "--policy", "never")
    assert code == 0
    assert errors.count("tokens (length)") == 3
    expected = run.json("-n", "5", "--policy", "never", "Hi")["text"]
    assert output.startswith(f"{expected}\n{expected}\n")


def test_chat_goes_on_when_the_context_is_full(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("many " * 5000 + "\nHi\n"))
    code, _, errors = run("chat", "-m", run.model, "-n", "3")
    assert code == 0
    assert "/clear starts a new conversation" in errors
    assert errors.count("tokens (length)") == 1


def test_chat_needs_a_template(run: Run, tmp_path: Path) -> None:
    for file in Path(run.model).iterdir():
        if file.name != "chat_template.jinja":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    code, _, errors = run("chat", "-m", str(tmp_path))
    assert code == 1
    assert "no chat template; use river-llm generate --raw" in errors


def test_inspect_tells_shapes_and_bytes(run: Run) -> None:
    code, output, _ = run("inspect", run.model, "--json")
    assert code == 0
    described = json.loads(output)
    backbone = AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.bfloat16)
    assert described["num_layers"] == 4
    assert described["linears"]["mlp.down_proj"] == [64, 128]
    assert described["river_bytes"] == River.build(backbone).num_bytes
    assert described["bits_per_weight"] == pytest.approx(4.5)
    linears = [m.weight for m in backbone.model.layers.modules() if hasattr(m, "in_features")]
    assert described["backbone_linear_bytes"] == sum(weight.nbytes for weight in linears)
    assert described["model_bytes"] == sum(p.nbytes for p in backbone.parameters())


def test_inspect_measures_a_text(run: Run, tmp_path: Path) -> None:
    (tmp_path / "text").write_text(TEXT)
    arguments = ["inspect", run.model, "--exit-layer", "3"]
    code, output, _ = run(*arguments, "--text-file", str(tmp_path / "text"), "--json")
    assert code == 0
    measured = json.loads(output)
    assert "".join(measured["tokens"]) == TEXT
    assert measured["exit_layers"] == [3] * len(measured["tokens"])
    assert [len(measured[k]) for k in ("similarity", "key_cosine", "value_cosine")] == [4] * 3
    assert all(0.5 < cosine < 1 for cosine in measured["value_cosine"])
    code, output, _ = run(*arguments, "--text", TEXT)
    assert code == 0
    assert TEXT in output
    assert f"{measured['similarity'][1]:.4f}" in output


@pytest.mark.parametrize("suffix", ["png", "svg", "pdf"])
def test_inspect_draws(run: Run, tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"plot.{suffix}"
    code, _, errors = run("inspect", run.model, "--text", TEXT, "--plot", str(path))
    assert (code, errors) == (0, "")
    magic = {"png": b"\x89PNG", "svg": b"<?xml", "pdf": b"%PDF"}[suffix]
    assert path.read_bytes().startswith(magic)

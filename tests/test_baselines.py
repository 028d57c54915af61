"""experiments/baselines.py: `transformers` and llama.cpp begin every run at the same place, and run
the model itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from baselines import TransformersBaseline, print_tables
from gguf_export import write_gguf
from test_bench import TINY_SHAPE
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from river_llm.measure.bench import Text
from river_llm.measure.random_weights import random_model
from river_llm.measure.rounds import Result, Timing, Workload, make_workloads

DECODE = Workload("decode", 3)


@pytest.mark.parametrize(("depth", "batch"), [(0, 1), (20, 2)])
def test_transformers_begins_every_run_at_the_same_place(
    tiny_llama: PreTrainedModel, depth: int, batch: int
) -> None:
    def step_bytes(exit_layers: Sequence[int], position: int) -> int:
        assert list(exit_layers) == [4] * batch
        return 1000 + position

    baseline = TransformersBaseline(tiny_llama, Text(None, 97), step_bytes)
    decode = Workload("decode", 3, depth, batch)
    prompt = Workload("prompt", 5, depth, batch)
    for workload in (decode, decode, prompt, prompt, decode):
        baseline.prepare(workload)
        length = workload.context - (workload.kind == "decode")
        assert baseline._cache.get_seq_length() == length
        timing = baseline.run(workload)
        assert timing.tokens == batch * workload.tokens
        assert timing.seconds > 0
    read = sum(1000 + decode.context + place for place in range(3))
    assert timing.bytes_per_token == read / (3 * batch)


def test_the_tables_have_every_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        Result(name, "cpu", DECODE, [Timing(1, tokens, 1e6, bandwidth=4e6)])
        for name, tokens in (("backbone", 2), ("llama.cpp bf16", 1))
    ]
    print_tables([result.to_dict(results) for result in results])
    lines = capsys.readouterr().out.strip().splitlines()
    headings = "| tg3 | tokens/s | MB/token | of bandwidth | x backbone | x llama.cpp bf16 |"
    assert lines[0] == headings
    assert lines[2] == "| backbone | 2.0 [2.0 - 2.0] | 1.0 | 50 % | 1.00 | 2.00 |"


@pytest.mark.parametrize("kind", ["architecture", "rotary embedding"])
def test_llama_cpp_gets_plain_llamas_only(
    tiny_llama: PreTrainedModel, tmp_path: Path, kind: str
) -> None:
    if kind == "architecture":
        tiny_llama.config.model_type = "gemma3_text"
    else:
        tiny_llama.model.rotary_emb.rope_type = "dynamic"
    with pytest.raises(SystemExit, match="plain Llamas alone"):
        write_gguf(tiny_llama, tmp_path / "model.gguf")


@pytest.mark.slow
def test_llama_cpp_runs_the_same_model_in_every_format(
    smollm2_bf16: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    llama_cpp = pytest.importorskip("llama_cpp_baseline")
    text = Text(tokenizer, smollm2_bf16.config.vocab_size)
    least = {"bf16": 0.95, "Q8_0": 0.9, "Q4_0": 0.3}
    for name, path in llama_cpp.make_gguf_files(smollm2_bf16, tmp_path).items():
        repack = llama_cpp.runs_repacked(path)
        baseline = llama_cpp.LlamaCppBaseline(name, path, text, 1, repack)
        assert baseline.same_top_share(smollm2_bf16) >= least[name]
        for workload in make_workloads([40], [3], [0, 20], [1, 2]):
            for _ in range(2):
                baseline.prepare(workload)
                assert baseline.run(workload).tokens == workload.batch * workload.tokens
        baseline.close()
    assert not llama_cpp.runs_repacked(tmp_path / "none.gguf")


@pytest.mark.slow
def test_scaled_rotary_embeddings_and_an_own_head_come_along(tmp_path: Path) -> None:
    llama_cpp = pytest.importorskip("llama_cpp_baseline")
    rope = {
        "rope_type": "llama3",
        "rope_theta": 100.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    }
    model = random_model({**TINY_SHAPE, "tie_word_embeddings": False, "rope_parameters": rope})
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(8)  # so that layers and positions matter
    path = llama_cpp.make_gguf_files(model, tmp_path)["bf16"]
    baseline = llama_cpp.LlamaCppBaseline("bf16", path, Text(None, 97), 1, repack=False)
    assert baseline.same_top_share(model) >= 0.9
    baseline.close()

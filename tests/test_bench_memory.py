"""`river-llm bench --memory`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from native_engines import Subject, subject_of
from steps import append, begin, cached_states
from stored_models import save_model

from river_llm.errors import ContextFullError, RiverError
from river_llm.load.repacked_weights import write_engine
from river_llm.measure import memory
from river_llm.measure.memory import MemoryVariant, measure_memory

LAYERS, EXIT, CONTEXT = 4, 1, 100
RIVER = f"exit after {EXIT}"
NAMES = ["backbone", "full 4-bit", RIVER, f"{RIVER}, offloaded", "backbone, offloaded"]


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    model = save_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)
    return ["bench", "--memory", "-m", model, "--rounds", 1, "--threads", 1]


def test_variants_hold_what_their_names_say(
    options: list[object], monkeypatch: pytest.MonkeyPatch
) -> None:
    output = run(*options, "--depth", CONTEXT, "--exit-layer", EXIT, "--json").json
    results: list[dict[str, Any]] = output["results"]
    assert [result["variant"] for result in results] == NAMES
    for result in results:
        assert result["context"] == CONTEXT
        assert result["tokens_per_second"] > 0
        assert 0 < result["base_bytes"] < result["steady_bytes"] <= result["peak_bytes"]
    assert [result["misses"] > 0 for result in results] == [False] * 4 + [True]
    backbone, full, river, offloaded, _ = (result["expected_bytes"] for result in results)
    layer = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # bfloat16
    river_layer = layer // 4 + layer // 64 * 2  # 4 bits, and scale and zero of 64 weights
    assert river - backbone == LAYERS * river_layer
    assert river - full == LAYERS * layer
    assert offloaded - full == EXIT * layer

    monkeypatch.setattr(memory, "bench_memory", lambda *_: output)
    table = run(*options, "--kv-bits", 8).stdout
    assert all(name in table for name in NAMES)


def test_says_why_a_process_failed(tmp_path: Path) -> None:
    write_engine(tmp_path, subject_of("llama").engine())
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(RiverError, match=r"backbone at 8 tokens could .* has 5 bytes"):
        measure_memory(tmp_path, [MemoryVariant("backbone", 4)], [8], 1)


def test_the_kv_cache_has_the_width_that_is_asked_for(tmp_path: Path) -> None:
    context = 40_000
    subject = Subject("Llama", {"max_position_embeddings": 50_000})
    engines = {bits: subject.engine(kv_bits=bits) for bits in (16, 8)}
    for engine in engines.values():
        engine.write_zeros(engine.add_sequence(), context)
    write_engine(tmp_path, engines[16])
    (result,) = measure_memory(tmp_path, [MemoryVariant("full", 0, 0)], [context], 1, 1, 8)
    assert result["expected_bytes"] == engines[8].rest_bytes + engines[8].cache_bytes
    assert engines[8].cache_bytes < engines[16].cache_bytes


@pytest.mark.parametrize("kv_bits", [16, 8])
def test_a_context_that_is_not_computed_is_keys_and_values_of_zero(kv_bits: int) -> None:
    engine = subject_of("llama").engine(kv_bits=kv_bits)
    (sequence,) = begin(engine)
    logits = []
    for _ in range(2):  # the second time over what the first one left
        engine.write_zeros(sequence, 70)
        assert engine.length(sequence) == 70
        assert not cached_states(engine, sequence).any()
        logits.append(append(engine, {sequence: [5, 6]}).logits)
    assert torch.equal(*logits)
    with pytest.raises(ContextFullError):
        engine.write_zeros(sequence, 10**6)


@pytest.mark.parametrize(
    ("given", "exit_code", "message"),
    [
        (["--threshold", "0.9"], 2, "leave --threshold out"),
        (["--batch", "1,2"], 2, "leave --batch out"),
        (["--engine", "torch"], 2, "leave --engine out"),
        (["--exit-layer", "5"], 1, "the model has 4 layers"),
        (["--depth", "100000"], 1, "leaves no room"),
    ],
)
def test_wrong_options(
    given: list[str], exit_code: int, message: str, options: list[object]
) -> None:
    run(*options, *given).check_fails(exit_code, message)

"""`river-llm bench --memory`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from native_engines import Subject, subject_of
from stored_models import save_model

from river_llm import ExitPolicy
from river_llm.errors import ContextFullError, RiverError
from river_llm.measure.memory import MemoryVariant, keep_weights, measure_memory

LAYERS, EXIT, CONTEXT = 4, 1, 100
NAMES = [
    "backbone",
    "full 4-bit",
    "exit after 1",
    "exit after 1, offloaded",
    "backbone, offloaded",
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


@pytest.fixture(scope="module")
def options(model: Path) -> list[object]:
    options = ["--depth", CONTEXT, "--exit-layer", EXIT, "--rounds", 1, "--threads", 1]
    return ["bench", "--memory", "-m", model, *options]


def test_variants_hold_what_their_names_say(options: list[object]) -> None:
    results: list[dict[str, Any]] = run(*options, "--json").json["results"]
    assert [result["variant"] for result in results] == NAMES
    for result in results:
        assert result["context"] == CONTEXT
        assert result["tokens_per_second"] > 0
        assert 0 < result["base_bytes"] < result["steady_bytes"] <= result["peak_bytes"]
    misses = [result["misses"] > 0 for result in results]
    assert misses == [False, False, False, False, True]
    backbone, full, river, offloaded, _ = (result["expected_bytes"] for result in results)
    layer = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # bfloat16
    river_layer = layer // 4 + layer // 64 * 2  # 4 bits, and scale and zero of 64 weights
    assert river - backbone == LAYERS * river_layer
    assert river - full == LAYERS * layer
    assert offloaded - full == EXIT * layer


def test_a_table_has_every_variant(options: list[object]) -> None:
    outcome = run(*options, "--kv-bits", 8)
    assert outcome.exit_code == 0
    assert all(name in outcome.stdout for name in NAMES)


def test_says_why_a_process_failed(tmp_path: Path) -> None:
    keep_weights(subject_of("llama").engine(), tmp_path)
    (tmp_path / "weights.bin").write_bytes(b"short")
    with pytest.raises(RiverError, match=r"backbone at 8 tokens could .* has 5 bytes"):
        measure_memory(tmp_path, [MemoryVariant("backbone", 4)], [8], 1)


def test_the_kv_cache_has_the_width_that_is_asked_for(tmp_path: Path) -> None:
    context = 40_000  # memory is taken by 8 MiB
    subject = Subject("Llama", {"max_position_embeddings": 50_000})
    engine = subject.engine()
    keep_weights(engine, tmp_path)
    (result,) = measure_memory(tmp_path, [MemoryVariant("full", 0, 0)], [context], 1, 1, 8)
    caches = {}
    for bits in (16, 8):
        lengthened = subject.engine(kv_bits=bits)
        lengthened.lengthen(context)
        caches[bits] = lengthened.cache_bytes
    assert result.expected_bytes == engine.rest_bytes + caches[8]
    assert caches[8] < caches[16]


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (["--threshold", "0.9"], 2, "leave --threshold out"),
        (["--batch", "1,2"], 2, "leave --batch out"),
        (["--engine", "torch"], 2, "leave --engine out"),
        (["--exit-layer", "5"], 1, "the model has 4 layers"),
        (["--depth", "100000"], 1, "leaves no room"),
    ],
)
def test_wrong_options(options: list[str], exit_code: int, message: str, model: Path) -> None:
    run("bench", "--memory", "-m", model, *options).check_fails(exit_code, message)


def test_a_lengthened_cache_is_keys_and_values_of_zero() -> None:
    engine = subject_of("llama").engine(ExitPolicy.fixed(2))
    engine.lengthen(70)
    assert engine.length == 70
    first = engine.decode(torch.tensor([5])).logits
    engine.lengthen(75)
    engine.truncate(0)
    engine.lengthen(70)
    assert torch.equal(engine.decode(torch.tensor([5])).logits, first)
    with pytest.raises(ContextFullError):
        engine.lengthen(10**6)

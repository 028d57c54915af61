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
from river_llm.benchmark.memory import MemoryArm, keep_weights, measure_memory, memory_arms
from river_llm.errors import ContextFullError, RiverError

LAYERS, EXIT, CONTEXT = 4, 1, 100


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"), tie_word_embeddings=False)


class TestMeasurement:
    @pytest.fixture(scope="class")
    def output(self, model: Path) -> dict[str, Any]:
        """Of one round, each arm once."""
        options = ["--depth", CONTEXT, "--exit-layer", EXIT, "--rounds", 1, "--threads", 1]
        return run("bench", "--memory", "-m", model, *options, "--json").json

    def test_has_every_arm(self, output: dict[str, Any]) -> None:
        arms = [result["arm"] for result in output["results"]]
        assert arms == ["backbone", "full 4-bit", "exit after 1", "exit after 1, offloaded"]
        assert {result["context"] for result in output["results"]} == {CONTEXT}
        assert {result["misses"] for result in output["results"]} == {0}
        assert all(result["tokens_per_second"] > 0 for result in output["results"])

    def test_expects_the_bytes_of_what_an_arm_holds(
        self, output: dict[str, Any], model: Path
    ) -> None:
        backbone, full, river, offloaded = (r["expected_bytes"] for r in output["results"])
        layer = 2 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 128)  # bfloat16
        river_layer = layer // 4 + layer // 64 * 2  # 4 bits, and scale and zero of 64 weights
        assert river - backbone == LAYERS * river_layer
        assert river - full == LAYERS * layer
        assert offloaded - full == EXIT * layer

    def test_reads_the_systems_account(self, output: dict[str, Any]) -> None:
        for result in output["results"]:
            assert 0 < result["base_bytes"] < result["steady_bytes"] <= result["peak_bytes"]
            assert result["held_bytes"] == result["steady_bytes"] - result["base_bytes"]

    def test_is_shown_as_a_table(self, model: Path) -> None:
        options = ["--depth", CONTEXT, "--exit-layer", EXIT, "--rounds", 1, "--threads", 1]
        outcome = run("bench", "--memory", "-m", model, *options, "--kv-bits", 8)
        assert outcome.exit_code == 0
        assert "KV cache of 8" in outcome.stdout
        assert "exit after 1, offloaded" in outcome.stdout
        assert "1.00" in outcome.stdout

    def test_says_why_a_process_failed(self, tmp_path: Path) -> None:
        engine = subject_of("llama").engine()
        keep_weights(engine, tmp_path)
        (tmp_path / "weights.bin").write_bytes(b"short")
        arms = [MemoryArm("backbone", 4)]
        with pytest.raises(RiverError, match=r"backbone at 8 tokens could .* has 5 bytes"):
            measure_memory(tmp_path, arms, [8], 1, 1, 1, 16, lambda *_: None)


def test_arms_have_a_kv_cache_of_the_width_that_is_asked_for(tmp_path: Path) -> None:
    context = 40_000  # memory is taken by 8 MiB
    subject = Subject("Llama", {"max_position_embeddings": 50_000})
    engine = subject.engine()
    keep_weights(engine, tmp_path)
    (result,) = measure_memory(
        tmp_path, [MemoryArm("full", 0, 0)], [context], 1, 1, 1, 8, lambda *_: None
    )
    caches = {}
    for bits in (16, 8):
        lengthened = subject.engine(kv_bits=bits)
        lengthened.lengthen(context)
        caches[bits] = lengthened.cache_bytes
    assert result.expected_bytes == engine.rest_bytes + caches[8]
    assert caches[8] < caches[16]


def test_arms_hold_what_their_names_say() -> None:
    backbone, full, river, offloaded = memory_arms(16, 3, 4)
    assert (backbone.exit_layer, backbone.with_river, backbone.resident_layers) == (16, False, None)
    assert (full.exit_layer, full.resident_layers) == (0, 0)
    assert (river.exit_layer, river.resident_layers) == (3, None)
    assert (offloaded.exit_layer, offloaded.resident_layers) == (3, 3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--peers", "transformers"], "--peers is for speed"),
        (["--threshold", "0.9"], "--threshold is for speed"),
        (["--batch", "1,2"], "--batch is for speed"),
        (["--new-tokens", "64"], "--new-tokens is for speed"),
        (["--engine", "torch"], "native engine"),
        (["--threads", "1,2"], "one number of --threads"),
        (["--exit-layer", "5"], "the model has 4 layers"),
        (["--depth", "100000"], "doesn't leave room"),
    ],
)
def test_wrong_options(options: list[str], message: str, model: Path) -> None:
    run("bench", "--memory", "-m", model, *options).check_fails(2, message)


class TestLengthening:
    def test_is_decoding_behind_keys_and_values_of_zero(self) -> None:
        engine = subject_of("llama").engine(ExitPolicy.fixed(2))
        engine.lengthen(70)
        assert engine.length == 70
        first = engine.decode(torch.tensor([5])).logits
        assert engine.length == 71
        engine.lengthen(75)
        engine.decode(torch.tensor([5]))
        engine.truncate(0)
        engine.lengthen(70)
        assert torch.equal(engine.decode(torch.tensor([5])).logits, first)

    def test_refuses_what_it_cannot_be(self) -> None:
        engine = subject_of("llama").engine()
        with pytest.raises(ContextFullError):
            engine.lengthen(10**6)
        engine.lengthen(10)
        with pytest.raises(RiverError, match="one sequence that is shorter"):
            engine.lengthen(9)
        assert engine.length == 10
        engine.truncate(0)
        engine.prefill(torch.tensor([[1, 2], [3, 4]]))
        with pytest.raises(RiverError, match="one sequence"):
            engine.lengthen(20)

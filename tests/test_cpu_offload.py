"""Evicted backbone layers of the native engine come back: the same bits, whatever stays in
memory."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_engines import random_tokens, subject_of
from steps import append, begin
from torch import Tensor

from river_llm import ExitPolicy
from river_llm.engines.cpu import CpuEngine
from river_llm.engines.drafting import DraftRule
from river_llm.errors import ConfigError, RiverError
from river_llm.river.residency import OffloadStatistics

LAYERS = 4
MIXED = ExitPolicy.similarity(0.75)
TIME_STEP = 0.02  # seconds, more than the steps that the times of files have


@contextmanager
def offloadable(engine: CpuEngine, path: Path) -> Iterator[CpuEngine]:
    """The engine with its weights in a file too; all are in memory again afterwards."""
    with path.open("wb") as file:
        for part in engine.packed_weights:
            part.tofile(file)
    engine.offload_to(path)
    time.sleep(TIME_STEP)
    yield engine
    engine.keep_layers(engine.num_layers)


def everything(engine: CpuEngine, plan: Callable[[int], None] = lambda step: None) -> list[Tensor]:
    """What steps and drafts give on two texts; `plan` may change what stays before each."""
    first, second = begin(engine, [9, 5])
    tokens = random_tokens(20, seed=3)
    plan(0)
    step = append(engine, {first: tokens[:9], second: tokens[4:9]}, MIXED)
    found = [step.logits, step.exit_layers]
    for place in range(9, 13):
        plan(place - 8)
        step = append(engine, {first: [tokens[place]], second: [5]}, MIXED)
        found += [step.logits, step.exit_layers]
    for draft in engine.draft([first, second], tokens[13:15], [2, 1], DraftRule(1)):
        found.append(torch.tensor(draft.tokens))
    return [*found, append(engine, {first: tokens[13:15]}).logits]


@pytest.mark.parametrize("case", ["llama", "gemma3_text", "phi3, longrope", "qwen2"])
@pytest.mark.parametrize("backbone_bits", [16, 8])
def test_bits_are_the_same_whatever_stays(case: str, backbone_bits: int, tmp_path: Path) -> None:
    engine = subject_of(case).engine(backbone_bits=backbone_bits, threads=2)
    expected = everything(engine)
    with offloadable(engine, tmp_path / "weights.bin"):

        def check(kept: list[int]) -> None:
            def keep(step: int) -> None:
                count = kept[step % len(kept)]
                engine.keep_layers(count)
                held = [part is not None for part in engine.packed_weights[:-1]]
                assert held == [layer < count for layer in range(LAYERS)]

            for one, other in zip(everything(engine, keep), expected, strict=True):
                assert torch.equal(one, other)
            assert engine.resident_layers == kept[4 % len(kept)]

        given(st.lists(st.integers(0, LAYERS), min_size=1, max_size=5))(
            settings(max_examples=15)(check)
        )()


def test_misses_and_capped_rows_are_counted(tmp_path: Path) -> None:
    engine = subject_of("llama").engine()
    with offloadable(engine, tmp_path / "weights.bin"):
        engine.keep_layers(1)
        (sequence,) = begin(engine)
        assert engine.offload_statistics == OffloadStatistics(1)
        for policy, misses in ((None, 3), (ExitPolicy.fixed(1), 3), (ExitPolicy.fixed(2), 4)):
            append(engine, {sequence: [3]}, policy)
            assert engine.offload_statistics.misses == misses
        statistics = engine.offload_statistics
        assert statistics.bytes_read == 4 * engine.layer_bytes[0]
        assert statistics.seconds_waited > 0
        assert statistics.depth_capped == 0
        engine.depth_limit = 1
        assert set(append(engine, {sequence: [3, 4, 5]}).exit_layers.tolist()) == {1}
        capped = engine.offload_statistics.since(statistics)
        assert capped == OffloadStatistics(1, depth_capped=3)


def test_a_file_is_needed(tmp_path: Path) -> None:
    engine = subject_of("llama").engine()
    with pytest.raises(RiverError, match="no file that evicted layers"):
        engine.keep_layers(2)
    with pytest.raises(RiverError, match="can't open"):
        engine.offload_to(tmp_path / "missing")
    (tmp_path / "short").write_bytes(b"abc")
    with pytest.raises(RiverError, match="bytes of the packed weights"):
        engine.offload_to(tmp_path / "short")
    for count in (-1, LAYERS + 1):
        with pytest.raises(ConfigError, match="the model has 4"):
            engine.keep_layers(count)


@pytest.mark.parametrize("how", ["cut short", "changed", "replaced", "removed"])
def test_weights_never_come_from_another_file(how: str, tmp_path: Path) -> None:
    engine, path = subject_of("llama").engine(), tmp_path / "weights.bin"

    def logits(policy: ExitPolicy | None = None) -> Tensor:
        (sequence,) = begin(engine)
        return append(engine, {sequence: random_tokens(6, seed=1)}, policy).logits

    expected, shallow = logits(), logits(ExitPolicy.always())
    with offloadable(engine, path):
        engine.keep_layers(1)
        whole = path.read_bytes()
        if how == "cut short":
            os.truncate(path, len(whole) // 2)
        elif how == "changed":
            with path.open("r+b") as file:
                file.write(b"\x11" * 8)
        else:
            path.unlink()
            if how == "replaced":  # what was opened is still there
                path.write_bytes(bytes(len(whole)))
        if how in ("cut short", "changed"):
            for go_deep in (logits, lambda: engine.keep_layers(2)):
                with pytest.raises(RiverError, match="changed while it was in use") as raised:
                    go_deep()
                assert "\n" not in str(raised.value)
            assert [engine.length(sequence) for sequence in engine.sequences()] == [0]
            assert torch.equal(logits(ExitPolicy.always()), shallow)  # what is in memory goes on
            path.write_bytes(whole)
            engine.offload_to(path)
        assert torch.equal(logits(), expected)

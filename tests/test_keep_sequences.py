"""Sequences of a batch that are kept when others are forgotten: as if they had been alone."""

from __future__ import annotations

import pytest
import torch
from native_engines import random_tokens, subject_of
from torch import Tensor

from river_llm import ExitPolicy
from river_llm.engines import Engine
from river_llm.errors import RiverError

NAMES = ["cpu", "cpu, 8 bits", "torch", "torch, 8 bits"]
LENGTHS = [5, 9, 2, 7]


def engine_of(name: str) -> Engine:
    """An engine whose tokens leave at different depths."""
    kind, _, bits = name.partition(", ")
    subject = subject_of("llama")
    make = subject.engine if kind == "cpu" else subject.reference
    engine: Engine = make(ExitPolicy.similarity(0.7), kv_bits=8 if bits else 16)
    return engine


def prefill(engine: Engine, sequences: list[int]) -> Tensor:
    """Prompts of different lengths, begun anew; the logits of their last tokens."""
    engine.truncate(0)
    width = max(LENGTHS[i] for i in sequences)
    tokens = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros(len(sequences), width, dtype=torch.bool)
    for row, i in enumerate(sequences):
        tokens[row, width - LENGTHS[i] :] = random_tokens(1, LENGTHS[i], seed=i)[0]
        mask[row, width - LENGTHS[i] :] = True
    return engine.prefill(tokens, None if bool(mask.all()) else mask).logits


def decode(engine: Engine, sequences: list[int], steps: range) -> tuple[Tensor, Tensor]:
    """Logits `[steps, batch, V]` and exits of the tokens that these sequences go on with."""
    texts = torch.cat([random_tokens(1, 30, seed=50 + i) for i in sequences])
    logits, exit_layers = [], []
    for step in steps:
        result = engine.decode(texts[:, step])
        logits.append(result.logits)
        exit_layers.append(result.exit_layers)
    return torch.stack(logits), torch.stack(exit_layers)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [1, 3], [0, 2], [2]], ids=str)
def test_go_on_as_if_they_had_been_alone(name: str, kept: list[int]) -> None:
    engine = engine_of(name)
    prefill(engine, kept)
    expected, expected_exits = decode(engine, kept, range(12))
    prefill(engine, [0, 1, 2, 3])
    decode(engine, [0, 1, 2, 3], range(4))
    engine.keep_sequences(kept)
    assert engine.length == max(LENGTHS[i] for i in kept) + 4
    logits, exits = decode(engine, kept, range(4, 12))
    if name.startswith("cpu"):
        assert torch.equal(logits, expected[4:])
    else:
        torch.testing.assert_close(logits, expected[4:], rtol=1e-4, atol=2e-5)
    assert torch.equal(exits, expected_exits[4:])
    assert len(expected_exits.unique()) > 1 or len(kept) == 1


@pytest.mark.parametrize("name", NAMES)
def test_can_be_fewer_again_and_rewound(name: str) -> None:
    engine = engine_of(name)
    prefill(engine, [3])
    expected, _ = decode(engine, [3], range(10))
    prefill(engine, [0, 1, 2, 3])
    decode(engine, [0, 1, 2, 3], range(2))
    engine.keep_sequences([1, 2, 3])
    decode(engine, [1, 2, 3], range(2, 8))
    engine.rewind([0, 3, 1])
    engine.keep_sequences([2])
    assert engine.length == LENGTHS[3] + 7
    logits, _ = decode(engine, [3], range(7, 10))
    torch.testing.assert_close(logits, expected[7:], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_must_be_there_and_in_order(name: str) -> None:
    engine = engine_of(name)
    prefill(engine, [0, 1, 2])
    length = engine.length
    for wrong in ([], [0, 3], [-1, 0], [1, 0], [1, 1]):
        with pytest.raises(RiverError, match="the cache holds 3 sequences"):
            engine.keep_sequences(wrong)
    assert engine.length == length
    expected, _ = decode(engine, [0, 1, 2], range(2))
    engine.truncate(0)
    with pytest.raises(RiverError, match="the cache holds 0 sequences"):
        engine.keep_sequences([0])
    prefill(engine, [0, 1, 2])
    assert torch.equal(decode(engine, [0, 1, 2], range(2))[0], expected)

"""The torch engine's KV cache: beside `transformers`' own, and where it lies in memory."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import tiny_model
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from river_llm import RiverConfig, RiverError, attach_river
from river_llm.engines import TorchEngine
from river_llm.engines.kv_cache import EightBitLayer, StatesLayer, layer_class

BATCH, HEADS, DIMS = 2, 3, 4
operations = st.lists(
    st.tuples(st.just("append"), st.integers(1, 400))
    | st.tuples(st.just("truncate"), st.integers(0, 900))
    | st.tuples(st.just("move"), st.integers(0, 5)),
    min_size=1,
    max_size=8,
)
both_widths = pytest.mark.parametrize("kind", [StatesLayer, EightBitLayer])


def states(count: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, BATCH, HEADS, count, DIMS, generator=generator)
    return keys, values


def places(layer: StatesLayer) -> list[int]:
    return [getattr(layer, name).data_ptr() for name in layer.parts]


@given(operations=operations)
def test_holds_what_transformers_own_does(operations: list[tuple[str, int]]) -> None:
    layer, plain = StatesLayer(), DynamicLayer()
    layer.update(*states(3, 0))
    plain.update(*states(3, 0))
    for seed, (operation, count) in enumerate(operations, start=1):
        if operation == "append":
            found, expected = layer.update(*states(count, seed)), plain.update(*states(count, seed))
            assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))
        elif operation == "truncate":
            layer.truncate(count)
            plain.keys, plain.values = plain.keys[:, :, :count], plain.values[:, :, :count]
        else:
            shift = min(count, plain.keys.shape[2])
            layer.move([shift, 0], unused=0)
            for name in ("keys", "values"):
                part = getattr(plain, name).clone()
                part[0] = part[0].roll(shift, dims=1)
                setattr(plain, name, part)
        assert torch.equal(layer.keys, plain.keys)
        assert torch.equal(layer.values, plain.values)
        assert layer.get_seq_length() == plain.get_seq_length()


@both_widths
def test_a_new_position_moves_no_other(kind: Any) -> None:
    layer = kind()
    layer.update(*states(700, 0))
    first, moved = places(layer), 0
    for step in range(300):
        layer.update(*states(1, step))
        moved += places(layer) != first
        first = places(layer)
    assert moved == 2  # there is room for 128 of each at the least


@both_widths
def test_memory_is_used_again_after_truncation(kind: Any) -> None:
    layer = kind()
    layer.update(*states(100, 0))
    before = places(layer)
    layer.truncate(50)
    layer.update(*states(60, 1))
    assert places(layer) == before


@both_widths
def test_another_batch_has_memory_of_its_own(kind: Any) -> None:
    layer = kind()
    layer.update(*states(5, 0))
    layer.truncate(0)
    keys, values = states(5, 1)
    layer.keys, layer.values = layer.keys[:1], layer.values[:1]
    for name in set(layer.parts) - {"keys", "values"}:
        setattr(layer, name, getattr(layer, name)[:1])
    found = layer.update(keys[:1], values[:1])[0]
    assert found.shape == (1, HEADS, 5, DIMS)


@pytest.mark.parametrize("bits", [16, 8])
def test_a_layer_of_a_saved_cache_goes_on(bits: int) -> None:
    layer, other = layer_class(bits)(), layer_class(bits)()
    layer.update(*states(20, 0))
    other.restore({name: getattr(layer, name).clone() for name in layer.parts}, torch.float32)
    found, expected = other.update(*states(3, 1)), layer.update(*states(3, 1))
    assert all(torch.equal(one, its) for one, its in zip(found, expected, strict=True))


@both_widths
def test_what_was_moved_is_held_once(kind: Any) -> None:
    layer = kind()
    layer.update(*states(300, 0))
    old = [weakref.ref(room) for room in layer._rooms.values()]
    layer.move([1, 0], unused=1)
    gc.collect()
    assert len(old) == len(layer.parts)
    assert all(reference() is None for reference in old)
    found = layer.update(*states(1, 1))[0]
    assert found.shape[2] == 300


def test_another_number_of_sequences_is_refused() -> None:
    attached = attach_river(tiny_model("Llama"), RiverConfig(group_size=32))
    engine = TorchEngine(attached)
    engine.prefill(torch.tensor([[5, 6, 7]]))
    with pytest.raises(RiverError, match="holds 1 sequences, not 3"):
        engine.decode(torch.tensor([8, 9, 10]))
    assert engine.decode(torch.tensor([8])).logits.isfinite().all()

"""The KV cache: codes of 8 bits, where the torch engine's lies in memory, and both engines with it
against keys and values that are rounded one by one."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from native_engines import Subject, random_tokens, relative_errors, subject_of
from steps import append, begin, cached_states, decode_along
from tiny_core import empty_core
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from river_llm import ConfigError, ExitPolicy
from river_llm.engines import CpuEngine, TorchEngine
from river_llm.engines.kv_cache import (
    EightBitLayer,
    Piece,
    StatesLayer,
    dequantize_states,
    layer_class,
    position_bytes,
    quantize_states,
)

BATCH, HEADS, DIMS = 2, 3, 4
PROMPT_LENGTH = 12

# full attention, windows, grouped queries, wide heads, norms of the keys, angles that change
SOME_CASES = ["llama", "mistral, window", "qwen3", "phi3, longrope", "gemma3_text"]
some_cases = pytest.mark.parametrize("case", SOME_CASES)
both_engines = pytest.mark.parametrize("kind", ["cpu", "torch"])
both_widths = pytest.mark.parametrize("kind", [StatesLayer, EightBitLayer])

# Relative L2 of logits and states, the mean over the rows of a test; any row may reach three
# times that. The native engine rounds to bfloat16 too, which may push a key or value to the next
# code; in float32 only a tie may fall otherwise. Without rounding, logits would differ by 0.004 to
# 0.012.
TOLERANCES = {"cpu": 0.016, "torch": 0.001}
STATE_TOLERANCES = {"cpu": 0.02, "torch": 0.002}


def states(count: int, seed: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, batch, HEADS, count, DIMS, generator=generator)
    return keys, values


def places(layer: StatesLayer) -> list[int]:
    return [getattr(layer, name).data_ptr() for name in layer.parts]


def plainly_rounded(states: Tensor) -> Tensor:
    """Keys or values `[..., D]` by codes of 8 bits, one after the other."""
    vectors = states.double().reshape(-1, states.shape[-1]).tolist()
    rounded = []
    for vector in vectors:
        scale = max(abs(x) for x in vector) / 127
        rounded.append([round(x / scale) * scale for x in vector])
    return torch.tensor(rounded, dtype=states.dtype).view(states.shape)


class TestLayers:
    @given(
        operations=st.lists(
            st.tuples(st.just("append"), st.integers(1, 400))
            | st.tuples(st.just("truncate"), st.integers(0, 900)),
            min_size=1,
            max_size=8,
        )
    )
    def test_hold_what_transformers_own_does(self, operations: list[tuple[str, int]]) -> None:
        layer, plain = StatesLayer(), DynamicLayer()
        for seed, (operation, count) in enumerate([("append", 3), *operations]):
            if operation == "append":
                found = layer.update(*states(count, seed))
                assert all(map(torch.equal, found, plain.update(*states(count, seed))))
            else:
                layer.truncate(count)
                plain.keys, plain.values = plain.keys[:, :, :count], plain.values[:, :, :count]
            assert torch.equal(layer.keys, plain.keys)
            assert torch.equal(layer.values, plain.values)
            assert layer.get_seq_length() == plain.get_seq_length()

    @pytest.mark.parametrize("bits", [16, 8])
    @given(pieces=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 9), st.integers(0, 9))))
    def test_join_sequences_at_their_ends(
        self, bits: int, pieces: list[tuple[int, int, int]]
    ) -> None:
        sources = []
        for seed in range(2):
            source = layer_class(bits)()
            source.update(*states(10, seed, batch=3))
            sources.append(source)
        chosen = [(1, 0, 1), *((r, min(a, b), max(a, b)) for r, a, b in pieces)]
        layers = [sources[number % 2] for number in range(len(chosen))]
        joined = layer_class(bits).joined(
            [
                Piece(source if start < end else None, row, start, end)
                for source, (row, start, end) in zip(layers, chosen, strict=True)
            ]
        )
        width = max(end - start for _, start, end in chosen)
        for name in joined.parts:
            part = getattr(joined, name)
            assert part.shape[:3] == (len(chosen), HEADS, width)
            for own, source, (row, start, end) in zip(part, layers, chosen, strict=True):
                assert torch.equal(
                    own[:, width - end + start :], getattr(source, name)[row, :, start:end]
                )
                assert not own[:, : width - end + start].any()
        new = states(2, 5, batch=len(chosen))
        expected = [getattr(joined, name).clone() for name in ("keys", "values")]
        for found, before in zip(joined.update(*new), expected, strict=True):
            assert found.shape[2] == width + 2
            assert bits == 8 or torch.equal(found[:, :, :width], before)

    @both_widths
    def test_copy_nothing_for_a_new_position(self, kind: Any) -> None:
        layer = kind()
        layer.update(*states(700, 0))
        first, moved = places(layer), 0
        for step in range(300):
            layer.update(*states(1, step))
            moved += places(layer) != first
            first = places(layer)
        assert moved == 2  # there is room for 128 of each at the least
        layer.truncate(50)
        layer.update(*states(60, 1))
        assert places(layer) == first

    @both_widths
    def test_of_which_others_were_joined_are_let_go_of(self, kind: Any) -> None:
        layer = kind()
        layer.update(*states(300, 0))
        old = [weakref.ref(room) for room in layer._rooms.values()]
        layer = kind.joined([Piece(layer, 1, 4, 300)])
        gc.collect()
        assert len(old) == len(kind.parts)
        assert all(reference() is None for reference in old)


class TestCodes:
    def test_are_those_of_plain_rounding(self) -> None:
        generator = torch.Generator().manual_seed(1)
        states = torch.randn(2, 3, 20, 32, generator=generator)
        states *= torch.randn(2, 3, 20, 1, generator=generator).exp()
        codes, scales = quantize_states(states)
        assert codes.dtype == torch.int8
        assert codes.abs().amax(-1).unique().tolist() == [127]
        torch.testing.assert_close(scales, states.abs().amax(-1, keepdim=True) / 127)
        # up to a tie that falls otherwise in float32
        errors = (dequantize_states(codes, scales, torch.float32) - plainly_rounded(states)).abs()
        assert float((errors / scales).max()) < 1.001
        assert float((errors / scales > 0.01).float().mean()) < 0.001
        assert torch.equal(quantize_states(states[1:, :, 7:8])[0], codes[1:, :, 7:8])
        half = states.bfloat16()
        assert torch.equal(quantize_states(half)[0], quantize_states(half.float())[0])
        assert dequantize_states(*quantize_states(half), torch.bfloat16).dtype == torch.bfloat16

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_of_what_is_no_number_are_none(self, bad: float) -> None:
        states = torch.ones(1, 1, 3, 16)
        states[0, 0, 1, 5] = bad
        states[0, 0, 2] = 0
        again = dequantize_states(*quantize_states(states), torch.float32)[0, 0]
        assert again[0].eq(1).all()
        assert again[1].isnan().all()
        assert again[2].eq(0).all()


class PlainlyRoundedLayer(DynamicLayer):
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        states: tuple[Tensor, Tensor] = super().update(
            plainly_rounded(key_states), plainly_rounded(value_states)
        )
        return states


@torch.no_grad()
def plain_run(subject: Subject, tokens: list[int]) -> tuple[Tensor, Tensor]:
    """Logits `[passes, vocabulary]` of a prompt and single tokens after it, and the states
    `[2, layers, heads, tokens, D]`: plain `transformers` in float32, but for its cache."""
    cache = DynamicCache()
    cache.layers = [PlainlyRoundedLayer() for _ in range(subject.num_layers)]
    pieces = torch.tensor([tokens]).split([PROMPT_LENGTH, *[1] * (len(tokens) - PROMPT_LENGTH)], 1)
    logits = [subject.exact(piece, past_key_values=cache).logits[0, -1] for piece in pieces]
    keys = torch.cat([layer.keys for layer in cache.layers])
    values = torch.cat([layer.values for layer in cache.layers])
    return torch.stack(logits), torch.stack([keys, values])


def engine_on(kind: str, subject: Subject, bits: int = 8) -> CpuEngine | TorchEngine:
    return subject.reference(bits) if kind == "torch" else subject.engine(kv_bits=bits)


def check_errors(errors: Tensor, tolerance: float) -> None:
    assert float(errors.mean()) < tolerance
    assert float(errors.max()) < 3 * tolerance


class TestEnginesWithEightBits:
    @some_cases
    @both_engines
    def test_attend_to_rounded_keys_and_values(self, kind: str, case: str) -> None:
        subject, tokens = subject_of(case), random_tokens(30, seed=21)
        expected, states = plain_run(subject, tokens)
        engine = engine_on(kind, subject)
        logits, _ = decode_along(engine, tokens, PROMPT_LENGTH)
        check_errors(relative_errors(logits, expected), TOLERANCES[kind])
        written = cached_states(engine, engine.sequences()[0])
        errors = relative_errors(written.flatten(2), states.flatten(2))
        check_errors(errors, STATE_TOLERANCES[kind])
        exact, _ = decode_along(engine_on(kind, subject, bits=16), tokens, PROMPT_LENGTH)
        assert float(relative_errors(logits, exact).mean()) > 0.004  # something is rounded

    @some_cases
    def test_agree(self, case: str) -> None:
        subject, tokens = subject_of(case), random_tokens(24, seed=23)
        runs = [
            decode_along(engine_on(kind, subject), tokens, PROMPT_LENGTH, ExitPolicy.fixed(2))
            for kind in ("cpu", "torch")
        ]
        check_errors(relative_errors(runs[0][0], runs[1][0]), TOLERANCES["cpu"])
        assert torch.equal(runs[0][1], runs[1][1])

    @both_engines
    def test_say_so_and_hold_less(self, kind: str) -> None:
        subject = subject_of("qwen3")  # heads of 32 dims
        held = []
        for bits in (16, 8):
            engine = engine_on(kind, subject, bits)
            assert engine.kv_bits == bits
            assert ("KV cache 8 bits" in engine.setting) == (bits == 8)
            (sequence,) = begin(engine)
            append(engine, {sequence: random_tokens(64, seed=25)})
            held.append(sum(part.nbytes for part in engine.read_cache(sequence, 64).values()))
        element = 2 if kind == "cpu" else 4
        assert held[1] / held[0] == (32 + 4) / (32 * element)
        assert position_bytes(2, 32, element, 8) / position_bytes(2, 32, element) == (
            held[1] / held[0]
        )


@pytest.mark.parametrize("bits", [0, 4, 7, 32, -8])
def test_other_widths_are_refused(bits: int) -> None:
    message = f"the KV cache has {bits} bits; choose 16"
    subject = subject_of("llama")
    for kind in ("cpu", "torch"):
        with pytest.raises(ConfigError, match=message):
            engine_on(kind, subject, bits)
    with pytest.raises(ValueError, match="a KV cache has 16 or 8 bits"):
        empty_core(kv_bits=bits)

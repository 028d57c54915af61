"""The torch engine's KV cache: saved and written back, after errors, and how it is held."""

from __future__ import annotations

import math

import pytest
import torch
from steps import append
from torch_engines import CLOSE, both_widths, engine_of, tokens_of

from river_llm import ContextFullError, ExitPolicy, RiverError


def interrupt(*args: object) -> None:
    raise KeyboardInterrupt


class TestCacheAccess:
    @both_widths
    @pytest.mark.parametrize("length", [1, 17, 40])
    def test_gives_what_it_takes(self, kv_bits: int, length: int) -> None:
        engine, other = engine_of(kv_bits=kv_bits), engine_of(kv_bits=kv_bits)
        long, short = engine.add_sequence(), engine.add_sequence()
        append(engine, {short: tokens_of(40, 1), long: tokens_of(60)})
        tensors = engine.read_cache(short, length)
        taker = other.add_sequence()
        append(other, {taker: tokens_of(9), other.add_sequence(): tokens_of(20)})
        other.write_cache(taker, tensors, length)
        tensors = {name: part.zero_() for name, part in tensors.items()}  # they were copied
        assert other.length(taker) == length
        engine.truncate(short, length)
        for _ in range(3):
            found, expected = append(other, {taker: [9, 8]}), append(engine, {short: [9, 8]})
            torch.testing.assert_close(found.logits, expected.logits, **CLOSE[kv_bits])

    @both_widths
    def test_refuses_what_is_of_another_form(self, kv_bits: int) -> None:
        engine, other = engine_of(kv_bits=kv_bits), engine_of(kv_bits=24 - kv_bits)
        for one in (engine, other):
            append(one, {one.add_sequence(): tokens_of(30)})
        good = engine.read_cache(0, 30)
        name = next(iter(good))
        wrong = [
            {},
            {**good, "more": good[name]},
            {key: part for key, part in good.items() if key != name},
            {**good, name: good[name][..., :-1, :]},
            other.read_cache(0, 30),
        ]
        for tensors in wrong:
            with pytest.raises(RiverError, match="no KV cache of the torch engine"):
                engine.write_cache(0, tensors, 30)
            assert engine.length(0) == 0
            engine.write_cache(0, good, 30)
        with pytest.raises(ContextFullError, match="don't fit"):
            engine.write_cache(0, good, 129)
        for length in (0, 31):
            with pytest.raises(RiverError, match=f"has no {length} tokens"):
                engine.read_cache(0, length)
        assert engine.length(0) == 30

    def test_identity_names_what_decides(self) -> None:
        base = engine_of().cache_identity([5, 6])
        assert base == engine_of().cache_identity([6, 5, 5])
        assert engine_of(kv_bits=8).cache_identity([5, 6]) != base
        other = engine_of()
        other.model.model.layers[3].mlp.up_proj.weight.data[0, 0] += 1
        assert other.cache_identity([5, 6])["model"] != base["model"]
        other = engine_of()
        other.model.get_input_embeddings().weight.data[7] += 1
        assert other.cache_identity([5, 6]) == base
        assert other.cache_identity([5, 7]) != engine_of().cache_identity([5, 7])
        limited = engine_of()
        limited.depth_limit = 2
        assert limited.cache_identity([5, 6])["depth limit"] == "2"


def test_steady_decoding_copies_no_keys() -> None:
    engine = engine_of()
    sequences = [engine.add_sequence() for _ in range(3)]
    append(engine, {s: tokens_of(3 + s) for s in sequences})
    append(engine, {s: [5] for s in sequences})
    batch, _ = engine._cache.aligned(sequences)
    places = [layer.keys.data_ptr() for layer in batch.cache.layers]
    for step in range(20):
        some = sequences[: 2 + step % 2]  # as where one has ended its draft
        append(engine, {s: [6] for s in some})
        for s in some:
            engine.truncate(s, 4 + s)
    assert [layer.keys.data_ptr() for layer in batch.cache.layers] == places


@both_widths
@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("filled", [0, 5])
def test_an_error_in_a_pass_leaves_the_cache_as_it_was(
    layer: int, filled: int, kv_bits: int
) -> None:
    engine = engine_of(kv_bits=kv_bits)
    a, b = engine.add_sequence(), engine.add_sequence()
    if filled:
        append(engine, {a: tokens_of(filled), b: tokens_of(filled + 2)})
    rest = {a: tokens_of(3, 1), b: tokens_of(40, 2)}  # in two passes
    part = engine.model.model.layers[layer].self_attn.o_proj
    for after in (0, 1):  # whole passes
        left = iter([None] * after)
        handle = part.register_forward_hook(
            lambda *call, left=left: None if next(left, 1) is None else interrupt()
        )
        with pytest.raises(KeyboardInterrupt):
            append(engine, rest)
        handle.remove()
        assert engine.length(a) == filled
        assert engine.length(b) == filled + 2 * (filled > 0)
    found = append(engine, rest)
    other = engine_of(kv_bits=kv_bits)
    for _ in range(2):
        other.add_sequence()
    if filled:
        append(other, {a: tokens_of(filled), b: tokens_of(filled + 2)})
    torch.testing.assert_close(found.logits, append(other, rest).logits, **CLOSE[16])


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_no_cache_slot_is_unwritten(attention: str) -> None:
    """Memory that holds NaN before it is written gives the same."""
    engine = engine_of()
    engine.model.set_attn_implementation(attention)
    new_empty = torch.Tensor.new_empty
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            torch.Tensor,
            "new_empty",
            lambda self, *shape, **kw: new_empty(self, *shape, **kw).fill_(
                math.nan if self.is_floating_point() else 0
            ),
        )
        a, b = engine.add_sequence(), engine.add_sequence()
        for rows in ({a: 5, b: 1}, {b: 3}, {a: 1, b: 2}, {a: 20, b: 18}, {a: 1, b: 1}):
            thresholds = torch.tensor(
                [ExitPolicy.fixed(row % 5).thresholds(4) for row in range(sum(rows.values()))]
            )
            texts = {s: tokens_of(n, s) for s, n in rows.items()}
            assert append(engine, texts, thresholds).logits.isfinite().all()
            engine.truncate(b, engine.length(b) - 1)

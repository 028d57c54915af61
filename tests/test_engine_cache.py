"""What the engines' caches give and take, `read_cache` and `write_cache`."""

from __future__ import annotations

import pytest
import torch
from lossless_lm import both_engines
from native_engines import cached_states, random_tokens
from prompt_caches import lm_with

from river_llm import RiverError

both_widths = pytest.mark.parametrize("kv_bits", [16, 8])


class TestEngines:
    @both_engines
    @both_widths
    @pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
    def test_write_what_they_have_read(self, kind: str, kv_bits: int, length: int) -> None:
        engine = lm_with(kind, kv_bits=kv_bits).engine
        engine.prefill(random_tokens(1, 140, 3))
        expected = cached_states(engine)[..., :length, :].clone()
        tensors = {name: part.clone() for name, part in engine.read_cache(length).items()}
        assert torch.equal(cached_states(engine)[..., :length, :], expected)
        other = lm_with(kind, kv_bits=kv_bits).engine
        other.prefill(random_tokens(3, 200, 4))
        other.write_cache(tensors, length)
        assert other.length == length
        assert torch.equal(cached_states(other), expected)
        engine.truncate(length)
        token = torch.tensor([9])
        for _ in range(3):  # and both go on alike
            ours, theirs = other.decode(token), engine.decode(token)
            assert torch.equal(ours.logits, theirs.logits)
            token = theirs.best_tokens
        other.rewind([3])
        assert torch.equal(cached_states(other), expected)

    @both_engines
    @both_widths
    def test_refuse_what_is_none_of_theirs(self, kind: str, kv_bits: int) -> None:
        engine = lm_with(kind, kv_bits=kv_bits).engine
        engine.prefill(random_tokens(1, 70, 3))
        good = {name: part.clone() for name, part in engine.read_cache(70).items()}
        name = next(iter(good))
        wrong: list[tuple[dict[str, torch.Tensor], int]] = [
            ({}, 70),
            ({**good, "more": good[name]}, 70),
            ({key: part for key, part in good.items() if key != name}, 70),
            ({**good, name: good[name][..., :-1, :] if kind == "torch" else good[name][:-1]}, 70),
            (good, 129),
            (good, 64),
        ]
        of_other_width = lm_with(kind, kv_bits=24 - kv_bits).engine
        of_other_width.prefill(random_tokens(1, 70, 3))
        wrong.append((of_other_width.read_cache(70), 70))
        if kind == "cpu":
            wrong += [({**good, name: good[name].float()}, 70), (good, -1)]
        for tensors, length in wrong:
            with pytest.raises(RiverError, match=r"KV cache|page"):
                engine.write_cache(tensors, length)
            assert engine.length == 0
            engine.prefill(random_tokens(1, 70, 3))
        with pytest.raises(RiverError, match="don't fit the model's context of 512"):
            engine.write_cache(good, 513)
        assert engine.length == 70
        engine.write_cache(good, 70)
        engine.decode(torch.tensor([5]))
        for length in (0, 72):
            with pytest.raises(RiverError, match=f"no single sequence of {length} tokens"):
                engine.read_cache(length)

"""The KV cache in 8 bits, on both engines, against keys and values that are rounded one by one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import run
from native_engines import (
    CASES,
    KERNELS,
    Subject,
    cached_states,
    decode_along,
    random_tokens,
    relative_errors,
    subject_of,
)
from stored_models import save_model, start
from tiny_core import empty_core
from tiny_lm import character_tokenizer, sharpened
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from river_llm import ConfigError, DraftConfig, ExitPolicy, River, RiverLM
from river_llm.engines import Engine, check_engine_options
from river_llm.engines.kv_cache import dequantize_states, position_bytes, quantize_states
from river_llm.engines.native_core import MOST_DIMS_OF_CODES

# full attention, windows, grouped queries, wide heads, norms of the keys, angles that change
SOME_CASES = [
    "llama",
    "mistral, window",
    "qwen3",
    "olmo2",
    "phi3, longrope",
    "phi3, partial rotary",
    "gemma3_text",
    "ministral3, query scales",
]
some_cases = pytest.mark.parametrize("case", SOME_CASES)
both_engines = pytest.mark.parametrize("kind", ["cpu", "torch"])
PROMPT_LENGTH = 12

# Relative L2 of logits and states, the mean over the rows of a test; any row may reach three
# times that. The native engine rounds to bfloat16 too, which may push a key or value to the next
# code; in float32 only a tie may fall otherwise. Without rounding, logits would differ by 0.004 to
# 0.012.
TOLERANCES = {"cpu": 0.016, "torch": 0.001}
STATE_TOLERANCES = {"cpu": 0.02, "torch": 0.002}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a tiny model."""
    return save_model(tmp_path_factory.mktemp("kv_bits"))


def plainly_rounded(states: Tensor) -> Tensor:
    """Keys or values `[..., D]` by codes of 8 bits, one after the other."""
    vectors = states.double().reshape(-1, states.shape[-1]).tolist()
    rounded = []
    for vector in vectors:
        scale = max(abs(x) for x in vector) / 127
        rounded.append([round(x / scale) * scale for x in vector])
    return torch.tensor(rounded, dtype=states.dtype).view(states.shape)


class PlainlyRoundedLayer(DynamicLayer):
    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        states: tuple[Tensor, Tensor] = super().update(
            plainly_rounded(key_states), plainly_rounded(value_states)
        )
        return states


@torch.no_grad()
def plain_run(subject: Subject, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits `[passes, batch, vocabulary]` of a prompt and single tokens after it, and the states
    `[2, layers, batch, heads, tokens, D]`: plain `transformers` in float32, but for its cache."""
    cache = DynamicCache()
    cache.layers = [PlainlyRoundedLayer() for _ in range(subject.num_layers)]
    pieces = tokens.split([PROMPT_LENGTH, *[1] * (tokens.shape[1] - PROMPT_LENGTH)], 1)
    logits = [subject.exact(piece, past_key_values=cache).logits[:, -1] for piece in pieces]
    keys = torch.stack([layer.keys for layer in cache.layers])
    values = torch.stack([layer.values for layer in cache.layers])
    return torch.stack(logits), torch.stack([keys, values])


def engine_on(kind: str, subject: Subject, policy: ExitPolicy | None = None, bits: int = 8) -> Any:
    return (
        subject.reference(policy, bits) if kind == "torch" else subject.engine(policy, kv_bits=bits)
    )


def check_errors(errors: Tensor, tolerance: float) -> None:
    assert float(errors.mean()) < tolerance
    assert float(errors.max()) < 3 * tolerance


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

    def test_of_bfloat16_are_those_of_its_values(self) -> None:
        states = torch.randn(1, 2, 9, 16, generator=torch.Generator().manual_seed(2))
        states = states.bfloat16()
        codes, scales = quantize_states(states)
        assert torch.equal(codes, quantize_states(states.float())[0])
        assert dequantize_states(codes, scales, torch.bfloat16).dtype == torch.bfloat16

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
    def test_of_what_is_no_number_are_none(self, bad: float) -> None:
        states = torch.ones(1, 1, 3, 16)
        states[0, 0, 1, 5] = bad
        states[0, 0, 2] = 0
        again = dequantize_states(*quantize_states(states), torch.float32)[0, 0]
        assert again[0].eq(1).all()
        assert again[1].isnan().all()
        assert again[2].eq(0).all()


class TestEngines:
    @some_cases
    @both_engines
    def test_attend_to_rounded_keys_and_values(self, kind: str, case: str) -> None:
        subject = subject_of(case)
        tokens = random_tokens(2, 30, seed=21)
        expected, states = plain_run(subject, tokens)
        engine = engine_on(kind, subject)
        logits, _ = decode_along(engine, tokens, PROMPT_LENGTH)
        check_errors(relative_errors(logits, expected), TOLERANCES[kind])
        for sequence in range(2):
            written = cached_states(engine, sequence)
            errors = relative_errors(written.flatten(2), states[:, :, sequence].flatten(2))
            check_errors(errors, STATE_TOLERANCES[kind])
        exact, _ = decode_along(engine_on(kind, subject, bits=16), tokens, PROMPT_LENGTH)
        assert float(relative_errors(logits, exact).mean()) > 0.004  # something is rounded

    @pytest.mark.parametrize("kernels", KERNELS)
    def test_write_the_nearest_codes(self, kernels: str) -> None:
        """In the first layer, which both caches find the same hidden states."""
        subject, tokens = subject_of("llama"), random_tokens(1, 70, seed=22)
        first = []
        for bits in (16, 8):
            engine = subject.engine(kernels=kernels, kv_bits=bits)
            engine.prefill(tokens)
            first.append(cached_states(engine)[:, 0])
        exact, rounded = first
        scales = exact.abs().amax(-1, keepdim=True) / 127
        errors = (rounded - exact).abs() / scales
        assert float((errors - 127 * 2**-8).max()) < 0.51  # bfloat16 rounds the largest by so much
        assert float(errors.mean()) > 0.2  # a quarter, and what bfloat16 rounds

    @some_cases
    def test_agree(self, case: str) -> None:
        subject, tokens = subject_of(case), random_tokens(2, 24, seed=23)
        policy = ExitPolicy.fixed(2)
        runs = [
            decode_along(engine_on(kind, subject, policy), tokens, PROMPT_LENGTH)
            for kind in ("cpu", "torch")
        ]
        check_errors(relative_errors(runs[0][0], runs[1][0]), TOLERANCES["cpu"])
        assert torch.equal(runs[0][1], runs[1][1])

    @both_engines
    def test_sequences_of_different_length_are_those_alone(self, kind: str) -> None:
        """Also after each forgot another number of tokens."""
        subject, tokens = subject_of("mistral, window"), random_tokens(2, 40, seed=24)
        together, alone = engine_on(kind, subject), engine_on(kind, subject)
        together.prefill(tokens[:, :20])
        together.verify(tokens[:, 20:27])
        together.rewind([5, 1])
        after = together.verify(tokens[:, 30:34]).logits
        for row, kept in ((0, 22), (1, 26)):
            alone.truncate(0)
            alone.prefill(tokens[row : row + 1, :20])
            alone.verify(tokens[row : row + 1, 20:kept])
            expected = alone.verify(tokens[row : row + 1, 30:34]).logits[0]
            if kind == "cpu":
                assert torch.equal(after[row], expected)
            else:
                # products of two rows may round otherwise, and a code at a tie is another one then
                torch.testing.assert_close(after[row], expected, rtol=0.01, atol=2e-3)

    @both_engines
    def test_say_so(self, kind: str) -> None:
        subject = subject_of("llama")
        for bits in (16, 8):
            engine: Engine = engine_on(kind, subject, bits=bits)
            assert engine.kv_bits == bits
            assert ("KV cache 8 bits" in engine.setting) == (bits == 8)


class TestLossless:
    PROMPTS = ("y", "abcabcabcabc")
    DRAFTS = (DraftConfig(tokens=3, exit_layer=0), DraftConfig(tokens=5, exit_layer=1))

    @pytest.mark.parametrize(
        ("kind", "case"),
        [
            ("cpu", "llama"),
            ("cpu", "mistral, window"),
            ("cpu", "gemma3_text"),
            ("cpu", "phi3, longrope"),
            ("torch", "mistral, window"),
        ],
    )
    def test_has_the_tokens_of_plain_decoding(self, kind: str, case: str) -> None:
        architecture, settings = CASES[case]
        subject = Subject(architecture, {**settings, "max_position_embeddings": 64})
        sharpened(subject.model)
        engine = engine_on(kind, subject, ExitPolicy.never())
        lm = RiverLM(engine, character_tokenizer(), subject.river.config)
        for sampling in ({}, {"temperature": 1.0, "seed": 3}):
            options: dict[str, Any] = {"raw": True, "max_new_tokens": 24, **sampling}
            plain = [lm.generate(prompt, **options).tokens for prompt in self.PROMPTS]
            batch = [r.tokens for r in lm.generate_batch(list(self.PROMPTS), **options)]
            for drafts in self.DRAFTS:
                options |= {"mode": "lossless", "drafts": drafts}
                found = [lm.generate(prompt, **options).tokens for prompt in self.PROMPTS]
                assert found == plain
                rows = lm.generate_batch(list(self.PROMPTS), **options)
                assert [row.tokens for row in rows] == batch


class TestBytes:
    @pytest.mark.parametrize("case", ["llama", "qwen3", "gemma3_text"])
    def test_of_a_step_are_codes_and_scales(self, case: str) -> None:
        subject = subject_of(case)
        config = subject.model.config
        heads, dims = config.num_key_value_heads, subject.engine().model.shape["head_dim"]
        windows = [parts["window"] for parts in subject.engine().model.layers]
        for bits, state_bytes in ((16, 2 * dims), (8, dims + 4)):
            engine = subject.engine(kv_bits=bits)
            assert engine._core.position_bytes == position_bytes(heads, dims, 2, bits)
            seen = sum(min(20, window or 20) for window in windows)
            cache = engine.step_bytes(4, 20) - engine.step_bytes(4, 0)
            assert cache == seen * 2 * heads * state_bytes

    def test_that_the_torch_engine_holds_are_fewer(self) -> None:
        subject, held = subject_of("qwen3"), {}  # heads of 32 dims
        for bits in (16, 8):
            engine = subject.reference(kv_bits=bits)
            engine.prefill(random_tokens(1, 50, seed=25))
            layers = engine._cache.layers
            parts = [getattr(layer, name) for layer in layers for name in layer.parts]
            held[bits] = sum(part.nbytes for part in parts)
        assert held[8] / held[16] == (32 + 4) / (4 * 32)


class TestLoading:
    def test_packed_weights_serve_either_width(
        self, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RIVER_LLM_CACHE", str(tmp_path))
        first = start(model, kv_bits=8)
        packed = set(tmp_path.rglob("weights.bin"))
        assert len(packed) == 1

        def load(*args: object) -> None:
            raise AssertionError("the model is loaded again")

        monkeypatch.setattr("river_llm.pretrained.load_backbone", load)
        for bits in (8, 16):
            lm = start(model, kv_bits=bits)
            assert lm.engine.kv_bits == bits
            assert set(tmp_path.rglob("weights.bin")) == packed
            if bits == 8:
                options: dict[str, Any] = {"raw": True, "max_new_tokens": 8}
                assert (
                    lm.generate("abc", **options).tokens == first.generate("abc", **options).tokens
                )

    @both_engines
    def test_the_width_reaches_the_engine(
        self, model: Path, kind: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RIVER_LLM_CACHE", "off")
        lm = start(model, kv_bits=8, engine=kind)
        assert lm.engine.name == kind
        assert lm.engine.kv_bits == 8


class TestCommandLine:
    NOTE = "river-llm: the KV cache is in 8 bits: the answers are not exactly the model's"

    @both_engines
    def test_generate_says_so(self, model: Path, kind: str) -> None:
        command = ("generate", "abc", "-m", model, "--engine", kind, "-n", 4, "--json")
        outcome = run(*command, "--kv-bits", 8)
        assert outcome.exit_code == 0
        assert outcome.stderr.splitlines() == [self.NOTE]
        assert len(outcome.json["tokens"]) == 4
        assert run(*command, "--kv-bits", 16).stderr == ""
        run(*command, "--kv-bits", 4).check_fails(2, "--kv-bits")

    def test_check_exact_holds_lossless_mode_against_the_same_cache(
        self, model: Path, tmp_path: Path
    ) -> None:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("abc\nWho are you?\n")
        options = ("--prompts", prompts, "-n", 20, "--json", "--kv-bits", 8)
        output = run("check-exact", model, *options).json
        assert (output["kv_bits"], output["prompts"], output["differences"]) == (8, 2, [])


class TestErrors:
    @pytest.mark.parametrize("bits", [0, 4, 7, 32, -8])
    def test_other_widths_are_refused(self, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
        message = f"the KV cache has {bits} bits; choose 16"
        for choice in ("auto", "cpu", "torch"):
            with pytest.raises(ConfigError, match=message):
                check_engine_options(choice, 16, 16, bits)  # type: ignore[arg-type]

        def load(*args: object) -> None:
            raise AssertionError("a model is loaded")

        monkeypatch.setattr("river_llm.pretrained.load_backbone", load)
        with pytest.raises(ConfigError, match=message):
            RiverLM.from_pretrained("absent", kv_bits=bits)
        subject = subject_of("llama")
        with pytest.raises(ConfigError, match=message):
            subject.engine(kv_bits=bits)
        with pytest.raises(ConfigError, match=message):
            subject.reference(kv_bits=bits)
        with pytest.raises(ValueError, match="a KV cache has 16 or 8 bits"):
            empty_core(kv_bits=bits)


class TestHeadsTooWideForExactSums:
    REFUSED = (
        "the native engine takes heads of 512 dims at most in a KV cache of 8 bits, not 544; take "
        "--engine torch"
    )

    @pytest.fixture(scope="class")
    def wide(self, tmp_path_factory: pytest.TempPathFactory) -> Path:
        """The directory of a model with heads of 544 dims."""
        return save_model(tmp_path_factory.mktemp("wide"), head_dim=544, num_hidden_layers=1)

    def test_are_those_that_the_core_refuses(self) -> None:
        assert empty_core(head_dim=MOST_DIMS_OF_CODES, num_heads=2, kv_bits=8)
        with pytest.raises(ValueError, match=f"takes heads of {MOST_DIMS_OF_CODES} dims at most"):
            empty_core(head_dim=MOST_DIMS_OF_CODES + 16, num_heads=2, kv_bits=8)

    def test_are_run_by_pytorch(
        self, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where a packed copy is there, which stays."""
        monkeypatch.setenv("RIVER_LLM_CACHE", str(tmp_path))
        for _ in range(2):
            lm = start(wide, kv_bits=8)
            assert (lm.engine.name, lm.engine.kv_bits) == ("torch", 8)
            assert lm.fallback_reason == self.REFUSED.removesuffix("; take --engine torch")
            assert len(lm.generate("abc", raw=True, max_new_tokens=4).tokens) == 4
            assert start(wide).engine.name == "cpu"
            assert len(list(tmp_path.rglob("weights.bin"))) == 1

    def test_are_refused_before_a_river_is_built(
        self, wide: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also where a packed copy is there."""
        monkeypatch.setenv("RIVER_LLM_CACHE", str(tmp_path))
        start(wide)
        monkeypatch.setattr(River, "build", lambda *_: pytest.fail("a river is built"))
        on_cpu = ("--engine", "cpu", "--kv-bits", 8)
        for command in (
            ("generate", "abc", "-m", wide, *on_cpu),
            ("bench", "-m", wide, *on_cpu),
            ("bench", "-m", wide, "--memory", "--kv-bits", 8),
        ):
            run(*command).check_fails(1, self.REFUSED)

"""GPTQ: against the algorithm written plainly, and rivers that are calibrated on text."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from command_line import run
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_lm import character_tokenizer
from tiny_models import ARCHITECTURES, VOCABULARY, fake_quantised, mixed_bits, tiny_model
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedModel

from river_llm import River, RiverConfig, attach_river
from river_llm.errors import ConfigError, LogitsError, RiverError
from river_llm.load.calibration_text import NUM_SEQUENCES, given_text, written_text
from river_llm.river.gptq import gptq
from river_llm.river.quantize import quantize

pytest_plugins = ["cli_models"]

GPTQ = RiverConfig(bits=3, group_size=32, quantizer="gptq")
RTN = RiverConfig(bits=3, group_size=32, quantizer="rtn")


def inputs(columns: int, seed: int = 0) -> Tensor:
    """Correlated inputs `[tokens, columns]`, as layers have them: fewer directions than columns."""
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(columns // 4, columns, generator=generator)
    tokens = torch.randn(200, columns // 4, generator=generator) @ directions
    return tokens + 0.3 * torch.randn(200, columns, generator=generator)


def weights(rows: int, columns: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed + 1)) / 8


def plainly(weight: Tensor, hessian: Tensor, scales: Tensor, zeros: Tensor, bits: int) -> Tensor:
    """The codes by optimal brain surgery: columns are rounded, compensated for and left out of the
    inverse one by one, in float64."""
    weight, hessian = weight.double().clone(), hessian.double()
    damping = 0.01 * hessian.diagonal().mean()
    inverse = torch.linalg.inv(hessian + damping * torch.eye(len(hessian)))
    codes = torch.empty(weight.shape, dtype=torch.uint8)
    group_size = weight.shape[1] // scales.shape[1]
    for j in range(weight.shape[1]):
        scale, zero = scales[:, j // group_size].double(), zeros[:, j // group_size].double()
        code = ((weight[:, j] - zero) / scale + 2 ** (bits - 1)).round().clamp(0, 2**bits - 1)
        codes[:, j] = code
        error = weight[:, j] - (code - 2 ** (bits - 1)) * scale - zero
        weight -= torch.outer(error / inverse[j, j], inverse[j])
        inverse -= torch.outer(inverse[:, j], inverse[j]) / inverse[j, j]
        inverse[j, :] = inverse[:, j] = 0
        inverse[j, j] = 1
    return codes


@pytest.mark.parametrize(("bits", "group_size"), [(2, 32), (4, 64), (8, 128)])
def test_codes_are_those_of_optimal_brain_surgery(bits: int, group_size: int) -> None:
    weight, x = weights(24, 256), inputs(256)
    matrix = gptq(weight, x.T @ x, bits, group_size)
    expected = plainly(weight, x.T @ x, matrix.scales.float(), matrix.zeros.float(), bits)
    assert (matrix.codes() == expected).float().mean() > 0.98  # float32 rounds a few otherwise
    assert matrix.is_consistent()
    assert matrix.shape == (24, 256)


@settings(deadline=None, max_examples=30)
@given(seed=st.integers(0, 10**6), bits=st.sampled_from([2, 3, 4, 5, 6]))
def test_products_on_the_calibration_inputs_lose_less_than_by_rounding(
    seed: int, bits: int
) -> None:
    weight, x = weights(16, 128, seed), inputs(128, seed)
    errors = [
        (x @ (matrix.dequantize() - weight).T).square().sum()
        for matrix in (
            gptq(weight, x.T @ x, bits, 32),
            quantize(weight, RiverConfig(bits, 32, "rtn")),
        )
    ]
    assert errors[0] < errors[1]


def test_an_input_that_is_never_there_costs_nothing() -> None:
    weight, x = weights(8, 64), inputs(64)
    x[:, [3, 40]] = 0
    matrix = gptq(weight, x.T @ x, 8, 32)
    assert torch.isfinite(matrix.dequantize()).all()
    assert (x @ (matrix.dequantize() - weight).T).abs().max() < 0.1


@pytest.mark.parametrize("place", ["weight", "inputs"])
def test_what_is_not_finite_is_refused(place: str) -> None:
    weight, x = weights(8, 64), inputs(64)
    (weight if place == "weight" else x)[1, 1] = torch.nan
    with pytest.raises(ConfigError, match="not finite"):
        gptq(weight, x.T @ x, 4, 32)


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_river_of_every_architecture_is_nearer_than_by_rounding(architecture: str) -> None:
    model = tiny_model(architecture, **ARCHITECTURES[architecture])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text = torch.randint(VOCABULARY, (20, 64), generator=torch.Generator().manual_seed(0))
    river = River.build(model, GPTQ, calibration=text)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())

    with torch.no_grad():
        expected = model(text).logits
        calibrated, rounded = (
            (fake_quantised(model, one)(text).logits - expected).square().mean()
            for one in (river, River.build(model, RTN))
        )
    assert calibrated < 0.8 * rounded


def test_matrices_that_share_inputs_share_bits(tiny_llama: PreTrainedModel) -> None:
    config, text = RiverConfig("auto", 32, "gptq"), torch.arange(64).view(4, 16)
    bits = mixed_bits(tiny_llama)
    shared = "gptq quantises self_attn.q_proj, self_attn.k_proj, self_attn.v_proj as one matrix"
    with pytest.raises(ConfigError, match=f"^model.layers.0.self_attn.q_proj: {shared}.*2, 3, 4$"):
        River.build(tiny_llama, config, calibration=text, bits=bits)
    for layer in bits:
        layer["self_attn.k_proj"] = layer["self_attn.v_proj"] = layer["self_attn.q_proj"]
        layer["mlp.up_proj"] = layer["mlp.gate_proj"]
    river = River.build(tiny_llama, config, calibration=text, bits=bits)
    assert bits == [
        {name: matrix.bits for name, matrix in layer.items()} for layer in river.exit_layers
    ]
    assert all(matrix.is_consistent() for layer in river.exit_layers for matrix in layer.values())


def test_inputs_that_are_too_much_alike_are_damped_more_or_refused() -> None:
    hessian = torch.eye(64)
    hessian[0, 1] = hessian[1, 0] = 1.05  # no sum of squares has that, but for rounding
    assert gptq(weights(4, 64), hessian.clone(), 4, 32).is_consistent()
    hessian[0, 1] = hessian[1, 0] = 50
    with pytest.raises(ConfigError, match="too much alike"):
        gptq(weights(4, 64), hessian, 4, 32)


def test_layers_are_as_they_were_when_one_fails(tiny_llama: PreTrainedModel) -> None:
    weight = tiny_llama.model.layers[2].mlp.up_proj.weight
    weight.data[0, 0] = torch.inf
    before = {name: value.clone() for name, value in tiny_llama.state_dict().items()}
    text = torch.zeros(4, 16, dtype=torch.long)
    with pytest.raises(ConfigError, match=r"^model\.layers\.2\.mlp\.gate_proj: .*not finite"):
        River.build(tiny_llama, GPTQ, calibration=text)
    for name, value in tiny_llama.state_dict().items():
        assert torch.equal(value, before[name])
    assert "forward" not in vars(tiny_llama.model.layers[0])


def test_a_forward_that_hooks_have_replaced_stays(tiny_llama: PreTrainedModel) -> None:
    layer = tiny_llama.model.layers[1]
    layer.forward = hooked = layer.forward
    River.build(tiny_llama, GPTQ, calibration=torch.arange(64).view(4, 16))
    assert layer.forward is hooked


def test_gptq_without_text_says_what_it_needs(tiny_llama: PreTrainedModel) -> None:
    with pytest.raises(RiverError, match="gptq needs calibration text"):
        attach_river(tiny_llama, GPTQ)
    with pytest.raises(ConfigError, match="gptq needs a layer's inputs"):
        quantize(weights(4, 64), GPTQ)


class TestText:
    def test_written_is_the_models_own(self, tiny_llama: PreTrainedModel) -> None:
        tiny_llama.lm_head.weight.data.mul_(20)
        tokenizer = character_tokenizer()
        steps: list[tuple[int, int]] = []
        text = written_text(tiny_llama, tokenizer, lambda *step: steps.append(step))
        assert text.shape == (NUM_SEQUENCES, 64)  # its context
        assert steps[-1] == (64, 64)
        assert torch.equal(text, written_text(tiny_llama, tokenizer))
        assert not torch.equal(text, written_text(tiny_llama, tokenizer, seed=1))
        with torch.no_grad():
            own, other = (
                torch.nn.functional.cross_entropy(
                    tiny_llama(one[:, :-1]).logits.flatten(0, 1), one[:, 1:].flatten()
                )
                for one in (text, torch.randint(VOCABULARY, text.shape))
            )
        assert own < other - 1

    def test_written_by_a_broken_model_is_refused(self, tiny_llama: PreTrainedModel) -> None:
        tiny_llama.lm_head.weight.data[5] = torch.nan
        with pytest.raises(LogitsError):
            written_text(tiny_llama, character_tokenizer())

    def test_begins_as_the_tokenizer_begins_a_text(self, tiny_llama: PreTrainedModel) -> None:
        tokenizer = character_tokenizer()
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single="! $A <end>", special_tokens=[("!", 0), ("<end>", tokenizer.eos_token_id)]
        )
        text = given_text("b" * 64 * 40, tiny_llama, tokenizer)
        assert set(text[:, 0].tolist()) == {0}
        assert not bool((text == tokenizer.eos_token_id).any())

    def test_given_is_from_all_over_it(self, tiny_llama: PreTrainedModel) -> None:
        tokenizer = character_tokenizer()
        given = "a" * 64 + "b" * 64 * 98 + "c" * 64
        text = given_text(given, tiny_llama, tokenizer)
        assert text.shape == (NUM_SEQUENCES, 64)
        firsts = tokenizer.decode(text[:, 0]).replace(" ", "")
        assert firsts == "a" + "b" * (NUM_SEQUENCES - 2) + "c"

    def test_too_short_a_text_is_refused(self, tiny_llama: PreTrainedModel) -> None:
        with pytest.raises(ConfigError, match="has 9 tokens; give one of 6144"):
            given_text("too short", tiny_llama, character_tokenizer())


class TestCommandLine:
    def test_builds_with_a_file_and_without(self, model: str, tmp_path: Path) -> None:
        text = tmp_path / "text"
        text.write_text("The Loire is a river. " * 4000)
        settings = ("--quantizer", "gptq", "--group-size", 32)
        rivers = []
        for name, options in (("own", ()), ("again", ()), ("file", ("--calibrate", text))):
            outcome = run("build", model, "-o", tmp_path / name, *settings, *options)
            assert outcome.exit_code == 0, outcome.stderr
            origin = "text" if options else "the model's own text"
            assert f"(gptq: {origin})" in outcome.stderr
            rivers.append(River.load(tmp_path / name))
        packed = [river.exit_layers[0]["mlp.up_proj"].packed for river in rivers]
        assert torch.equal(packed[0], packed[1])
        assert not torch.equal(packed[0], packed[2])

    @pytest.mark.parametrize(
        ("content", "options", "code", "message"),
        [
            (b"text", ("--quantizer", "hqq"), 2, "--calibrate goes with --quantizer gptq"),
            (b"text", (), 1, "the calibration text has 1 tokens"),
            (b"\xff\xfe", (), 2, "is no UTF-8 text"),
            (None, (), 2, "can't be read as text"),
        ],
    )
    def test_refuses_a_bad_text(
        self,
        content: bytes | None,
        options: tuple[str, ...],
        code: int,
        message: str,
        model: str,
        tmp_path: Path,
    ) -> None:
        text = tmp_path / "text"
        if content is not None:
            text.write_bytes(content)
        outcome = run("build", model, "-o", tmp_path / "r", "--calibrate", text, *options)
        outcome.check_fails(code, message)
        assert not (tmp_path / "r").exists()


@pytest.mark.slow
def test_smollm2_loses_a_third_of_hqqs_divergence() -> None:
    from river_llm.load.model import load_backbone

    model, tokenizer = load_backbone("smollm2", torch.float32)
    text = written_text(model, tokenizer, seed=1)[:8]  # on none of these was it calibrated
    calibration = written_text(model, tokenizer)
    with torch.no_grad():
        expected = model(text).logits.log_softmax(-1)
        calibrated, plain = (
            (
                expected.exp()
                * (expected - fake_quantised(model, river)(text).logits.log_softmax(-1))
            )
            .sum(-1)
            .mean()
            for river in (
                River.build(model, RiverConfig(quantizer="gptq"), calibration=calibration),
                River.build(model),
            )
        )
    assert calibrated < 0.5 * plain

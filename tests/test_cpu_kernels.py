"""Instruction sets held against float32 and against portable C++: odd shapes, codes of every width,
narrow backbones and LM heads."""

from __future__ import annotations

import copy
from functools import cache
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from native_engines import (
    BACKBONE_TOLERANCE,
    KERNELS,
    RIVER_TOLERANCE,
    Subject,
    check_logits,
    every_kernel_set,
    random_tokens,
    relative_errors,
    subject_of,
)
from steps import append, begin, cached_states
from tiny_models import fake_quantised, tiny_model
from torch import Tensor

from river_llm import ExitPolicy, River, RiverConfig
from river_llm.config import BITS, GROUP_SIZES
from river_llm.engines.cpu import CpuEngine
from river_llm.river.backbone import decoder_layers
from river_llm.river.quantize import quantize

RTN = RiverConfig(group_size=32, quantizer="rtn")
KERNEL_TOLERANCE = 0.003  # relative L2 of logits to portable C++, on average
NUM_TOKENS = 40  # more than any set computes at a time

SHAPES: dict[str, dict[str, Any]] = {
    "9 heads of 64": {
        "hidden_size": 576,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "intermediate_size": 160,
    },
    "one key-value head": {
        "hidden_size": 96,
        "num_attention_heads": 6,
        "num_key_value_heads": 1,
        "intermediate_size": 224,
    },
    "a key-value head for each query": {"num_key_value_heads": 4, "intermediate_size": 1056},
    "5 queries for each key": {
        "hidden_size": 160,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
    },
    "64 queries for each key": {
        "num_attention_heads": 64,
        "num_key_value_heads": 1,
        "head_dim": 16,
    },
    "heads of 80": {"hidden_size": 160, "num_attention_heads": 2, "head_dim": 80},
    "heads of 96": {"hidden_size": 192, "num_attention_heads": 2, "head_dim": 96},
    "heads of 128": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 128},
    "heads of 256": {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 256},
    "one panel of everything": {
        "hidden_size": 32,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 32,
        "vocab_size": 16,
    },
    "vocabulary of 17": {"vocab_size": 17},
    "vocabulary of 1003": {"vocab_size": 1003},
}


def run(engine: CpuEngine, tokens: list[int], policy: ExitPolicy | None = None) -> Tensor:
    """Logits `[tokens, vocabulary]` of a text, by two steps of which the second is a single row."""
    (sequence,) = begin(engine)
    first = append(engine, {sequence: tokens[:-1]}, policy).logits
    return torch.cat([first, append(engine, {sequence: tokens[-1:]}, policy).logits])


@cache
def shaped(shape: str) -> tuple[Subject, list[int]]:
    """A Llama of two layers of that shape, and tokens of its vocabulary."""
    settings = {"num_hidden_layers": 2, **SHAPES[shape]}
    settings["initializer_range"] = settings.get("hidden_size", 64) ** -0.5
    subject = Subject("Llama", settings, RTN)
    return subject, random_tokens(NUM_TOKENS, 1, subject.model.config.vocab_size)


@cache
def coded(bits: int, group_size: int) -> Subject:
    """A Llama whose river has such codes."""
    settings = {
        "num_hidden_layers": 2,
        "hidden_size": 128,
        "intermediate_size": 384,
        "initializer_range": 0.08,
    }
    return Subject("Llama", settings, RiverConfig(bits, group_size, "rtn"))


def test_the_best_set_is_the_default_unless_an_argument_or_the_environment_names_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    subject = subject_of("llama")
    monkeypatch.delenv("RIVER_LLM_CPU", raising=False)
    assert subject.engine().kernels == KERNELS[0]
    assert KERNELS[-1] == "portable"
    for name in KERNELS:
        monkeypatch.setenv("RIVER_LLM_CPU", name)
        assert subject.engine().kernels == name
        assert subject.engine(kernels="portable").kernels == "portable"


@every_kernel_set
@pytest.mark.parametrize("shape", SHAPES)
def test_any_shape_is_that_of_float32(shape: str, kernels: str) -> None:
    subject, tokens = shaped(shape)
    with torch.no_grad():
        expected = subject.exact(torch.tensor([tokens])).logits[0]
    logits = run(subject.engine(kernels=kernels), tokens)
    check_logits(logits, expected, BACKBONE_TOLERANCE)
    if kernels != "portable":
        portable = run(subject.engine(kernels="portable"), tokens)
        assert float(relative_errors(logits, portable).mean()) < KERNEL_TOLERANCE
    check_river(subject, tokens, kernels)


def check_river(subject: Subject, tokens: list[int], kernels: str) -> None:
    """Validate that a text through the exit layers has the quantised model's logits."""
    with torch.no_grad():
        expected = subject.quantised(torch.tensor([tokens])).logits[0]
    logits = run(subject.engine(kernels=kernels), tokens, ExitPolicy.always())
    check_logits(logits, expected, RIVER_TOLERANCE)
    if kernels != "portable":
        portable = run(subject.engine(kernels="portable"), tokens, ExitPolicy.always())
        assert float(relative_errors(logits, portable).mean()) < KERNEL_TOLERANCE


@every_kernel_set
@pytest.mark.parametrize(("bits", "group_size"), [*product([3, 4, 5, 6, 8], GROUP_SIZES), (2, 64)])
def test_codes_of_any_width_mean_what_they_mean_in_float32(
    bits: int, group_size: int, kernels: str
) -> None:
    check_river(coded(bits, group_size), random_tokens(NUM_TOKENS, seed=2), kernels)


@settings(max_examples=15, deadline=None)
@given(
    architecture=st.sampled_from(["Llama", "Phi3"]),
    widths=st.lists(st.sampled_from(BITS), min_size=14, max_size=14),
)
def test_matrices_of_any_widths_are_those_of_the_torch_engine(
    architecture: str, widths: list[int]
) -> None:
    model = tiny_model(architecture, num_hidden_layers=2)
    left = iter(widths)
    bits = [{name: next(left) for name in layer.linears} for layer in decoder_layers(model)]
    config = RiverConfig("auto", 32, "rtn")
    subject = Subject(architecture, {"num_hidden_layers": 2}, config, bits)
    tokens = random_tokens(NUM_TOKENS, seed=7)
    check_river(subject, tokens, KERNELS[0])
    expected = run(subject.reference(), tokens, ExitPolicy.always())
    check_logits(run(subject.engine(), tokens, ExitPolicy.always()), expected, RIVER_TOLERANCE)


@pytest.mark.parametrize("bits", BITS)
def test_the_river_is_held_in_its_bits(bits: int) -> None:
    subject = coded(bits, 64)
    engine = subject.engine()
    matrices = [matrix for layer in subject.river.exit_layers for matrix in layer.values()]
    groups = sum(matrix.scales.numel() for matrix in matrices)
    held = max(3, bits)
    backbone = 64 * groups * 2  # its bytes, in bfloat16
    river = backbone - (engine.step_bytes(subject.num_layers, 0) - engine.step_bytes(0, 0))
    assert river == 64 * groups * held // 8 + 4 * groups


@every_kernel_set
def test_rows_of_both_sides_share_a_pass(kernels: str) -> None:
    """Every third row leaves after the first layer, so that a product has rows of both."""
    subject, tokens = subject_of("llama"), random_tokens(NUM_TOKENS, seed=3)
    thresholds = torch.full((NUM_TOKENS, 4), torch.inf)
    thresholds[::3, 1] = -torch.inf
    engine, reference = subject.engine(kernels=kernels), subject.reference()
    step, expected = (
        append(each, {begin(each)[0]: tokens}, thresholds) for each in (engine, reference)
    )
    assert torch.equal(step.exit_layers, expected.exit_layers)
    assert step.exit_layers[:4].tolist() == [1, 4, 4, 1]
    assert float(relative_errors(step.logits, expected.logits).max()) < 3 * BACKBONE_TOLERANCE
    states, written = cached_states(engine, 0).flatten(2), cached_states(reference, 0).flatten(2)
    assert float(relative_errors(states, written).max()) < 0.012


@every_kernel_set
@pytest.mark.parametrize("group_size", [32, 64])
@torch.no_grad()
def test_a_backbone_of_8_bits_is_the_rounded_one(group_size: int, kernels: str) -> None:
    """In groups of 64, or of 32 where a width is no multiple of 64."""
    subject = coded(4, 64) if group_size == 64 else shaped("one key-value head")[0]
    tokens = random_tokens(NUM_TOKENS, seed=4)
    eight_bits = RiverConfig(bits=8, group_size=group_size, quantizer="rtn")
    rounded = fake_quantised(subject.exact, River.build(subject.model, eight_bits))
    logits = run(subject.engine(kernels=kernels, backbone_bits=8), tokens)
    check_logits(logits, rounded(torch.tensor([tokens])).logits[0], RIVER_TOLERANCE)


@every_kernel_set
@pytest.mark.parametrize("case", ["llama", "llama, tied head", "gemma3_text"])
@torch.no_grad()
def test_an_lm_head_of_8_bits_is_the_rounded_one(case: str, kernels: str) -> None:
    subject, tokens = subject_of(case), random_tokens(NUM_TOKENS, seed=4)
    group_size = 32 if subject.model.config.hidden_size % 64 else 64
    eight_bits = RiverConfig(bits=8, group_size=group_size, quantizer="rtn")
    rounded = copy.deepcopy(subject.exact)
    head = subject.model.get_output_embeddings().weight
    rounded.lm_head.weight = torch.nn.Parameter(quantize(head, eight_bits).dequantize())
    logits = run(subject.engine(kernels=kernels, lm_head_bits=8), tokens)
    check_logits(logits, rounded(torch.tensor([tokens])).logits[0], BACKBONE_TOLERANCE)
    assert not torch.equal(logits, run(subject.engine(kernels=kernels), tokens))


@every_kernel_set
@pytest.mark.parametrize("threads", [1, 3])
def test_of_equal_logits_the_first_is_the_greedy_token(kernels: str, threads: int) -> None:
    subject = Subject("Llama", {"num_hidden_layers": 1, "vocab_size": 1003})
    head = subject.model.lm_head.weight.data
    head.copy_(head[:37].repeat(28, 1)[:1003])
    engine = subject.engine(kernels=kernels, threads=threads)
    step = append(engine, {begin(engine)[0]: random_tokens(20, seed=5)})
    assert torch.equal(step.logits[:, :37], step.logits[:, 37:74])
    assert step.best_tokens.tolist() == step.logits[:, :37].argmax(-1).tolist()


@every_kernel_set
def test_activations_of_next_to_nothing_are_that(kernels: str) -> None:
    """A whole group of neurons is shut by its biases: silu(-100) is no number that has an inverse
    in float32."""
    subject = Subject("Llama", {"mlp_bias": True, "num_hidden_layers": 2})
    for layer in subject.model.model.layers:
        layer.mlp.gate_proj.bias.data[:32] = -100
    check_river(subject, random_tokens(NUM_TOKENS, seed=6), kernels)

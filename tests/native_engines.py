"""Tiny bfloat16 models for the native engine, and what its numbers are held against.

The reference is `transformers` in float32 on the same weights, rounded to bfloat16 beforehand: in
bfloat16 `transformers` itself rounds more often than the native engine does.
"""

from __future__ import annotations

import copy
from functools import cache, cached_property
from typing import Any

import pytest
import torch
from tiny_models import VOCABULARY, fake_quantised, mixed_bits, tiny_model
from torch import Tensor
from transformers import PreTrainedModel

from river_llm import River, RiverConfig, attach_river
from river_llm.engines.cpu import CpuEngine
from river_llm.engines.torch import TorchEngine
from river_llm.river.attach import AttachedRiver

_core = pytest.importorskip("river_llm._core", reason="the native engine was not built")

KERNELS: list[str] = _core.kernel_names()
# the best and the plain one on every commit, all in `make test-slow`
every_kernel_set = pytest.mark.parametrize(
    "kernels",
    [
        pytest.param(name, marks=[pytest.mark.slow] if name in KERNELS[1:-1] else [])
        for name in KERNELS
    ],
)

# Relative L2 of logits to float32, the mean over the rows of a test; any single row may reach three
# times that. Products of the backbone round activations to bfloat16, those of the river to 16-bit
# fixed point; attention is in bfloat16 in both.
BACKBONE_TOLERANCE = 0.01
RIVER_TOLERANCE = 0.006

LONG_CONTEXT = 2150  # positions of `long_subject`

_WINDOWS = {"sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
_GEMMA3 = {
    "hidden_size": 96,
    "head_dim": 16,
    "query_pre_attn_scalar": 24,
    "final_logit_softcapping": 3.0,
    **_WINDOWS,
}
_SHORT_FACTORS = [1 + 0.3 * place for place in range(8)]


def _rope(rope_type: str, **parameters: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": rope_type, "rope_theta": 1e4, **parameters}}


# What the native engine supports: of each architecture what is special about it.
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama, biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama, tied head": ("Llama", {"tie_word_embeddings": True}),
    "llama, linear rope": ("Llama", _rope("linear", factor=4.0)),
    "llama, llama3 rope": (
        "Llama",
        _rope(
            "llama3",
            factor=8.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=32,
        ),
    ),
    "llama, yarn rope": (
        "Llama",
        _rope("yarn", factor=4.0, original_max_position_embeddings=32),
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral, window": ("Mistral", {"sliding_window": 8}),
    "ministral": ("Ministral", {"head_dim": 16, **_WINDOWS}),
    "ministral3, query scales": (
        "Ministral3",
        {
            "head_dim": 16,
            **_rope(
                "yarn",
                factor=8.0,
                original_max_position_embeddings=16,
                llama_4_scaling_beta=0.3,
            ),
        },
    ),
    "ministral3, window": ("Ministral3", {"head_dim": 16, "sliding_window": 8}),
    "qwen2": ("Qwen2", {}),
    "qwen2, window": ("Qwen2", {"use_sliding_window": True, **_WINDOWS}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "smollm3": ("SmolLM3", {}),
    "smollm3, window": ("SmolLM3", {"use_sliding_window": True, **_WINDOWS}),
    "phi3": ("Phi3", {}),
    "phi3, window": ("Phi3", {"sliding_window": 8}),
    "phi3, partial rotary": ("Phi3", _rope("default", partial_rotary_factor=0.5)),
    "phi3, longrope": (
        "Phi3",
        {
            "original_max_position_embeddings": 16,
            **_rope(
                "longrope",
                short_factor=_SHORT_FACTORS,
                long_factor=[2 * factor for factor in _SHORT_FACTORS],
                original_max_position_embeddings=16,
            ),
        },
    ),
    "olmo2": ("Olmo2", {}),
    "gemma3_text": ("Gemma3Text", _GEMMA3),
    "gemma3_text, untied head": ("Gemma3Text", {**_GEMMA3, "tie_word_embeddings": False}),
    "llama, mixed widths": ("Llama", {}),  # of the river, see `subject_of`
    "phi3, mixed widths": ("Phi3", {}),
}
MIXED_WIDTHS = RiverConfig("auto", group_size=32)


class Subject:
    """A tiny random model in bfloat16 with its river, and the engines that run both."""

    def __init__(
        self,
        architecture: str,
        settings: dict[str, Any],
        config: RiverConfig | None = None,
        bits: list[dict[str, int]] | None = None,
    ) -> None:
        self.model = tiny_model(architecture, dtype=torch.bfloat16, **settings)
        generator = torch.Generator().manual_seed(2)
        for parameter in self.model.parameters():
            if parameter.ndim == 1:  # norms are ones and biases zeros: they would not be missed
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.data.add_(0.2 * noise.to(parameter.dtype))
        if not self.model.config.tie_word_embeddings:
            # rows of unequal length, so that tokens differ in how much a layer changes them
            rows = self.model.get_input_embeddings().weight.data
            rows.mul_(torch.randn(len(rows), 1, generator=generator).exp().to(rows.dtype))
        config = config or RiverConfig(group_size=32)
        if config.bits == "auto" and bits is None:
            bits = mixed_bits(self.model)
        self.river = River.build(self.model, config, bits=bits)
        self.num_layers = len(self.river.exit_layers)

    def copy(self) -> Subject:
        """The same river and another model, whose weights may be changed."""
        other = copy.copy(self)
        other.model = copy.deepcopy(self.model)
        return other

    @cached_property
    def exact(self) -> PreTrainedModel:
        """The plain model of `transformers` in float32."""
        return copy.deepcopy(self.model).float()

    @cached_property
    def quantised(self) -> PreTrainedModel:
        """The plain model in float32 with the river's weights in its linear layers."""
        return fake_quantised(self.exact, self.river)

    @cached_property
    def attached(self) -> AttachedRiver:
        """The model in float32 with the river attached, for `reference`."""
        return attach_river(copy.deepcopy(self.exact), self.river)

    def engine(self, **settings: Any) -> CpuEngine:
        """A native engine, by default of one thread and with the best kernels."""
        return CpuEngine(self.model, self.river, **{"threads": 1, **settings})

    def reference(self, kv_bits: int = 16) -> TorchEngine:
        """The torch engine in float32 with an empty cache. All references share one model."""
        return TorchEngine(self.attached, kv_bits)


@cache
def subject_of(case: str) -> Subject:
    """The model of one of `CASES`, made once."""
    return Subject(*CASES[case], MIXED_WIDTHS if case.endswith("mixed widths") else None)


@cache
def long_subject(case: str) -> Subject:
    """The same architecture with two layers and a context of `LONG_CONTEXT`."""
    architecture, settings = CASES[case]
    changed: dict[str, Any] = {"num_hidden_layers": 2, "max_position_embeddings": LONG_CONTEXT}
    if "layer_types" in settings:
        changed["layer_types"] = settings["layer_types"][:2]
    return Subject(architecture, {**settings, **changed})


@cache
def engine_of(
    case: str, kernels: str = KERNELS[0], threads: int = 1, kv_bits: int = 16
) -> CpuEngine:
    """One engine for all examples of a test."""
    return subject_of(case).engine(kernels=kernels, threads=threads, kv_bits=kv_bits)


def random_tokens(length: int, seed: int, vocabulary: int = VOCABULARY) -> list[int]:
    """Token ids, none of them a special one."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, vocabulary, (length,), generator=generator).tolist()


def relative_errors(actual: Tensor, expected: Tensor) -> Tensor:
    """Relative L2 of each row `[..., values]`."""
    return (actual - expected).norm(dim=-1) / expected.norm(dim=-1)


def check_logits(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Validate that logits `[..., vocabulary]` are within the tolerance, and that greedy tokens are
    equal where the expected ones are beyond doubt: where the two largest logits differ by more
    than six times the average error that the tolerance allows."""
    assert actual.shape == expected.shape
    errors = relative_errors(actual, expected)
    assert float(errors.mean()) < tolerance, f"relative L2 {float(errors.mean()):.4f} on average"
    assert float(errors.max()) < 3 * tolerance, f"relative L2 {float(errors.max()):.4f} at worst"
    largest = expected.topk(2, dim=-1).values
    average = expected.square().mean(-1).sqrt()
    beyond_doubt = largest[..., 0] - largest[..., 1] > 6 * tolerance * average
    assert float(beyond_doubt.float().mean()) > 0.5, "too few tokens to compare"
    assert torch.equal(actual.argmax(-1)[beyond_doubt], expected.argmax(-1)[beyond_doubt])

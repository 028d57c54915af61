"""Models and the GGUF files of them, a case for each setting and kind of tensor."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

HALF = np.linspace(1, 4, 8).tolist()  # divisors of the 8 frequencies of a head


def rope(kind: str, theta: float = 1e4, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings}}


def _llama3_divisors(theta: float, original: int) -> list[float]:
    """As llama.cpp's converter writes them, of factors 8, 1 and 4."""
    waves = 2 * math.pi * theta ** (np.arange(0, 16, 2) / 16)
    smooth = np.clip((original / waves - 1) / 3, 0, 1)
    divisors: list[float] = (1 / ((1 - smooth) / 8 + smooth)).tolist()
    return divisors


_LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
_LONG = {"long_factor": HALF, "short_factor": [2.0, *HALF[1:]]}
_FACTORS = {
    "rope_factors_long.weight": _LONG["long_factor"],
    "rope_factors_short.weight": _LONG["short_factor"],
}
_YARN = {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0}
_GEMMA_ROPES = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
    }
}
_GEMMA = {"head_dim": 16, "sliding_window": 8, "tie_word_embeddings": True}
_GEMMA2 = {"attn_logit_softcapping": 20.0, "final_logit_softcapping": 3.0}
_GRANITE = {
    "logits_scaling": 0.5,
    "residual_multiplier": 0.3,
    "embedding_multiplier": 3.0,
    "attention_multiplier": 0.5,
}

# name: (GGUF architecture, transformers', its settings, further metadata, further tensors)
CASES: dict[str, tuple[str, str, dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "llama": ("llama", "Llama", {}, {}, {}),
    "a tied head": ("llama", "Llama", {"tie_word_embeddings": True}, {}, {}),
    "wide heads": ("llama", "Llama", {"head_dim": 32}, {}, {}),
    "biases": ("llama", "Llama", {"attention_bias": True}, {}, {}),
    "biases of the MLP": ("llama", "Llama", {"mlp_bias": True}, {}, {}),
    "epsilon": ("llama", "Llama", {"rms_norm_eps": 0.3}, {}, {}),
    "a window": (
        "llama",
        "Mistral",
        {"sliding_window": 8},
        {"attention.sliding_window": 8},
        {},
    ),
    "linear": (
        "llama",
        "Llama",
        rope("linear", factor=4.0),
        {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
        {},
    ),
    "linear, by its old key": (
        "llama",
        "Llama",
        rope("linear", factor=4.0),
        {"rope.scale_linear": 4.0},
        {},
    ),
    "Llama 3's divisors": (
        "llama",
        "Llama",
        rope("llama3", 5e5, **_LLAMA3, original_max_position_embeddings=8192),
        {},
        {"rope_freqs.weight": _llama3_divisors(5e5, 8192)},
    ),
    "divisors of another original context": (
        "llama",
        "Llama",
        rope("llama3", **_LLAMA3, original_max_position_embeddings=64),
        {},
        {"rope_freqs.weight": _llama3_divisors(1e4, 64)},
    ),
    "yarn": (
        "qwen2",
        "Qwen2",
        rope("yarn", factor=4.0, original_max_position_embeddings=128),
        {**_YARN, "rope.scaling.original_context_length": 128},
        {},
    ),
    "yarn with all it has": (
        "qwen3",
        "Qwen3",
        {
            "head_dim": 16,
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=128,
                beta_fast=4.0,
                beta_slow=0.5,
                attention_factor=1.3,
            ),
        },
        {
            **_YARN,
            "rope.scaling.original_context_length": 128,
            "rope.scaling.yarn_beta_fast": 4.0,
            "rope.scaling.yarn_beta_slow": 0.5,
            "rope.scaling.yarn_attn_factor": 1.3,
        },
        {},
    ),
    "qwen3": ("qwen3", "Qwen3", {"head_dim": 32}, {}, {}),
    "qwen3 with biases": ("qwen3", "Qwen3", {"head_dim": 16, "attention_bias": True}, {}, {}),
    "smollm3": ("smollm3", "SmolLM3", {"pad_token_id": 0}, {}, {}),
    "phi3": ("phi3", "Phi3", {"pad_token_id": 0}, {}, {}),
    "partial rotation, window": (
        "phi3",
        "Phi3",
        {
            "pad_token_id": 0,
            "sliding_window": 8,
            **rope("default", partial_rotary_factor=0.5),
        },
        {"attention.sliding_window": 8},
        {},
    ),
    "longrope": (
        "phi3",
        "Phi3",
        {
            "pad_token_id": 0,
            "original_max_position_embeddings": 128,
            **rope(
                "longrope",
                **_LONG,
                original_max_position_embeddings=128,
                attention_factor=1.2,
            ),
        },
        {"rope.scaling.original_context_length": 128, "rope.scaling.attn_factor": 1.2},
        _FACTORS,
    ),
    "olmo2": ("olmo2", "Olmo2", {}, {}, {}),
    "olmo3": (
        "olmo2",
        "Olmo3",
        {"sliding_window": 8, "layer_types": 2 * ["sliding_attention", "full_attention"]},
        {
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": [True, False, True, False],
        },
        {},
    ),
    "gemma": ("gemma", "Gemma", {"head_dim": 16, "tie_word_embeddings": True}, {}, {}),
    "gemma2": (
        "gemma2",
        "Gemma2",
        {**_GEMMA, **_GEMMA2, "query_pre_attn_scalar": 16},
        {"attention.sliding_window": 8, **_GEMMA2},
        {},
    ),
    "gemma2 without its caps": (
        "gemma2",
        "Gemma2",
        {**_GEMMA, "query_pre_attn_scalar": 16},
        {"attention.sliding_window": 8},
        {},
    ),
    "gemma3 by Ollama's names": (
        "gemma3",
        "Gemma3Text",
        {
            **_GEMMA,
            "query_pre_attn_scalar": 16,
            "layer_types": 2 * ["sliding_attention", "full_attention"],
            "rope_parameters": {
                "full_attention": {"rope_type": "default", "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 5e3},
            },
        },
        {
            "attention.sliding_window": 8,
            "attention.sliding_window_pattern": 2,
            "rope.local.freq_base": 5e3,
        },
        {},
    ),
    "gemma3": (
        "gemma3",
        "Gemma3Text",
        {
            **_GEMMA,
            **_GEMMA_ROPES,
            "num_hidden_layers": 7,
            "query_pre_attn_scalar": 16,
            "final_logit_softcapping": 2.0,
        },
        {
            "attention.sliding_window": 8,
            "rope.freq_base_swa": 5e3,
            "rope.scaling.type": "linear",
            "rope.scaling.factor": 8.0,
            "final_logit_softcapping": 2.0,
        },
        {},
    ),
    "mistral3": (
        "mistral3",
        "Ministral3",
        {
            "head_dim": 16,
            **rope(
                "yarn",
                factor=4.0,
                original_max_position_embeddings=128,
                mscale=1.0,
                mscale_all_dim=0.5,
                llama_4_scaling_beta=0.3,
            ),
        },
        {
            **_YARN,
            "rope.scaling.original_context_length": 128,
            "rope.scaling.yarn_log_multiplier": 0.5,
            "attention.temperature_scale": 0.3,
        },
        {},
    ),
    "granite": (
        "granite",
        "Granite",
        _GRANITE,
        {
            "logit_scale": 0.5,
            "residual_scale": 0.3,
            "embedding_scale": 3.0,
            "attention.scale": 0.5,
        },
        {},
    ),
}

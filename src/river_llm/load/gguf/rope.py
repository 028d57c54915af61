"""The rotary embedding of a GGUF file: its base, and how its angles are scaled."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from river_llm.load.gguf.file import GGUFTensor
from river_llm.load.gguf.metadata import Metadata

DIVISORS = "rope_freqs.weight"  # of the frequencies, at any length
LONG_DIVISORS, SHORT_DIVISORS = "rope_factors_long.weight", "rope_factors_short.weight"
ROPE_TENSORS = (DIVISORS, LONG_DIVISORS, SHORT_DIVISORS)
# Of the models that were trained with Llama 3's scaling; its low and high frequency factors are 1
# and 4 in all of them.
_LLAMA3_ORIGINAL_CONTEXT = 8192


def rope_parameters(
    metadata: Metadata, tensors: dict[str, GGUFTensor], rotary_dims: int, context: int
) -> dict[str, Any]:
    """`rope_parameters` of a configuration of `transformers`.

    Raises:
        ModelLoadError: the scaling isn't known, or lacks a part.
    """
    theta = metadata.number("rope.global.freq_base", 10_000.0)  # Ollama's name, of Gemma 3
    theta = metadata.number("rope.freq_base", theta)
    kind = metadata.take("rope.scaling.type", "linear")
    factor = metadata.number("rope.scaling.factor", None)
    factor = factor or metadata.number("rope.scale_linear", 1.0)
    original = metadata.count("rope.scaling.original_context_length", context)
    attention = metadata.number("rope.scaling.attn_factor", 1.0)
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": theta}
    betas = {
        "beta_fast": metadata.number("rope.scaling.yarn_beta_fast", 32.0),
        "beta_slow": metadata.number("rope.scaling.yarn_beta_slow", 1.0),
    }
    if kind == "yarn" and factor != 1:
        parameters |= betas | _yarn(metadata, factor, original, attention)
    elif kind == "longrope" or LONG_DIVISORS in tensors or SHORT_DIVISORS in tensors:
        long = _divisors(metadata, tensors, LONG_DIVISORS, rotary_dims)
        short = _divisors(metadata, tensors, SHORT_DIVISORS, rotary_dims)
        if long is None or short is None or factor != 1 or DIVISORS in tensors:
            raise metadata.refusal(
                f"scales its rotary angles by {kind} without {LONG_DIVISORS} and {SHORT_DIVISORS} "
                "alone, which isn't known"
            )
        return parameters | _longrope(long, short, original, context, attention)
    elif kind not in ("linear", "none", "yarn"):
        raise metadata.refusal(
            f"scales its rotary angles by {kind!r}, which isn't known here (linear, yarn and "
            "longrope are)"
        )
    else:
        if kind != "yarn" and (betas["beta_fast"], betas["beta_slow"]) != (32, 1):
            raise metadata.refusal("has settings of yarn without it")
        if attention != 1:
            raise metadata.refusal("scales rotary cosines without yarn or longrope")
        if kind == "linear" and factor != 1:
            parameters |= {"rope_type": "linear", "factor": factor}
    is_mistral3 = metadata.architecture == "mistral3"
    beta = metadata.number("attention.temperature_scale", None) if is_mistral3 else None
    if beta is not None:
        parameters["llama_4_scaling_beta"] = beta
        parameters["original_max_position_embeddings"] = original
    divisors = _divisors(metadata, tensors, DIVISORS, rotary_dims)
    if divisors is None or np.all(divisors == 1):
        return parameters
    if parameters["rope_type"] != "default":
        raise metadata.refusal(f"scales its rotary angles by {kind} and by {DIVISORS}")
    return parameters | _divided(divisors, theta, rotary_dims, context)


def _yarn(metadata: Metadata, factor: float, original: int, attention: float) -> dict[str, Any]:
    """Peng et al. 2023."""
    parameters: dict[str, Any] = {
        "rope_type": "yarn",
        "factor": factor,
        "original_max_position_embeddings": original,
    }
    all_dims = metadata.number("rope.scaling.yarn_log_multiplier", None)
    given = metadata.number("rope.scaling.yarn_attn_factor", None)
    if all_dims is not None:
        parameters |= {"mscale": 1.0, "mscale_all_dim": all_dims}
    if given is not None:
        parameters["attention_factor"] = given * attention
    elif attention != 1:
        default = (0.1 * math.log(factor) + 1) / (0.1 * (all_dims or 0) * math.log(factor) + 1)
        parameters["attention_factor"] = default * attention
    return parameters


def _longrope(
    long: Any, short: Any, original: int, context: int, attention: float
) -> dict[str, Any]:
    """Ding et al. 2024."""
    return {
        "rope_type": "longrope",
        "factor": context / original,
        "long_factor": long.tolist(),
        "short_factor": short.tolist(),
        "original_max_position_embeddings": original,
        "attention_factor": attention,
    }


def _divisors(
    metadata: Metadata, tensors: dict[str, GGUFTensor], name: str, rotary_dims: int
) -> Any:
    """Float64 `[rotary_dims / 2]` by which frequencies are divided; None where there are none."""
    tensor = tensors.get(name)
    if tensor is None:
        return None
    values = tensor.read(torch.float32).double().numpy()
    if values.shape != (rotary_dims // 2,) or not np.all(np.isfinite(values) & (values > 0)):
        raise metadata.refusal(f"has a {name} that divides no {rotary_dims // 2} frequencies")
    return values


def _divided(divisors: Any, theta: float, rotary_dims: int, context: int) -> dict[str, Any]:
    """Llama 3's scaling where the divisors are its, else the same ones for every length."""
    factor = round(float(divisors.max()), 4)
    frequencies = theta ** -(np.arange(0, rotary_dims, 2) / rotary_dims)
    waves = _LLAMA3_ORIGINAL_CONTEXT * frequencies / (2 * math.pi)  # that the context holds
    smooth = np.clip((waves - 1) / (4 - 1), 0, 1)
    if np.allclose(divisors, 1 / ((1 - smooth) / factor + smooth), rtol=1e-4):
        return {
            "rope_type": "llama3",
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": _LLAMA3_ORIGINAL_CONTEXT,
        }
    return _longrope(divisors, divisors, context, context, 1.0)

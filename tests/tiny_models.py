"""Tiny random models of many architectures, from their config classes, in float32."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from river_llm import River
from river_llm.config import BITS
from river_llm.river.backbone import decoder_layers

VOCABULARY = 97
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,  # large enough that a layer changes the hidden state
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
_GPT2_NAMES = {"n_embd": 64, "n_layer": 4, "n_head": 4, "n_positions": 128}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": {"sliding_window": 8},
    "Ministral": {"sliding_window": 8, "head_dim": 16},
    "Ministral3": {"head_dim": 16},
    "Qwen2": {},
    "Qwen3": {"head_dim": 16},
    "SmolLM3": {},
    "Gemma": {"head_dim": 16},
    "Gemma2": {"head_dim": 16, "sliding_window": 8},
    "Gemma3Text": {"head_dim": 16, "sliding_window": 8},
    "Phi": {},
    "Phi3": {},
    "Olmo": {},
    "Olmo2": {},
    "Olmo3": {"sliding_window": 8},
    "GPTNeoX": {},
    "StableLm": {},
    "Cohere": {},
    "Granite": {},
    "Starcoder2": {},
    "Glm4": {"head_dim": 16},
    "Nemotron": {},
    "GPT2": _GPT2_NAMES,
    "GPTJ": {**_GPT2_NAMES, "rotary_dim": 16},
    "OPT": {"ffn_dim": 96, "word_embed_proj_dim": 64},
    "Bloom": {"n_layer": 4, "n_head": 4},
    "Falcon": {},
    "Mpt": {"d_model": 64, "n_layers": 4, "n_heads": 4},
}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "Mixtral": ({}, r"^MixtralForCausalLM is a mixture of experts \(num_local_experts is 8\)"),
    "Qwen3Moe": ({"num_experts": 4}, "^Qwen3MoeForCausalLM is a mixture of experts"),
    "GptOss": ({"num_local_experts": 4}, "^GptOssForCausalLM is a mixture of experts"),
    "Mamba": ({}, "MambaForCausalLM keeps a recurrent state"),
    "Rwkv": ({}, "RwkvForCausalLM keeps a recurrent state"),
}


def tiny_model(architecture: str, **settings: Any) -> PreTrainedModel:
    """A random model of `architecture`, the same at every call."""
    config_class = getattr(transformers, f"{architecture}Config")
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**{**_COMMON, **settings})).eval()


def mixed_bits(model: PreTrainedModel) -> list[dict[str, int]]:
    """All widths in all kinds of matrices, for a river of auto bits."""
    return [
        {name: BITS[(index + place) % len(BITS)] for place, name in enumerate(layer.linears)}
        for index, layer in enumerate(decoder_layers(model))
    ]


def fake_quantised(model: PreTrainedModel, river: River, first_layer: int = 0) -> PreTrainedModel:
    """A copy of `model` whose linear weights from `first_layer` on are the river's, dequantised."""
    quantised = copy.deepcopy(model)
    layers = decoder_layers(quantised)
    for layer, exit_layer in list(zip(layers, river.exit_layers, strict=True))[first_layer:]:
        for name, linear in layer.linears.items():
            weight = exit_layer[name].dequantize()
            linear.weight.data = weight.T.contiguous() if isinstance(linear, Conv1D) else weight
    return quantised

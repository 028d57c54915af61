"""Models of well-known shapes with random weights: fair for speed at a fixed exit depth, and for
nothing else."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from river_llm.backbone import decoder_layers, fingerprint, linear_weight
from river_llm.config import RiverConfig
from river_llm.quantization import QuantizedMatrix, quantize
from river_llm.river import River

_LLAMA_3: dict[str, Any] = {
    "vocab_size": 128256,
    "intermediate_size": 8192,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": {
        **_LLAMA_3,
        "hidden_size": 2048,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "head_dim": 64,
    },
    "llama-3.2-3b": {
        **_LLAMA_3,
        "hidden_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 24,
    },
    "llama-3.1-8b": {
        **_LLAMA_3,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
        "rope_parameters": {**_LLAMA_3["rope_parameters"], "factor": 8.0},
    },
}
_SEED = 0
_DEVIATION = 0.02
_RANDOM_VALUES = 1 << 20  # drawn for each weight, then repeated: a draw of all takes minutes


def random_model(shape: dict[str, Any]) -> PreTrainedModel:
    """A Llama of this shape in bfloat16: one random layer, the others copies of it."""
    config = LlamaConfig(**shape)
    with no_init_weights():
        model: PreTrainedModel = LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)
    model.tie_weights()
    generator = torch.Generator().manual_seed(_SEED)
    layers = decoder_layers(model)
    with torch.no_grad():
        _fill(model.get_input_embeddings().weight, generator)
        if not config.tie_word_embeddings:
            _fill(model.get_output_embeddings().weight, generator)
        first = layers[0].module
        for parameter in first.parameters():
            if parameter.ndim > 1:
                _fill(parameter, generator)
            else:
                parameter.fill_(1)
        for layer in layers[1:]:
            layer.module.load_state_dict(first.state_dict())
        model.model.norm.weight.fill_(1)
    return model.eval()


def random_river(model: PreTrainedModel, config: RiverConfig) -> River:
    """The river of `random_model`: its first layer quantised, then copied, as the layers are.

    Raises:
        ConfigError: the group size doesn't divide the input width of some linear layer.
    """
    layers = decoder_layers(model)
    linears = layers[0].linears.items()
    first = {name: quantize(linear_weight(linear), config) for name, linear in linears}
    exit_layers = [
        {name: _copy(matrix) for name, matrix in first.items()} for _ in range(len(layers))
    ]
    return River(config, exit_layers, fingerprint(layers), model.config.model_type)


def _fill(weight: Tensor, generator: torch.Generator) -> None:
    """Random values that repeat only after a number of them that no width divides."""
    count = min(_RANDOM_VALUES - 3, weight.numel())
    values = torch.empty(count).normal_(0, _DEVIATION, generator=generator).to(weight.dtype)
    flat = weight.view(-1)
    for start in range(0, flat.numel(), count):
        part = flat[start : start + count]
        part.copy_(values[: part.numel()])


def _copy(matrix: QuantizedMatrix) -> QuantizedMatrix:
    return QuantizedMatrix(
        matrix.packed.clone(),
        matrix.scales.clone(),
        matrix.zeros.clone(),
        matrix.bits,
        matrix.group_size,
    )

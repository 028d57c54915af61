"""Models of well-known shapes with random weights: fair for speed at a fixed exit depth, and for
nothing else."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from river_llm.config import EngineConfig, RiverConfig
from river_llm.engines import Engine, make_engine
from river_llm.errors import ConfigError
from river_llm.river.backbone import decoder_layers, fingerprint, linear_weight
from river_llm.river.quantize import quantize
from river_llm.river.river import River


def _llama_3(hidden: int, intermediate: int, layers: int, heads: int, factor: float) -> Any:
    return {
        "vocab_size": 128256,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "head_dim": hidden // heads,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": hidden < 4096,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": factor,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    }


SHAPES: dict[str, dict[str, Any]] = {
    "llama-3.2-1b": _llama_3(2048, 8192, 16, 32, 32.0),
    "llama-3.2-3b": _llama_3(3072, 8192, 28, 24, 32.0),
    "llama-3.1-8b": _llama_3(4096, 14336, 32, 32, 8.0),
}
_DEVIATION = 0.02
_RANDOM_VALUES = 1 << 20  # drawn for each weight, then repeated: a draw of all takes minutes


@torch.no_grad()
def random_model(shape: dict[str, Any]) -> PreTrainedModel:
    """A Llama of this shape in bfloat16: one random layer, the others copies of it."""
    with no_init_weights():
        model: PreTrainedModel = LlamaForCausalLM._from_config(
            LlamaConfig(**shape), dtype=torch.bfloat16
        )
    model.tie_weights()
    generator = torch.Generator().manual_seed(0)
    layers = decoder_layers(model)
    first = layers[0].module
    for part in (model.get_input_embeddings(), model.get_output_embeddings(), first):
        for parameter in part.parameters():
            _fill(parameter, generator)
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
    exit_layers = [copy.deepcopy(first) for _ in layers]
    return River(config, exit_layers, fingerprint(layers), model.config.model_type)


def random_engine(shape: str, config: RiverConfig, engine: EngineConfig) -> Engine:
    """An engine with random weights.

    Raises:
        ConfigError: there is no such shape, or a setting is not for the engine.
    """
    if shape not in SHAPES:
        raise ConfigError(f"there is no shape {shape!r}; take one of {', '.join(SHAPES)}")
    model = random_model(SHAPES[shape]).to(engine.device or "cpu")
    return make_engine(model, random_river(model, config), engine)[0]


def _fill(weight: Tensor, generator: torch.Generator) -> None:
    """Ones in a norm; else random values that repeat only after a number of them that no width
    divides."""
    if weight.ndim == 1:
        weight.fill_(1)
        return
    count = min(_RANDOM_VALUES - 3, weight.numel())
    values = torch.empty(count).normal_(0, _DEVIATION, generator=generator).to(weight.dtype)
    for part in torch.split(weight.view(-1), count):
        part.copy_(values[: part.numel()])

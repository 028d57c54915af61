"""The Llama family as the native engine sees it: where a model of `transformers` keeps the parts of
a decoder layer, and which of them it has.

Read from the model's modules, not from its checkpoint, so that fused projections, scalings of the
rotary embedding and defaults are what `transformers` makes of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from river_llm.errors import UnsupportedModelError

_PRE_NORM = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
_POST_NORM = {
    "post_attention_norm": "post_attention_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
_SANDWICH_NORM = {
    "attention_norm": "input_layernorm",
    "post_attention_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "post_mlp_norm": "post_feedforward_layernorm",
}
_NORMS = {
    "llama": _PRE_NORM,
    "mistral": _PRE_NORM,
    "ministral": _PRE_NORM,
    "ministral3": _PRE_NORM,
    "qwen2": _PRE_NORM,
    "qwen3": _PRE_NORM,
    "smollm3": _PRE_NORM,
    "phi3": _PRE_NORM,
    "olmo2": _POST_NORM,
    "gemma3_text": _SANDWICH_NORM,
}
_GELU = {"silu": False, "gelu_pytorch_tanh": True}
_LANES = 16  # widths are multiples of this: the lanes of a vector register

SUPPORTED_MODEL_TYPES = tuple(_NORMS)
PROJECTIONS = ("qkv", "output", "gate_up", "down")


@dataclass(frozen=True, slots=True)
class LayerParts:
    """One decoder layer.

    Attributes:
        projections: for each of `PROJECTIONS` the names of the linear layers whose outputs stand
            below each other, and the rows of theirs to take (None: all).
        parts: norms and biases as float32 arrays, window and rotary table, as
            `_core.Engine.set_layer` takes them.
    """

    projections: tuple[tuple[tuple[str, slice | None], ...], ...]
    parts: dict[str, Any]


def check_supported(model: PreTrainedModel) -> None:
    """See that the native engine knows the model's architecture and sizes.

    Raises:
        UnsupportedModelError: it doesn't; the message says why.
    """
    config = model.config
    if config.model_type not in _NORMS:
        known = ", ".join(SUPPORTED_MODEL_TYPES)
        raise _unsupported(f"knows {known}, not {config.model_type}")
    if activation(model) not in _GELU:
        raise _unsupported(f"has no activation {activation(model)!r}")
    if getattr(config, "attn_logit_softcapping", None) is not None:
        raise _unsupported("has no cap on attention scores")
    if getattr(config, "use_bidirectional_attention", False):
        raise _unsupported("attends to earlier tokens only")
    shape = model_shape(model)
    for name in ("hidden_size", "intermediate_size", "head_dim"):
        if shape[name] % _LANES:
            raise _unsupported(f"needs a {name} that is a multiple of {_LANES}, not {shape[name]}")
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise _unsupported("knows no bias of the LM head")


def activation(model: PreTrainedModel) -> str:
    """The name of the MLP's activation function."""
    config = model.config
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def model_shape(model: PreTrainedModel) -> dict[str, Any]:
    """The sizes and constants that `_core.Engine` takes."""
    config = model.config
    attention = model.model.layers[0].self_attn
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    scale = getattr(embedding, "embed_scale", None)
    return {
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_heads": config.num_attention_heads,
        "num_kv_heads": config.num_key_value_heads,
        "head_dim": attention.head_dim,
        "intermediate_size": config.intermediate_size,
        "vocab_size": head.weight.shape[0],
        "rotary_dim": 2 * rotary_angles(model, rotary_layer_types(model)[0], 0, 1)[0].shape[1],
        "norm_epsilon": config.rms_norm_eps,
        "attention_scale": float(attention.scaling),
        # the model multiplies by the scale as its own dtype holds it
        "embedding_scale": 1.0 if scale is None else float(scale.to(embedding.weight.dtype)),
        "logit_cap": getattr(config, "final_logit_softcapping", None) or 0.0,
        "gelu": _GELU.get(activation(model), False),
        "tied_head": embedding.weight.data_ptr() == head.weight.data_ptr(),
    }


def rotary_layer_types(model: PreTrainedModel) -> list[str | None]:
    """The kinds of layer that have rotary angles of their own; `[None]` where all share them."""
    types = getattr(model.model.rotary_emb, "layer_types", None)
    return list(types) if types else [None]


@torch.no_grad()
def rotary_angles(
    model: PreTrainedModel, layer_type: str | None, first: int, end: int
) -> tuple[Tensor, Tensor]:
    """Cosines and sines, float32 `[positions, rotary_dim / 2]`, of the positions [first, end).

    They come from the model's own rotary embedding, with whatever scaling it has.
    """
    rotary = model.model.rotary_emb
    positions = torch.arange(first, end).unsqueeze(0)
    dtype = torch.zeros(1, dtype=torch.float32)
    arguments = () if layer_type is None else (layer_type,)
    cosines, sines = rotary(dtype, positions, *arguments)
    half = cosines.shape[-1] // 2
    return cosines[0, :, :half].contiguous(), sines[0, :, :half].contiguous()


def longrope_limit(model: PreTrainedModel) -> int | None:
    """Above this many positions the model's rotary angles change for all of them; None: never."""
    parameters = getattr(model.config, "rope_parameters", None) or {}
    if parameters.get("rope_type") != "longrope":
        return None
    return int(parameters["original_max_position_embeddings"])


def rows_like_single_steps(model: PreTrainedModel, length: int) -> int | None:
    """How many tokens after `length` can run in one pass with the rotary angles that single steps
    would give them, 1 at least; None: any number.

    Angles that depend on the length (longrope, dynamic NTK scaling) are, for all tokens of a pass,
    those of its last one.
    """
    parameters = getattr(model.config, "rope_parameters", None) or {}
    kind = parameters.get("rope_type")
    if kind == "dynamic":
        limit = int(model.config.max_position_embeddings)
        return max(1, limit - length)
    limit_of_short = longrope_limit(model)
    if limit_of_short is None or length >= limit_of_short:
        return None
    return limit_of_short - length


def query_scales(model: PreTrainedModel, positions: int) -> Tensor | None:
    """What queries are multiplied with by position, float32 `[positions]`; None: nothing.

    Ministral 3 (after Llama 4) scales by 1 + beta * log(1 + floor(position / original context)).
    """
    parameters = getattr(model.config, "rope_parameters", None) or {}
    beta = parameters.get("llama_4_scaling_beta")
    if beta is None or model.config.model_type != "ministral3":
        return None
    places = torch.arange(positions, dtype=torch.float32)
    original = parameters["original_max_position_embeddings"]
    scales: Tensor = 1 + beta * torch.log(1 + torch.floor(places / original))
    return scales


def layer_parts(model: PreTrainedModel, index: int) -> LayerParts:
    """Where the parts of decoder layer `index` are."""
    layer = model.model.layers[index]
    attention, mlp = layer.self_attn, layer.mlp
    inner = model.config.intermediate_size
    if hasattr(attention, "qkv_proj"):
        qkv: tuple[tuple[str, slice | None], ...] = (("self_attn.qkv_proj", None),)
    else:
        qkv = tuple((f"self_attn.{name}_proj", None) for name in "qkv")
    if hasattr(mlp, "gate_up_proj"):
        name = "mlp.gate_up_proj"
        gate_up: tuple[tuple[str, slice | None], ...] = (
            (name, slice(0, inner)),
            (name, slice(inner, 2 * inner)),
        )
    else:
        gate_up = (("mlp.gate_proj", None), ("mlp.up_proj", None))
    projections = (qkv, (("self_attn.o_proj", None),), gate_up, (("mlp.down_proj", None),))
    parts: dict[str, Any] = {
        name: _norm_weight(model, getattr(layer, attribute))
        for name, attribute in _NORMS[model.config.model_type].items()
    }
    for name, attribute in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
        norm = getattr(attention, attribute, None)
        if norm is not None:
            parts[name] = _norm_weight(model, norm)
    for name, pieces in zip(PROJECTIONS, projections, strict=True):
        bias = _bias(layer, pieces, interleaved=name == "gate_up")
        if bias is not None:
            parts[f"{name}_bias"] = bias
    parts["window"] = _window(model, index) or 0
    parts["rope"] = _rotary_table(model, index)
    return LayerParts(projections, parts)


def _norm_weight(model: PreTrainedModel, norm: nn.Module) -> Any:
    weight: Tensor = norm.get_parameter("weight").detach().float()
    if model.config.model_type.startswith("gemma"):
        weight = 1 + weight
    return weight.contiguous().numpy()


def _bias(layer: nn.Module, pieces: tuple[tuple[str, slice | None], ...], interleaved: bool) -> Any:
    biases = []
    for name, rows in pieces:
        linear = layer.get_submodule(name)
        if not isinstance(linear.bias, Tensor):
            return None
        bias = linear.bias.detach().float()
        biases.append(bias if rows is None else bias[rows])
    if interleaved:  # gate and up in turn, as their panels lie
        return torch.stack([bias.view(-1, _LANES) for bias in biases], 1).flatten().numpy()
    return torch.cat(biases).contiguous().numpy()


def _window(model: PreTrainedModel, index: int) -> int | None:
    attention = model.model.layers[index].self_attn
    if model.config.model_type in ("mistral", "ministral3", "phi3"):
        return getattr(model.config, "sliding_window", None)
    window: int | None = getattr(attention, "sliding_window", None)
    return window


def _rotary_table(model: PreTrainedModel, index: int) -> int:
    attention = model.model.layers[index].self_attn
    if not getattr(attention, "use_rope", True):
        return -1
    types = rotary_layer_types(model)
    return 0 if types == [None] else types.index(attention.layer_type)


def _unsupported(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the native engine {reason}; take --engine torch")

"""The Llama family as the native engine sees it: where a model of `transformers` keeps the parts of
a decoder layer, and which of them it has.

Read from the model's modules, not from its checkpoint, so that fused projections, scalings of the
rotary embedding and defaults are what `transformers` makes of them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from river_llm.engines.native_core import MOST_DIMS_OF_CODES, holds_heads
from river_llm.engines.native_model import NativeModel, RopeBoundary, RotaryTable
from river_llm.errors import UnsupportedModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

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
Pieces = tuple[tuple[str, slice | None], ...]  # of a projection: linear layers, and their rows


def check_supported(model: PreTrainedModel, kv_bits: int = 16) -> None:
    """Validate that the native engine knows the model's architecture and sizes, with a KV cache of
    so many bits.

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
    shape = _shape(model)
    for name in ("hidden_size", "intermediate_size", "head_dim"):
        if shape[name] % _LANES:
            raise _unsupported(f"needs a {name} that is a multiple of {_LANES}, not {shape[name]}")
    if not holds_heads(shape["head_dim"], kv_bits):
        raise _unsupported(
            f"takes heads of {MOST_DIMS_OF_CODES} dims at most in a KV cache of {kv_bits} bits, "
            f"not {shape['head_dim']}"
        )
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise _unsupported("knows no bias of the LM head")
    layer_types = _rotary_layer_types(model)
    if layer_types != [None] and rope_boundary(model) is not None:
        raise _unsupported("knows no rotary angles that change for one kind of layer")
    for layer_type in layer_types:
        _rotary_table(model, layer_type)


def describe(model: PreTrainedModel) -> NativeModel:
    """All of a model but its matrices.

    Raises:
        UnsupportedModelError: see `check_supported`.
    """
    check_supported(model)
    rotary = [_rotary_table(model, layer_type) for layer_type in _rotary_layer_types(model)]
    return NativeModel(
        shape={**_shape(model), "rotary_dim": 2 * len(rotary[0].frequencies)},
        layers=[_layer_parts(model, index) for index in range(model.config.num_hidden_layers)],
        final_norm=_norm_weight(model, model.model.norm),
        rotary=rotary,
        rope_boundary=rope_boundary(model),
        query_scaling=_query_scaling(model),
        context_length=getattr(model.config, "max_position_embeddings", None),
    )


def activation(model: PreTrainedModel) -> str:
    """The name of the MLP's activation function."""
    config = model.config
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _shape(model: PreTrainedModel) -> dict[str, Any]:
    """The sizes and constants that `_core.Engine` takes, but for `rotary_dim`."""
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
        "norm_epsilon": config.rms_norm_eps,
        "attention_scale": float(attention.scaling),
        # the model multiplies by the scale as its own dtype holds it
        "embedding_scale": 1.0 if scale is None else float(scale.to(embedding.weight.dtype)),
        "logit_cap": getattr(config, "final_logit_softcapping", None) or 0.0,
        "gelu": _GELU.get(activation(model), False),
        "tied_head": embedding.weight.data_ptr() == head.weight.data_ptr(),
    }


def rope_boundary(model: PreTrainedModel) -> RopeBoundary | None:
    """Above how many positions the model's rotary angles change; None: never."""
    boundaries = []
    for parameters in _rope_parameters(model):
        kind = parameters.get("rope_type")
        if kind == "dynamic":
            positions = int(model.config.max_position_embeddings)
            boundaries.append(RopeBoundary(positions, keep_changing=True))
        elif kind == "longrope":
            positions = int(parameters["original_max_position_embeddings"])
            boundaries.append(RopeBoundary(positions, keep_changing=False))
    if not boundaries:
        return None
    return RopeBoundary(
        min(boundary.positions for boundary in boundaries),
        # where kinds of layer have boundaries of their own, their angles change more than once
        keep_changing=len(boundaries) > 1 or boundaries[0].keep_changing,
    )


def _rope_parameters(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Those of every kind of layer that has its own."""
    config = model.config.get_text_config(decoder=True)
    parameters = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    return nested or [parameters]


def _rotary_layer_types(model: PreTrainedModel) -> list[str | None]:
    """The kinds of layer that have rotary angles of their own; `[None]` where all share them."""
    types = getattr(model.model.rotary_emb, "layer_types", None)
    return list(types) if types else [None]


@torch.no_grad()
def _rotary_table(model: PreTrainedModel, layer_type: str | None) -> RotaryTable:
    """What the model's own rotary embedding computes with, whatever scaling it has.

    Raises:
        UnsupportedModelError: it computes otherwise.
    """
    rotary = model.model.rotary_emb
    prefix = "" if layer_type is None else f"{layer_type}_"
    arguments = () if layer_type is None else (layer_type,)
    boundary = rope_boundary(model)

    def own(end: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the last 32 positions before `end`, in a text that ends there."""
        positions = torch.arange(max(0, end - 32), end).unsqueeze(0)
        cosines, sines = rotary(torch.zeros(1), positions, *arguments)
        half = cosines.shape[-1] // 2
        return cosines[0, :, :half], sines[0, :, :half]

    ends = {False: boundary.positions if boundary else model.config.max_position_embeddings}
    if boundary is not None and not boundary.keep_changing:
        ends[True] = boundary.positions + 1
    frequencies = {}
    own(1)  # a longer text may have changed it
    for is_long, end in ends.items():
        own(end)  # it sets its frequencies by the end of the text
        frequencies[is_long] = getattr(rotary, f"{prefix}inv_freq").detach().float().clone()
    long = frequencies.get(True)
    scaling = float(getattr(rotary, f"{prefix}attention_scaling"))
    table = RotaryTable(frequencies[False], scaling, long)
    for is_long, end in ends.items():
        expected = table.angles(max(0, end - 32), end, is_long)
        if not all(map(torch.equal, own(end), expected)):
            raise _unsupported("computes rotary angles otherwise than this model")
    own(1)  # as it was
    return table


def _query_scaling(model: PreTrainedModel) -> tuple[float, int] | None:
    parameters = getattr(model.config, "rope_parameters", None) or {}
    beta = parameters.get("llama_4_scaling_beta")
    if beta is None or model.config.model_type != "ministral3":
        return None
    return float(beta), int(parameters["original_max_position_embeddings"])


def layer_projections(model: PreTrainedModel, index: int) -> tuple[Pieces, ...]:
    """For each of `PROJECTIONS` the names of the linear layers in decoder layer `index` whose
    outputs stand below each other, and the rows of theirs to take (None: all)."""
    layer = model.model.layers[index]
    attention, mlp = layer.self_attn, layer.mlp
    inner = model.config.intermediate_size
    if hasattr(attention, "qkv_proj"):
        qkv: Pieces = (("self_attn.qkv_proj", None),)
    else:
        qkv = tuple((f"self_attn.{name}_proj", None) for name in "qkv")
    if hasattr(mlp, "gate_up_proj"):
        name = "mlp.gate_up_proj"
        gate_up: Pieces = ((name, slice(0, inner)), (name, slice(inner, 2 * inner)))
    else:
        gate_up = (("mlp.gate_proj", None), ("mlp.up_proj", None))
    return qkv, (("self_attn.o_proj", None),), gate_up, (("mlp.down_proj", None),)


def _layer_parts(model: PreTrainedModel, index: int) -> dict[str, Any]:
    """What `_core.Engine.load_layer` takes."""
    layer = model.model.layers[index]
    attention = layer.self_attn
    parts: dict[str, Any] = {
        name: _norm_weight(model, getattr(layer, attribute))
        for name, attribute in _NORMS[model.config.model_type].items()
    }
    for name, attribute in (("query_norm", "q_norm"), ("key_norm", "k_norm")):
        norm = getattr(attention, attribute, None)
        if norm is not None:
            parts[name] = _norm_weight(model, norm)
    for name, pieces in zip(PROJECTIONS, layer_projections(model, index), strict=True):
        bias = _bias(layer, pieces, interleaved=name == "gate_up")
        if bias is not None:
            parts[f"{name}_bias"] = bias
    parts["window"] = _window(model, index) or 0
    parts["rope"] = _rotary_table_of(model, index)
    return parts


def _norm_weight(model: PreTrainedModel, norm: nn.Module) -> Any:
    weight: Tensor = norm.get_parameter("weight").detach().float()
    if model.config.model_type.startswith("gemma"):
        weight = 1 + weight
    return weight.contiguous().numpy()


def _bias(layer: nn.Module, pieces: Pieces, interleaved: bool) -> Any:
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


def _rotary_table_of(model: PreTrainedModel, index: int) -> int:
    attention = model.model.layers[index].self_attn
    if not getattr(attention, "use_rope", True):
        return -1
    types = _rotary_layer_types(model)
    return 0 if types == [None] else types.index(attention.layer_type)


def _unsupported(reason: str) -> UnsupportedModelError:
    return UnsupportedModelError(f"the native engine {reason}; take --engine torch")

"""GGUF's architectures as `transformers` knows them: settings and names of tensors.

Sources: llama.cpp's converters (what a file's keys and tensors are made from) and its graphs (what
a missing key stands for).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from river_llm.load.gguf.file import GGUFTensor
from river_llm.load.gguf.metadata import Metadata
from river_llm.load.gguf.rope import rope_parameters

Tensors = dict[str, GGUFTensor]
Settings = dict[str, Any]

_LINEARS = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_PRE_NORMS = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm"}
_POST_NORMS = {
    "post_attention_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_SANDWICH_NORMS = {
    **_POST_NORMS,
    "attn_norm": "input_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
}
_LAYERS_OF_GEMMA3_27B = 62


@dataclass(frozen=True, slots=True)
class Architecture:
    """How a GGUF architecture becomes a model of `transformers`.

    Attributes:
        settings: those of its configuration beside sizes and rotary embedding, `model_type` among
            them.
        layer_parts: modules of a decoder layer by the tensors' names.
        is_permuted: rows of queries and keys lie so that neighbours are rotated together.
        norm_shift: what the file's norm weights have more than the model's.
    """

    settings: Callable[[Metadata, Tensors, int], Settings]
    layer_parts: dict[str, str]
    is_permuted: bool = False
    norm_shift: float = 0.0


def model_settings(metadata: Metadata, tensors: Tensors) -> tuple[Architecture, Settings]:
    """The architecture, and the fields of its configuration by what a file says.

    Raises:
        ModelLoadError: a setting is missing, out of its range or not for the architecture.
        KeyError: the architecture isn't described here.
    """
    architecture = ARCHITECTURES[metadata.architecture]
    layers = {name.split(".")[1] for name in tensors if name.startswith("blk.")}
    if len(layers) != metadata.count("block_count"):
        raise metadata.refusal(
            f"has tensors of {len(layers)} layers where its settings say "
            f"{metadata.take('block_count')}; get the whole file, or all parts of it"
        )
    hidden_size = metadata.count("embedding_length")
    heads = metadata.count("attention.head_count")
    kv_heads = metadata.count("attention.head_count_kv", heads)
    head_dim = metadata.count("attention.key_length", hidden_size // heads)
    if (
        heads % kv_heads
        or head_dim == 0
        or head_dim != metadata.count("attention.value_length", head_dim)
    ):
        raise metadata.refusal(
            f"has {heads} heads, {kv_heads} of keys, of dimensions that differ, which isn't "
            "supported; it may be damaged"
        )
    context = metadata.count("context_length")
    rotary_dims = metadata.count("rope.dimension_count", head_dim)
    metadata.take_same("attention.key_length_swa", head_dim)
    metadata.take_same("attention.value_length_swa", head_dim)
    metadata.take_same("rope.dimension_count_swa", rotary_dims)
    vocab_size = _vocab_size(metadata, tensors)
    settings = architecture.settings(metadata, tensors, head_dim)
    rope = rope_parameters(metadata, tensors, rotary_dims, context)
    if rotary_dims != head_dim:
        if settings["model_type"] != "phi3" or rotary_dims > head_dim:
            raise metadata.refusal(
                f"rotates {rotary_dims} of {head_dim} dimensions of a head, which its "
                "architecture doesn't do here"
            )
        rope["partial_rotary_factor"] = rotary_dims / head_dim
    if settings["model_type"] == "phi3":
        original = rope.get("original_max_position_embeddings", context)
        settings["original_max_position_embeddings"] = original
    sliding_rope = settings.pop("sliding_rope", None)
    if sliding_rope is not None:  # scaled are the angles of layers that see the whole text alone
        rope = {"full_attention": rope, "sliding_attention": sliding_rope}
    return architecture, {
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": vocab_size,
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in tensors,
        **settings,
    }


def _vocab_size(metadata: Metadata, tensors: Tensors) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise metadata.refusal("has no embedding, token_embd.weight; it holds no whole model")
    rows = embedding.shape[0]
    if metadata.count("vocab_size", rows) > rows:
        raise metadata.refusal(
            f"names {metadata.take('vocab_size')} tokens, and has embeddings of {rows}; it is "
            "damaged"
        )
    return rows


def _has(tensors: Tensors, *parts: str) -> bool:
    """Whether a layer has one of the tensors."""
    return any(name.split(".", 2)[-1] in parts for name in tensors if name.startswith("blk."))


def _biases(tensors: Tensors) -> Settings:
    attention = tuple(f"attn_{part}.bias" for part in ("q", "k", "v", "qkv", "output"))
    mlp = tuple(f"ffn_{part}.bias" for part in ("gate", "up", "down"))
    return {"attention_bias": _has(tensors, *attention), "mlp_bias": _has(tensors, *mlp)}


def _llama(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    has_biases = _biases(tensors)
    window = _window(metadata)
    if window is None:
        return {"model_type": "llama", **has_biases}
    if any(has_biases.values()):
        raise metadata.refusal("has biases and a sliding window, which isn't supported together")
    return {"model_type": "mistral", "sliding_window": window}


def _mistral3(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    if metadata.number("attention.temperature_scale", None) is None:
        return _llama(metadata, tensors, head_dim)
    return {"model_type": "ministral3", "sliding_window": None}


def _qwen2(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    return {"model_type": "qwen2", "use_sliding_window": False}


def _qwen3(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    has_biases = _has(tensors, *(f"attn_{part}.bias" for part in ("q", "k", "v", "output")))
    return {"model_type": "qwen3", "use_sliding_window": False, "attention_bias": has_biases}


def _smollm3(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    return {"model_type": "smollm3", "use_sliding_window": False, "no_rope_layer_interval": 4}


def _phi3(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    kind = metadata.take("rope.scaling.type", "longrope")
    if kind in ("linear", "yarn") and metadata.number("rope.scaling.factor", 1.0) != 1:
        raise metadata.refusal(f"scales its rotary angles by {kind}, which Phi-3 doesn't know here")
    return {"model_type": "phi3", "sliding_window": _window(metadata)}


def _olmo2(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    sliding = _sliding_layers(metadata, 4)
    if sliding is None:
        return {"model_type": "olmo2"}
    theta = metadata.number("rope.freq_base", 10_000.0)
    return {"model_type": "olmo3", **sliding, "sliding_rope": _sliding_rope(metadata, theta)}


def _gemma(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    return {"model_type": "gemma", "hidden_activation": "gelu_pytorch_tanh"}


def _gemma2(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    sliding = _sliding_layers(metadata, 2, window=4096)
    assert sliding is not None
    theta = metadata.number("rope.freq_base", 10_000.0)
    if metadata.number("rope.freq_base_swa", theta) != theta:
        raise metadata.refusal("has rotary angles of two bases, which Gemma 2 doesn't know")
    scale = metadata.number("attention.scale", _gemma_scale(metadata, head_dim, layers_of_27b=46))
    return {
        "model_type": "gemma2",
        **sliding,
        "query_pre_attn_scalar": _inverse_square(metadata, scale),
        "attn_logit_softcapping": _cap(metadata, "attn_logit_softcapping", 50.0),
        "final_logit_softcapping": _cap(metadata, "final_logit_softcapping", 30.0),
    }


def _gemma3(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    sliding = _sliding_layers(metadata, 6) or {
        "sliding_window": metadata.count("context_length"),  # which no layer has
        "layer_types": ["full_attention"] * metadata.count("block_count"),
    }
    default = _gemma_scale(metadata, head_dim, layers_of_27b=_LAYERS_OF_GEMMA3_27B)
    scale = metadata.number("attention.scale", default)
    return {
        "model_type": "gemma3_text",
        **sliding,
        "query_pre_attn_scalar": _inverse_square(metadata, scale),
        "final_logit_softcapping": _cap(metadata, "final_logit_softcapping", None),
        "sliding_rope": _sliding_rope(metadata, 10_000.0),
    }


def _gemma_scale(metadata: Metadata, head_dim: int, layers_of_27b: int) -> float:
    if metadata.count("block_count") != layers_of_27b:
        return 1 / math.sqrt(head_dim)
    return math.sqrt(metadata.count("attention.head_count") / metadata.count("embedding_length"))


def _inverse_square(metadata: Metadata, scale: float) -> int:
    """What attention is scaled by the inverse root of, as Gemma's configuration has it."""
    scalar = round(1 / scale**2)
    if not math.isclose(scalar * scale**2, 1, rel_tol=1e-4):
        raise metadata.refusal(f"scales attention by {scale}, which is no inverse root here")
    return scalar


def _cap(metadata: Metadata, key: str, default: float | None) -> float | None:
    """Of logits; None where the file says 0."""
    cap: float | None = None if metadata.take(key, default) == 0 else metadata.number(key, default)
    return cap


def _granite(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    if metadata.take("rope.scaling.finetuned", True) is False:
        raise metadata.refusal("has no rotary embedding, which isn't supported")
    return {
        **_biases(tensors),
        "model_type": "granite",
        "logits_scaling": metadata.number("logit_scale"),
        "residual_multiplier": metadata.number("residual_scale", 1.0),
        "embedding_multiplier": metadata.number("embedding_scale", 1.0),
        "attention_multiplier": metadata.number("attention.scale", 1 / math.sqrt(head_dim)),
    }


def _window(metadata: Metadata, default: int | None = None) -> int | None:
    """How many tokens attention looks back over; None: all."""
    key = "attention.sliding_window"
    window: int | None = None if metadata.take(key, default) == 0 else metadata.count(key, default)
    return window


def _sliding_layers(metadata: Metadata, every: int, window: int | None = None) -> Settings | None:
    """Which layers look back over a window; by default all but every so many-th. None: none do."""
    given = _window(metadata, window)
    if given is None:
        return None
    layers = metadata.count("block_count")
    pattern = metadata.take_list("attention.sliding_window_pattern")
    if pattern is None:
        every = metadata.count("attention.sliding_window_pattern", every)
        pattern = [(layer + 1) % every != 0 for layer in range(layers)]
    if len(pattern) < layers:
        raise metadata.refusal(f"says of {len(pattern)} of {layers} layers which have a window")
    kinds = ("full_attention", "sliding_attention")
    return {
        "sliding_window": given,
        "layer_types": [kinds[bool(slides)] for slides in pattern[:layers]],
    }


def _sliding_rope(metadata: Metadata, theta: float) -> Settings:
    given = metadata.number("rope.local.freq_base", theta)  # Ollama's name
    return {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base_swa", given)}


ARCHITECTURES = {
    "llama": Architecture(_llama, {**_LINEARS, **_PRE_NORMS}, is_permuted=True),
    "mistral3": Architecture(_mistral3, {**_LINEARS, **_PRE_NORMS}, is_permuted=True),
    "qwen2": Architecture(_qwen2, {**_LINEARS, **_PRE_NORMS}),
    "qwen3": Architecture(_qwen3, {**_LINEARS, **_HEAD_NORMS, **_PRE_NORMS}),
    "smollm3": Architecture(_smollm3, {**_LINEARS, **_PRE_NORMS}, is_permuted=True),
    "phi3": Architecture(
        _phi3,
        {
            **_LINEARS,
            **_PRE_NORMS,
            "attn_qkv": "self_attn.qkv_proj",
            "ffn_up": "mlp.gate_up_proj",
        },
    ),
    "olmo2": Architecture(_olmo2, {**_LINEARS, **_HEAD_NORMS, **_POST_NORMS}),
    "gemma": Architecture(_gemma, {**_LINEARS, **_PRE_NORMS}, norm_shift=1.0),
    "gemma2": Architecture(_gemma2, {**_LINEARS, **_SANDWICH_NORMS}, norm_shift=1.0),
    "gemma3": Architecture(_gemma3, {**_LINEARS, **_HEAD_NORMS, **_SANDWICH_NORMS}, norm_shift=1.0),
    "granite": Architecture(_granite, {**_LINEARS, **_PRE_NORMS}, is_permuted=True),
}

"""GGUF's architectures as `transformers` knows them: the settings of their configurations.

Sources: llama.cpp's converters (what a file's keys are made from) and its graphs (what a missing
key stands for).
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


@dataclass(frozen=True, slots=True)
class Architecture:
    """How a GGUF architecture becomes a model of `transformers`.

    Attributes:
        model_type: of its configuration, unless `settings` has another.
        settings: of the configuration beside sizes and rotary embedding, by metadata, tensors and
            the dimension of a head.
        is_permuted: rows of queries and keys lie so that neighbours are rotated together.
        norm_shift: what the file's norm weights have more than the model's.
    """

    model_type: str
    settings: Callable[[Metadata, Tensors, int], Settings] = lambda *_: {}
    is_permuted: bool = False
    norm_shift: float = 0.0


def model_settings(metadata: Metadata, tensors: Tensors) -> Settings:
    """The fields of a configuration, by what a file of one of `ARCHITECTURES` says.

    Raises:
        ModelLoadError: a setting is missing, out of its range or not for the architecture.
    """
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
    value_dim = metadata.count("attention.value_length", head_dim)
    if heads % kv_heads or head_dim == 0 or head_dim != value_dim:
        raise metadata.refusal(
            f"has {heads} heads, {kv_heads} of keys, of dimensions that differ, which isn't "
            "supported; it may be damaged"
        )
    context = metadata.count("context_length")
    rotary_dims = metadata.count("rope.dimension_count", head_dim)
    metadata.take_same("attention.key_length_swa", head_dim)
    metadata.take_same("attention.value_length_swa", head_dim)
    metadata.take_same("rope.dimension_count_swa", rotary_dims)
    architecture = ARCHITECTURES[metadata.architecture]
    settings = {"model_type": architecture.model_type}
    settings |= architecture.settings(metadata, tensors, head_dim)
    rope = rope_parameters(metadata, tensors, rotary_dims, context)
    if settings["model_type"] == "phi3":
        original = rope.get("original_max_position_embeddings", context)
        settings["original_max_position_embeddings"] = original
    if rotary_dims != head_dim:
        if settings["model_type"] != "phi3" or rotary_dims > head_dim:
            raise metadata.refusal(
                f"rotates {rotary_dims} of {head_dim} dimensions of a head, which its "
                "architecture doesn't do here"
            )
        rope["partial_rotary_factor"] = rotary_dims / head_dim
    sliding_rope = settings.pop("sliding_rope", None)
    if sliding_rope is not None:  # scaled are the angles of layers that see the whole text alone
        rope = {"full_attention": rope, "sliding_attention": sliding_rope}
    return {
        "hidden_size": hidden_size,
        "num_hidden_layers": len(layers),
        "intermediate_size": metadata.count("feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": context,
        "rms_norm_eps": metadata.number("attention.layer_norm_rms_epsilon"),
        "vocab_size": _vocab_size(metadata, tensors),
        "rope_parameters": rope,
        "tie_word_embeddings": "output.weight" not in tensors,
        **settings,
    }


def _vocab_size(metadata: Metadata, tensors: Tensors) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise metadata.refusal("has no embedding, token_embd.weight; it holds no whole model")
    rows = embedding.shape[0]
    named = metadata.count("vocab_size", rows)
    if named > rows:
        raise metadata.refusal(f"names {named} tokens, and has embeddings of {rows}; it is damaged")
    return rows


def _has_biases(tensors: Tensors, *parts: str) -> bool:
    biases = {f"{part}.bias" for part in parts}
    return any(name.split(".", 2)[-1] in biases for name in tensors if name.startswith("blk."))


def _biases(tensors: Tensors) -> Settings:
    attention = _has_biases(tensors, *(f"attn_{x}" for x in ("q", "k", "v", "qkv", "output")))
    mlp = _has_biases(tensors, "ffn_gate", "ffn_up", "ffn_down")
    return {"attention_bias": attention, "mlp_bias": mlp}


def _llama(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    biases = _biases(tensors)
    window = _zero_is_none(metadata, metadata.count, "attention.sliding_window", None)
    if window is None:
        return biases
    if any(biases.values()):
        raise metadata.refusal("has biases and a sliding window, which isn't supported together")
    return {"model_type": "mistral", "sliding_window": window}


def _mistral3(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    if metadata.number("attention.temperature_scale", None) is None:
        return {"model_type": "llama"} | _llama(metadata, tensors, head_dim)
    return {"sliding_window": None}


def _qwen3(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    bias = _has_biases(tensors, "attn_q", "attn_k", "attn_v", "attn_output")
    return {"attention_bias": bias}


def _phi3(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    kind = metadata.take("rope.scaling.type", "longrope")
    if kind in ("linear", "yarn") and metadata.number("rope.scaling.factor", 1.0) != 1:
        raise metadata.refusal(f"scales its rotary angles by {kind}, which Phi-3 doesn't know here")
    window = _zero_is_none(metadata, metadata.count, "attention.sliding_window", None)
    return {"sliding_window": window}


def _olmo2(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    sliding = _sliding_layers(metadata, 4)
    if not sliding:
        return {}
    theta = metadata.number("rope.freq_base", 10_000.0)
    return {"model_type": "olmo3", **sliding, "sliding_rope": _sliding_rope(metadata, theta)}


def _gemma2(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    theta = metadata.number("rope.freq_base", 10_000.0)
    if metadata.number("rope.freq_base_swa", theta) != theta:
        raise metadata.refusal("has rotary angles of two bases, which Gemma 2 doesn't know")
    scale = _query_scale(metadata, head_dim, layers_of_27b=46)
    caps = {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0}
    return {
        "query_pre_attn_scalar": scale,
        **_sliding_layers(metadata, 2, window=4096),
        **{key: _zero_is_none(metadata, metadata.number, key, cap) for key, cap in caps.items()},
    }


def _gemma3(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    sliding = _sliding_layers(metadata, 6) or {
        "sliding_window": metadata.count("context_length"),  # which no layer has
        "layer_types": ["full_attention"] * metadata.count("block_count"),
    }
    cap = "final_logit_softcapping"
    return {
        "query_pre_attn_scalar": _query_scale(metadata, head_dim, layers_of_27b=62),
        **sliding,
        cap: _zero_is_none(metadata, metadata.number, cap, None),
        "sliding_rope": _sliding_rope(metadata, 10_000.0),
    }


def _granite(metadata: Metadata, tensors: Tensors, head_dim: int) -> Settings:
    if metadata.take("rope.scaling.finetuned", True) is False:
        raise metadata.refusal("has no rotary embedding, which isn't supported")
    return {
        **_biases(tensors),
        "logits_scaling": metadata.number("logit_scale"),
        "residual_multiplier": metadata.number("residual_scale", 1.0),
        "embedding_multiplier": metadata.number("embedding_scale", 1.0),
        "attention_multiplier": metadata.number("attention.scale", 1 / math.sqrt(head_dim)),
    }


def _query_scale(metadata: Metadata, head_dim: int, layers_of_27b: int) -> int:
    """What attention is scaled by the inverse root of, as Gemma's configuration has it."""
    default = 1 / math.sqrt(head_dim)
    if metadata.count("block_count") == layers_of_27b:
        heads = metadata.count("attention.head_count")
        default = math.sqrt(heads / metadata.count("embedding_length"))
    scale = metadata.number("attention.scale", default)
    scalar: int = round(1 / scale**2)
    if not math.isclose(scalar * scale**2, 1, rel_tol=1e-4):
        raise metadata.refusal(f"scales attention by {scale}, which is no inverse root here")
    return scalar


def _zero_is_none(metadata: Metadata, read: Callable[..., Any], key: str, default: Any) -> Any:
    """A window over which attention looks back, or a cap of logits; None: there is none."""
    return None if metadata.take(key, default) == 0 else read(key, default)


def _sliding_layers(metadata: Metadata, every: int, window: int | None = None) -> Settings:
    """Which layers look back over a window; by default all but every so many-th. Empty: none do."""
    given = _zero_is_none(metadata, metadata.count, "attention.sliding_window", window)
    if given is None:
        return {}
    layers = metadata.count("block_count")
    pattern = metadata.take_list("attention.sliding_window_pattern")
    if pattern is None:
        every = metadata.count("attention.sliding_window_pattern", every)
        pattern = [(layer + 1) % every != 0 for layer in range(layers)]
    if len(pattern) < layers:
        raise metadata.refusal(f"says of {len(pattern)} of {layers} layers which have a window")
    kinds = ["sliding_attention" if slides else "full_attention" for slides in pattern[:layers]]
    return {"sliding_window": given, "layer_types": kinds}


def _sliding_rope(metadata: Metadata, theta: float) -> Settings:
    given = metadata.number("rope.local.freq_base", theta)  # Ollama's name
    return {"rope_type": "default", "rope_theta": metadata.number("rope.freq_base_swa", given)}


ARCHITECTURES = {
    "llama": Architecture("llama", _llama, is_permuted=True),
    "mistral3": Architecture("ministral3", _mistral3, is_permuted=True),
    "qwen2": Architecture("qwen2"),
    "qwen3": Architecture("qwen3", _qwen3),
    "smollm3": Architecture("smollm3", is_permuted=True),
    "phi3": Architecture("phi3", _phi3),
    "olmo2": Architecture("olmo2", _olmo2),
    "gemma": Architecture("gemma", norm_shift=1.0),
    "gemma2": Architecture("gemma2", _gemma2, norm_shift=1.0),
    "gemma3": Architecture("gemma3_text", _gemma3, norm_shift=1.0),
    "granite": Architecture("granite", _granite, is_permuted=True),
}

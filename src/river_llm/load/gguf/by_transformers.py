"""GGUF files of further architectures: read by `transformers`, and held against the file.

`transformers`' reader drops tensors and settings that it doesn't know without a word; here each of
them is looked for in what came of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from river_llm.load.gguf.file import GGUFContent
from river_llm.load.gguf.metadata import Metadata
from river_llm.river.backbone import check_kind

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Settings of a GGUF file that `transformers` doesn't read, and what they are in a configuration:
# they may stand there only with the value that the configuration has all the same.
_SAME_AS = {
    "attention.key_length": "head_dim",
    "attention.value_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.layer_norm_epsilon": "layer_norm_epsilon layer_norm_eps norm_epsilon norm_eps",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "feed_forward_length": "intermediate_size n_inner ffn_hidden_size",
    "final_logit_softcapping": "final_logit_softcapping",
    "logit_scale": "logit_scale",
    "context_length": "max_position_embeddings n_positions seq_length",
    "attention.head_count_kv": "num_key_value_heads num_kv_heads",
    "use_parallel_residual": "use_parallel_residual parallel_attn",
}


def check_architecture(metadata: Metadata) -> None:
    """
    Raises:
        ModelLoadError: `transformers` doesn't know it.
    """
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    if metadata.architecture not in GGUF_SUPPORTED_ARCHITECTURES:
        raise metadata.refusal(
            f"has an architecture that transformers doesn't know as GGUF ({metadata.architecture});"
            " take the model's safetensors, or another model"
        )


def load_by_transformers(
    content: GGUFContent,
    metadata: Metadata,
    known_keys: frozenset[str],
    num_parts: int,
    dtype: torch.dtype,
) -> PreTrainedModel:
    """The model of a file whose architecture isn't described here.

    Args:
        known_keys: of the metadata, those of the tokenizer.
        num_parts: of the file.

    Raises:
        ModelLoadError: it can't be read, or something of it got lost.
        UnsupportedModelError: it is a mixture of experts or keeps a recurrent state.
    """
    from transformers import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        AutoConfig,
        AutoModelForCausalLM,
        GgufConfig,
    )

    if num_parts > 1:
        raise metadata.refusal(
            f"is one of {num_parts} parts, of an architecture that is read from one file "
            f"({metadata.architecture}); join them with: llama-gguf-split --merge"
        )
    where, name = content.path.parent, content.path.name
    config = AutoConfig.from_pretrained(where, gguf_file=name)
    check_kind(config, MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None))
    model, info = AutoModelForCausalLM.from_pretrained(
        where,
        gguf_file=name,
        quantization_config=GgufConfig(gguf_file=name, dequantize=True),
        dtype=dtype,
        output_loading_info=True,
    )
    if info["missing_keys"]:
        raise metadata.refusal(
            f"lacks {len(info['missing_keys'])} of the model's tensors, "
            f"{min(info['missing_keys'])} among them; get the whole file"
        )
    lost = sorted(_lost_tensors(content, model))
    if lost:
        raise metadata.refusal(
            f"has {len(lost)} tensors that would go nowhere, {lost[0]} among them; take the "
            "model's safetensors"
        )
    metadata.check_all_taken(known_keys | frozenset(_settings_read(content, metadata, model)))
    checked: PreTrainedModel = model
    return checked


def _lost_tensors(content: GGUFContent, model: PreTrainedModel) -> set[str]:
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    architecture = content.metadata["general.architecture"]
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    read = get_gguf_hf_weights_map(model, processor)
    head = {"output.weight"} if "lm_head.weight" in model.state_dict() else set()
    return set(content.tensors) - set(read) - head


def _settings_read(
    content: GGUFContent, metadata: Metadata, model: PreTrainedModel
) -> Iterator[str]:
    """Keys of the architecture that `transformers` took, or that say what the model has anyway."""
    from transformers.integrations import GGUF_CONFIG_MAPPING

    config = model.config
    taken = GGUF_CONFIG_MAPPING[metadata.architecture]
    rope = getattr(config, "rope_parameters", None) or {}
    rope = rope.get("full_attention", rope)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for key, value in content.metadata.items():
        architecture, _, own = key.partition(".")
        if architecture != metadata.architecture:
            continue
        if own == "rope.freq_base":
            same = [rope.get("rope_theta")]
        elif own == "rope.dimension_count":
            same = [int(head_dim * (rope.get("partial_rotary_factor") or 1))]
        else:
            same = [getattr(config, name, None) for name in _SAME_AS.get(own, "").split()]
            if taken.get(own) is not None:
                same = [value]
        if any(_is_near(one, value) for one in same):
            yield key


def _is_near(own: Any, value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return bool(own == value)
    return isinstance(own, int | float) and math.isclose(own, value, rel_tol=1e-5)

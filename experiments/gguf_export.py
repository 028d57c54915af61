"""A Llama of `transformers` as a GGUF file, so that llama.cpp runs the very same weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel

_LAYER_TENSORS = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_proj.weight": "ffn_gate.weight",
    "mlp.up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def write_gguf(model: PreTrainedModel, path: Path) -> None:
    """Write the model in bfloat16, norms in float32. It has no vocabulary, only token ids.

    Raises:
        SystemExit: it is no plain Llama: of another architecture, with biases, or with rotary
            angles that change with the length.
    """
    rotary = model.model.rotary_emb
    names = {name for name, _ in model.model.layers[0].named_parameters()}
    if (
        model.config.model_type != "llama"
        or rotary.rope_type not in ("default", "linear", "llama3")
        or rotary.attention_scaling != 1
        or names != set(_LAYER_TENSORS)
    ):
        raise SystemExit("llama.cpp is compared on plain Llamas alone: --baselines transformers")
    config = model.config
    head_dim = model.model.layers[0].self_attn.head_dim
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    writer.add_tokenizer_model("none")
    embedding = model.get_input_embeddings().weight
    writer.add_vocab_size(embedding.shape[0])

    _add(writer, "token_embd.weight", embedding)
    _add(writer, "output_norm.weight", model.model.norm.weight)
    head = model.get_output_embeddings().weight
    if head.data_ptr() != embedding.data_ptr():
        _add(writer, "output.weight", head)
    factors = _rotary_factors(model)
    if factors is not None:
        writer.add_tensor("rope_freqs.weight", factors.numpy())
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for index, layer in enumerate(model.model.layers):
        for name, parameter in layer.named_parameters():
            projection = name.split(".")[-2]
            if projection in heads:
                parameter = _interleave_halves(parameter, heads[projection])
            _add(writer, f"blk.{index}.{_LAYER_TENSORS[name]}", parameter)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add(writer: Any, name: str, parameter: Tensor) -> None:
    weight = parameter.detach().contiguous()
    if weight.ndim == 1:
        writer.add_tensor(name, weight.float().numpy())
    else:
        raw = weight.to(torch.bfloat16).view(torch.uint8).numpy()
        writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)


def _interleave_halves(weight: Tensor, num_heads: int) -> Tensor:
    """llama.cpp rotates neighbouring rows of a head, transformers row i of a head's first half with
    row i of its second."""
    rows, columns = weight.shape
    halves = weight.detach().view(num_heads, 2, rows // num_heads // 2, columns)
    return halves.transpose(1, 2).reshape(rows, columns)


def _rotary_factors(model: PreTrainedModel) -> Tensor | None:
    """What llama.cpp divides each frequency by, float32 `[head_dim / 2]`; None if by nothing."""
    rotary = model.model.rotary_emb
    actual = rotary.inv_freq.float()
    plain, _ = rotary.compute_default_rope_parameters(model.config)
    factors = plain.to(actual.device) / actual
    return None if torch.allclose(factors, torch.ones_like(factors)) else factors

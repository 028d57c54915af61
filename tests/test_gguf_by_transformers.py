"""GGUF files of architectures that `transformers` reads: what its reader drops is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from byte_models import IDS, TOKENS, TYPES, byte_model
from transformers.modeling_gguf_pytorch_utils import TensorProcessor, get_gguf_hf_weights_map

from river_llm.errors import ModelLoadError
from river_llm.load.gguf import load_gguf

_METADATA = {
    "context_length": 512,
    "embedding_length": 64,
    "block_count": 4,
    "feed_forward_length": 128,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "attention.layer_norm_epsilon": 1e-5,
    "rope.freq_base": 1e4,
}
_OF_STABLELM = {"rope.dimension_count": 4, "use_parallel_residual": False}


def _save(
    path: Path, architecture: str, class_name: str, metadata: dict[str, Any], *more_tensors: str
) -> Any:
    """Write a random model of the class, and return it."""
    model = byte_model(class_name, dtype=torch.float32)
    for parameter in model.parameters():
        if parameter.ndim == 1:  # biases and norms count
            torch.nn.init.normal_(parameter, mean=float(parameter.mean()), std=0.2)
    writer = gguf.GGUFWriter(str(path), architecture)
    adders = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool}
    for key, value in {**_METADATA, **metadata}.items():
        adders[type(value)](f"{architecture}.{key}", value)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(TOKENS)
    writer.add_token_types(TYPES)
    writer.add_token_merges(["a b"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    weights = model.state_dict()
    names = get_gguf_hf_weights_map(model, TensorProcessor(config=model.config.to_dict()))
    for name, own in names.items():
        writer.add_tensor(name, weights[own].numpy())
    for name in more_tensors:
        writer.add_tensor(name, np.ones(64, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


@pytest.mark.parametrize(
    ("architecture", "class_name", "metadata"),
    [("starcoder2", "Starcoder2", {}), ("stablelm", "StableLm", _OF_STABLELM)],
)
def test_a_whole_file_gives_its_model(
    architecture: str, class_name: str, metadata: dict[str, Any], tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    model = _save(file, architecture, class_name, metadata)
    read = load_gguf([file], torch.float32)[0]
    with torch.no_grad():
        own, other = (one(torch.tensor([IDS[:50]])).logits for one in (model, read))
    assert torch.equal(own, other)


@pytest.mark.parametrize(
    ("metadata", "tensor", "message"),
    [
        ({"logit_scale": 0.5}, None, r"starcoder2\.logit_scale = 0\.5"),
        ({"rope.freq_base": 5e5}, None, r"starcoder2\.rope\.freq_base"),
        ({"attention.sliding_window": 8}, None, "sliding_window = 8"),
        ({}, "rope_freqs.weight", "1 tensors that would go nowhere, rope_freqs.weight"),
        ({}, "blk.1.attn_q_norm.weight", "attn_q_norm"),
    ],
)
def test_what_its_reader_drops_is_refused(
    metadata: dict[str, Any], tensor: str | None, message: str, tmp_path: Path
) -> None:
    file = tmp_path / "model.gguf"
    _save(file, "starcoder2", "Starcoder2", metadata, *([] if tensor is None else [tensor]))
    with pytest.raises(ModelLoadError, match=message):
        load_gguf([file], torch.float32)

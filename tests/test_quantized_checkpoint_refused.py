"""What is no checkpoint of a model in few bits is refused in one line, which names the matrix."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_models import Packed, byte_model, save_gguf
from gguf import GGMLQuantizationType as Kind
from packed_checkpoints import (
    AWQ,
    GPTQ,
    SIZES,
    blocks_of,
    in_kind,
    save_checkpoint,
    wide_model,
    write_folder,
)
from safetensors.torch import load_file
from tiny_models import tiny_model
from transformers import PreTrainedModel

from river_llm.errors import ModelLoadError
from river_llm.load.quantized import import_river


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return byte_model(**SIZES)


def changed(**change: Any) -> Callable[[Path, PreTrainedModel], None]:
    """A GPTQ checkpoint with other tensors of one layer's weight; None: without it."""
    name = "model.layers.1.self_attn.k_proj"

    def write(folder: Path, model: PreTrainedModel) -> None:
        save_checkpoint(folder, model, GPTQ)
        weights = load_file(folder / "model.safetensors")
        for part, make in change.items():
            tensor = weights.pop(f"{name}.{part}")
            if make is not None:
                weights[f"{name}.{part}"] = make(tensor).contiguous()
        write_folder(folder, model, GPTQ, weights)

    return write


def configured(**settings: Any) -> Callable[[Path, PreTrainedModel], None]:
    def write(folder: Path, model: PreTrainedModel) -> None:
        save_checkpoint(folder, model, GPTQ)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = settings or None
        (folder / "config.json").write_text(json.dumps(config))

    return write


def of(other: PreTrainedModel) -> Callable[[Path, PreTrainedModel], None]:
    return lambda folder, model: save_checkpoint(folder, other, GPTQ) and None


def _without_shard(folder: Path, model: PreTrainedModel) -> None:
    save_checkpoint(folder, model, GPTQ)
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "gone.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _scaled_like_awq(folder: Path, model: PreTrainedModel) -> None:
    """Factors of inputs are folded into the norm before them."""
    scaled = byte_model(**SIZES)
    layer = scaled.model.layers[2]
    factors = torch.linspace(0.5, 2, len(layer.input_layernorm.weight))
    layer.input_layernorm.weight.data /= factors
    for name in ("q_proj", "k_proj", "v_proj"):
        layer.self_attn.get_submodule(name).weight.data *= factors
    save_checkpoint(folder, scaled, AWQ)


def _cut_short(folder: Path, model: PreTrainedModel) -> None:
    save_checkpoint(folder, model, GPTQ)
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def _other_seed() -> PreTrainedModel:
    model = byte_model(**SIZES)
    generator = torch.Generator().manual_seed(9)
    for weight in model.parameters():
        if weight.ndim == 2:
            weight.data.normal_(std=0.1, generator=generator)
    return model


K_PROJ = r"^model\.layers\.1\.self_attn\.k_proj of \S+ "
REFUSED: dict[str, tuple[Callable[[Path, PreTrainedModel], None], str]] = {
    "act-order": (
        changed(g_idx=lambda one: one.flip(0)),
        K_PROJ + "has its columns in the order of their activations.*desc_act=false",
    ),
    "factors in norms": (
        _scaled_like_awq,
        r"^model\.layers\.2\.input_layernorm\.weight of \S+ is not the backbone's, as after AWQ",
    ),
    "bits": (changed(qweight=lambda one: one[: 5 * len(one) // 4].repeat(2, 1)[:20]), "has 5 bits"),
    "no scales": (changed(scales=None), K_PROJ + "lacks its scales; get"),
    "not finite": (changed(scales=lambda one: one * torch.inf), K_PROJ + "has values that are not"),
    "fewer outputs": (
        changed(qweight=lambda one: one[:, :64]),
        K_PROJ + r"has a qweight of shape \[16, 64\] where the backbone's weight needs \[16, 128\]",
    ),
    "a layer less": (
        changed(qweight=None, scales=None, qzeros=None, g_idx=None),
        K_PROJ + "is missing; take",
    ),
    "other weights": (of(_other_seed()), "layers.0.self_attn.q_proj of .* is another model's"),
    "another model": (of(byte_model()), r"is \[64\], and the backbone's \[128\]; take"),
    "not quantised": (
        lambda folder, model: write_folder(folder, model, GPTQ, model.state_dict()),
        "has no quantised linear layers of this model's",
    ),
    "no settings": (configured(), "isn't quantised; take a checkpoint of GPTQ"),
    "another method": (configured(quant_method="fp8"), "is quantised by fp8; take a checkpoint"),
    "gemv": (configured(quant_method="awq", version="GEMV"), "awq's format 'gemv'; take .* gemm"),
    "marlin": (configured(quant_method="gptq", checkpoint_format="marlin"), "format 'marlin'"),
    "float8": (
        configured(quant_method="compressed-tensors", format="float-quantized"),
        "format 'float-quantized'; take one of the format pack-quantized",
    ),
    "a part is gone": (_without_shard, "lacks gone.safetensors"),
    "cut short": (_cut_short, "can't be read, a file may be cut short"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_checkpoint_of_the_model_is_refused_in_one_line(
    name: str, model: PreTrainedModel, tmp_path: Path
) -> None:
    write, message = REFUSED[name]
    write(tmp_path / "c", model)
    with pytest.raises(ModelLoadError, match=message) as caught:
        import_river(model, tmp_path / "c")
    assert "\n" not in str(caught.value)
    assert "; " in str(caught.value)


def test_gguf_files_of_other_models_are_refused(model: PreTrainedModel, tmp_path: Path) -> None:
    plain = save_gguf(tmp_path / "plain.gguf", model, pre="gpt-2")
    with pytest.raises(ModelLoadError, match="has no quantised linear layers"):
        import_river(model, plain)

    def wide(name: str, weight: np.ndarray) -> Packed | None:
        weight = np.tile(weight, (2, 1)) if "ffn_gate" in name else weight
        return in_kind(Kind.Q4_0)(name, weight)

    other = save_gguf(tmp_path / "wide.gguf", model, pack=wide, pre="gpt-2")
    with pytest.raises(ModelLoadError, match=r"gate_proj of .* is \[256, 128\], and the back"):
        import_river(model, other)
    other = save_gguf(tmp_path / "o.gguf", wide_model(), pack=blocks_of(Kind.Q4_0), pre="gpt-2")
    with pytest.raises(ModelLoadError, match=r"layers\.0\.self_attn\.q_proj of .* is another"):
        import_river(wide_model(), other)


def test_no_group_divides_some_widths(tmp_path: Path) -> None:
    narrow = tiny_model("Llama", intermediate_size=80)
    save_checkpoint(tmp_path / "c", narrow, GPTQ, group_size=16)
    with pytest.raises(ValueError, match="no group size divides the input width 80"):
        import_river(narrow, tmp_path / "c")

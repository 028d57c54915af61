"""Checkpoints in few bits of tiny models, written plainly from the descriptions of their formats.

Sources: AutoGPTQ (`qlinear_cuda_old.py`), GPTQModel (`gptq_v2`), AutoAWQ
(`modules/linear/gemm.py`), compressed-tensors (`pack_quantized.py`).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from byte_models import Packed, byte_model
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf.quants import quantize
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from river_llm.river.backbone import decoder_layers, linear_weight

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": False}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
SIZES = {"num_attention_heads": 4, "num_key_value_heads": 4, "hidden_size": 128}
# Where blocks of random bytes have numbers in float16.
SCALE_PLACES: dict[Kind, tuple[int, ...]] = {
    **dict.fromkeys((Kind.Q4_0, Kind.Q5_0, Kind.Q8_0), (0,)),
    **dict.fromkeys((Kind.Q4_1, Kind.Q5_1, Kind.Q4_K, Kind.Q5_K), (0, 2)),
    Kind.Q6_K: (208,),
    Kind.Q3_K: (108,),
    Kind.IQ4_XS: (0,),
}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


@dataclass(frozen=True)
class Rounded:
    """A weight rounded to nearest: ``(code - zero_point) * scale``.

    Attributes:
        codes: `[out_features, in_features]`.
        scales: float16 `[out_features, groups]`.
        zero_points: `[out_features, groups]`, in units of codes.
    """

    codes: np.ndarray
    scales: np.ndarray
    zero_points: np.ndarray
    bits: int

    @classmethod
    def of(cls, weight: Tensor, bits: int, group_size: int, is_symmetric: bool) -> Rounded:
        rows = len(weight)
        groups = weight.detach().float().numpy().reshape(rows, -1, group_size)
        top = 2**bits - 1
        if is_symmetric:
            scales = 2 * np.abs(groups).max(-1) / top
            zero_points = np.full(scales.shape, (top + 1) // 2)
        else:
            low, high = np.minimum(groups.min(-1), 0), np.maximum(groups.max(-1), 0)
            scales = (high - low) / top
            zero_points = np.round(-low / scales).astype(int)
        scales = scales.astype(np.float16)
        codes = np.round(groups / scales[..., None].astype(float)) + zero_points[..., None]
        codes = codes.clip(0, top).astype(int).reshape(rows, -1)
        return cls(codes, scales, zero_points, bits)

    def values(self) -> Tensor:
        """What the formats say that it means, float64."""
        each = self.codes.shape[1] // self.scales.shape[1]
        zero_points, scales = (
            np.repeat(one.astype(float), each, 1) for one in (self.zero_points, self.scales)
        )
        return torch.from_numpy((self.codes - zero_points) * scales)


def save_checkpoint(
    folder: Path,
    model: PreTrainedModel,
    settings: Mapping[str, Any],
    bits: int = 4,
    group_size: int = 32,
    is_symmetric: bool = False,
) -> dict[str, Rounded]:
    """Write a folder, with `settings` as its quantization_config; what it holds, by the layers'
    names."""
    linears = {
        f"{layer.name}.{name}": linear_weight(linear)
        for layer in decoder_layers(model)
        for name, linear in layer.linears.items()
    }
    tensors = {
        name: tensor.contiguous()
        for name, tensor in model.state_dict().items()
        if name.removesuffix(".weight") not in linears
    }
    held = {}
    for name, weight in linears.items():
        size = weight.shape[1] if group_size == -1 else group_size
        held[name] = Rounded.of(weight, bits, size, is_symmetric)
        for part, tensor in _parts(held[name], settings, is_symmetric).items():
            tensors[f"{name}.{part}"] = tensor.contiguous()
    write_folder(folder, model, settings, tensors)
    return held


def write_folder(
    folder: Path, model: PreTrainedModel, settings: Mapping[str, Any], tensors: dict[str, Tensor]
) -> None:
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {**model.config.to_dict(), "quantization_config": dict(settings)}
    (folder / "config.json").write_text(json.dumps(config))


def _parts(weight: Rounded, settings: Mapping[str, Any], is_symmetric: bool) -> dict[str, Tensor]:
    method, bits = settings["quant_method"], weight.bits
    if method == "compressed-tensors":
        middle = 2 ** (bits - 1)
        parts = {
            "weight_packed": _words(weight.codes, bits),
            "weight_scale": torch.from_numpy(weight.scales).bfloat16(),
            "weight_shape": torch.tensor(weight.codes.shape),
        }
        weight.scales[:] = parts["weight_scale"].float().numpy()
        if not is_symmetric and settings.get("zeros") == "int8":
            zero_points = weight.zero_points - middle
            parts["weight_zero_point"] = torch.from_numpy(zero_points.astype(np.int8))
        elif not is_symmetric:
            parts["weight_zero_point"] = _words(weight.zero_points.T, bits).T
        return parts
    scales = torch.from_numpy(weight.scales.T.copy())
    if method == "awq":
        return {
            "qweight": _awq_words(weight.codes.T),
            "qzeros": _awq_words(weight.zero_points.T),
            "scales": scales,
        }
    shift = 0 if settings.get("checkpoint_format") == "gptq_v2" else 1
    columns = np.arange(weight.codes.shape[1])
    return {
        "qweight": _stream(weight.codes, bits).T,
        "qzeros": _stream((weight.zero_points.T - shift) % 2**bits, bits),
        "scales": scales,
        "g_idx": torch.from_numpy(columns // (len(columns) // len(scales))).int(),
    }


def _stream(codes: np.ndarray, bits: int) -> Tensor:
    """Each row as one long number, cut into words."""
    rows = []
    for row in codes.tolist():
        number = sum(code << (bits * place) for place, code in enumerate(row))
        rows.append(number.to_bytes(len(row) * bits // 8, "little"))
    return torch.from_numpy(np.stack([np.frombuffer(row, np.int32).copy() for row in rows]))


def _words(codes: np.ndarray, bits: int) -> Tensor:
    """As many whole codes of a row in each word as it has room for."""
    room = 32 // bits
    words = np.zeros((len(codes), -(-codes.shape[1] // room)), np.uint32)
    for column in range(codes.shape[1]):
        word, lane = divmod(column, room)
        words[:, word] |= codes[:, column].astype(np.uint32) << np.uint32(lane * bits)
    return torch.from_numpy(words.view(np.int32))


def _awq_words(codes: np.ndarray) -> Tensor:
    words = np.zeros((len(codes), codes.shape[1] // 8), np.uint32)
    for word in range(words.shape[1]):
        for place, output in enumerate(_AWQ_ORDER):
            column = codes[:, word * 8 + output].astype(np.uint32)
            words[:, word] |= column << np.uint32(4 * place)
    return torch.from_numpy(words.view(np.int32))


def random_rows(kind: Kind, shape: tuple[int, int], seed: int) -> np.ndarray:
    """Random blocks, with scales as weights have them."""
    random = np.random.default_rng(seed)
    block, block_bytes = GGML_QUANT_SIZES[kind]
    rows = random.integers(0, 256, (shape[0] * shape[1] // block, block_bytes), dtype=np.uint8)
    for place in SCALE_PLACES[kind]:
        size = float(random.uniform(1e-4, 1e-2)) * random.choice([1, -1], len(rows))
        rows[:, place : place + 2] = size.astype("<f2")[:, None].view(np.uint8)
    return rows.reshape(shape[0], -1)


def wide_model() -> PreTrainedModel:
    return byte_model(hidden_size=256, intermediate_size=256)


def blocks_of(kind: Kind) -> Callable[[str, np.ndarray], Packed | None]:
    def pack(name: str, weight: np.ndarray) -> Packed | None:
        if not name.startswith("blk.") or weight.ndim != 2:
            return None
        rows, columns = weight.shape
        return random_rows(kind, (rows, columns), sum(name.encode())), kind

    return pack


def in_kind(kind: Kind, **others: Kind) -> Callable[[str, np.ndarray], Packed | None]:
    """Linear layers of a GGUF file as its package quantises them; `others` by their names."""

    def pack(name: str, weight: np.ndarray) -> Packed | None:
        if not name.startswith("blk.") or weight.ndim != 2:
            return None
        own = others.get(name.split(".")[-2], kind)
        return quantize(weight, own), own

    return pack

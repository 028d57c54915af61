"""The tensors of a GGUF file as the weights of a model of `transformers`, all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import gguf
import torch
from torch import Tensor

from river_llm.load.gguf.architectures import ARCHITECTURES
from river_llm.load.gguf.file import GGUFTensor
from river_llm.load.gguf.metadata import Metadata
from river_llm.load.gguf.rope import ROPE_TENSORS

_QKV = ("q_proj", "k_proj", "v_proj")


@dataclass(frozen=True, slots=True)
class Piece:
    """Rows of a tensor that become a weight, or a part of one.

    Attributes:
        heads: of queries or keys whose rows stand as neighbours are rotated; 0: as they are.
        shift: what the values have more than the weight's.
    """

    tensor: GGUFTensor
    start: int = 0
    end: int | None = None
    heads: int = 0
    shift: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.tensor.shape
        return shape if self.end is None else (self.end - self.start, *shape[1:])

    def arrange(self, rows: Tensor) -> Tensor:
        """The piece's rows, in the model's order, out of those of the tensor."""
        if self.end is not None:
            rows = rows[self.start : self.end]
        if self.heads:  # [heads, dims / 2, 2] to [heads, 2, dims / 2]
            pairs = rows.reshape(self.heads, -1, 2, *rows.shape[1:])
            rows = pairs.transpose(1, 2).reshape(rows.shape)
        return rows

    def read(self, dtype: torch.dtype) -> Tensor:
        """Its values, dequantised."""
        weight = self.arrange(self.tensor.read(torch.float32 if self.shift else dtype))
        if self.shift:
            weight = (weight - self.shift).to(dtype)
        return weight.contiguous()


def read_weights(
    metadata: Metadata,
    tensors: dict[str, GGUFTensor],
    shapes: dict[str, tuple[int, ...]],
    config: Any,
    dtype: torch.dtype,
) -> dict[str, Tensor]:
    """All weights of a model, from all tensors of its file but those of the rotary embedding;
    biases that the file leaves out are 0. Names and shapes are compared before anything is read.

    Args:
        shapes: of the model's weights, by their names in `transformers`.

    Raises:
        ModelLoadError: a tensor becomes no weight, a weight has no tensor, or shapes differ.
    """
    parts, without_place = find_pieces(metadata, tensors, shapes, config)
    if without_place:
        raise metadata.refusal(
            f"has a tensor {without_place[0]}, which {metadata.architecture} isn't known to have "
            "here; without it the answers would be others; take another file of the model"
        )
    missing = [name for name in shapes if name not in parts and not name.endswith(".bias")]
    if missing:
        raise metadata.refusal(
            f"lacks {len(missing)} of the model's tensors, {missing[0]} among them; get the whole "
            "file, or all parts of it"
        )
    for name, whole in parts.items():
        rows = sum(sum(piece.shape[:1]) for piece in whole)
        if any((rows, *piece.shape[1:]) != shapes[name] for piece in whole):
            raise _has_another_shape(metadata, name, whole[0].shape, shapes[name])
    weights = {}
    for name, shape in shapes.items():
        read = [piece.read(dtype) for piece in parts.get(name, ())]
        if len(read) == 1:
            weights[name] = read[0]
        else:
            weights[name] = torch.cat(read) if read else torch.zeros(shape, dtype=dtype)
    return weights


def find_pieces(
    metadata: Metadata, tensors: dict[str, GGUFTensor], names: Iterable[str], config: Any
) -> tuple[dict[str, list[Piece]], list[str]]:
    """What weights are made of, by their names in `transformers`, and which tensors become none of
    these `names` nor a part of the rotary embedding.

    Raises:
        ModelLoadError: two tensors become the same.
    """
    names = set(names)
    pieces: dict[str, dict[int, Piece]] = {}
    without_place = []
    modules = _modules_in_file(metadata.architecture, config.num_hidden_layers, names)
    for tensor in tensors.values():
        if tensor.name in ROPE_TENSORS:
            continue
        found = list(_pieces(metadata, modules, tensor, config))
        if not found or any(name not in names for name, _, _ in found):
            without_place.append(tensor.name)
            continue
        for name, place, piece in found:
            if place in pieces.setdefault(name, {}):
                raise metadata.refusal(
                    f"has {name} twice, in {pieces[name][place].tensor.name} and in {tensor.name}"
                )
            pieces[name][place] = piece
    parts = {name: [places[i] for i in sorted(places)] for name, places in pieces.items()}
    return parts, without_place


def _modules_in_file(architecture: str, layers: int, names: Iterable[str]) -> dict[str, str]:
    """The model's modules by the names that llama.cpp's converter gives their tensors."""
    known = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    table = gguf.get_tensor_name_map(known.get(architecture, gguf.MODEL_ARCH.LLAMA), layers)
    modules = {name.rpartition(".")[0] for name in names}
    known_to_us = {"lm_head": "output"}  # of Gemma too
    return {table.get_name(one) or known_to_us.get(one, one): one for one in modules}


def _pieces(
    metadata: Metadata,
    names: dict[str, str],
    tensor: GGUFTensor,
    config: Any,
) -> Iterator[tuple[str, int, Piece]]:
    """Which parts of which weights a tensor becomes: (name, place among the parts, piece)."""
    architecture = ARCHITECTURES[metadata.architecture]
    own, _, kind = tensor.name.rpartition(".")
    layer, _, part = own.rpartition(".")
    kv_heads = config.num_key_value_heads
    heads = (config.num_attention_heads, kv_heads, kv_heads)
    permuted = (*heads[:2], 0) if architecture.is_permuted else (0, 0, 0)
    queries, fused = names.get(f"{layer}.attn_q"), names.get(f"{layer}.attn_qkv")
    places = [f"attn_{letter}" for letter in "qkv"]
    if part == "attn_qkv" and queries is not None:
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads[0]
        bounds = [0, *accumulate(count * head_dim for count in heads)]
        if tensor.shape[:1] != (bounds[3],):
            raise _has_another_shape(metadata, tensor.name, tensor.shape, (bounds[3],))
        for place, name in enumerate(_QKV):
            piece = Piece(tensor, bounds[place], bounds[place + 1], permuted[place])
            yield f"{queries.removesuffix(_QKV[0])}{name}.{kind}", 0, piece
    elif part in places and fused is not None:
        yield f"{fused}.{kind}", places.index(part), Piece(tensor)
    elif own in names:
        shift = architecture.norm_shift if part.endswith("norm") else 0.0
        turned = permuted[places.index(part)] if part in places else 0
        yield f"{names[own]}.{kind}", 0, Piece(tensor, heads=turned, shift=shift)


def _has_another_shape(
    metadata: Metadata, name: str, shape: tuple[int, ...], expected: tuple[int, ...]
) -> Exception:
    return metadata.refusal(
        f"has weights of another shape than its settings say: {name} is {list(shape)} where "
        f"{list(expected)} belongs; it is damaged"
    )

"""The tensors of a GGUF file as the weights of a model of `transformers`, all of them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from river_llm.load.gguf.architectures import Architecture
from river_llm.load.gguf.file import GGUFTensor
from river_llm.load.gguf.metadata import Metadata
from river_llm.load.gguf.rope import ROPE_TENSORS

_OUTER = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_IN_LAYER = re.compile(r"blk\.(\d+)\.([a-z_]+)\.(weight|bias)")
_OUTSIDE = re.compile(r"([a-z_]+)\.(weight|bias)")
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_FUSED_QKV = "self_attn.qkv_proj"


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of a tensor that become a weight, or a part of one.

    Attributes:
        rows: None: all of them.
        heads: of queries or keys whose rows stand as neighbours are rotated; 0: as they are.
    """

    tensor: GGUFTensor
    rows: slice | None = None
    heads: int = 0
    shift: float = 0.0

    @property
    def shape(self) -> tuple[int, ...]:
        if self.rows is None:
            return self.tensor.shape
        return (self.rows.stop - self.rows.start, *self.tensor.shape[1:])

    def read(self, dtype: torch.dtype) -> Tensor:
        weight = self.tensor.read(torch.float32 if self.shift else dtype)
        if self.rows is not None:
            weight = weight[self.rows]
        if self.heads:  # [heads, dims / 2, 2] to [heads, 2, dims / 2]
            pairs = weight.view(self.heads, -1, 2, *weight.shape[1:])
            weight = pairs.transpose(1, 2).reshape(weight.shape)
        if self.shift:
            weight = (weight - self.shift).to(dtype)
        return weight.contiguous()


class WeightPlan:
    """Which weight each tensor of a file becomes, checked before anything is read."""

    def __init__(
        self,
        metadata: Metadata,
        architecture: Architecture,
        tensors: dict[str, GGUFTensor],
        shapes: dict[str, tuple[int, ...]],
        config: Any,
    ) -> None:
        """
        Args:
            shapes: of the model's weights by their names; tied ones may stand there twice.

        Raises:
            ModelLoadError: a tensor goes nowhere, a weight is missing or there twice, or one has
                another shape than the settings say.
        """
        self._metadata = metadata
        self._architecture = architecture
        self._shapes = shapes
        self._config = config
        self._pieces: dict[str, dict[int, _Piece]] = {}  # by their places
        for tensor in tensors.values():
            if tensor.name in ROPE_TENSORS:
                continue
            for place, name, piece in self._places(tensor):
                if name not in shapes:
                    raise self._goes_nowhere(tensor)
                pieces = self._pieces.setdefault(name, {})
                if place in pieces:
                    raise metadata.refusal(
                        f"has {name} twice, in {pieces[place].tensor.name} and in {tensor.name}"
                    )
                pieces[place] = piece
        self._check_shapes()

    def read(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """All weights; biases that the file leaves out are 0."""
        weights = {}
        for name, shape in self._shapes.items():
            pieces = [piece.read(dtype) for piece in self._of(name)]
            if pieces:
                weights[name] = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
            elif name.endswith(".bias"):
                weights[name] = torch.zeros(shape, dtype=dtype)
        return weights

    def _of(self, name: str) -> list[_Piece]:
        """The pieces of a weight in their order."""
        return [piece for _, piece in sorted(self._pieces.get(name, {}).items())]

    def _goes_nowhere(self, tensor: GGUFTensor) -> Exception:
        return self._metadata.refusal(
            f"has a tensor {tensor.name}, which {self._metadata.architecture} isn't known to have "
            "here; without it the answers would be others; take another file of the model"
        )

    def _places(self, tensor: GGUFTensor) -> Iterator[tuple[int, str, _Piece]]:
        """Which parts of which weights a tensor becomes: (place among the parts, name, piece)."""
        outside = _OUTSIDE.fullmatch(tensor.name)
        if outside is not None and outside[1] in _OUTER:
            shift = self._architecture.norm_shift if outside[1].endswith("norm") else 0.0
            yield 0, f"{_OUTER[outside[1]]}.{outside[2]}", _Piece(tensor, shift=shift)
            return
        inside = _IN_LAYER.fullmatch(tensor.name)
        if inside is None:
            raise self._goes_nowhere(tensor)
        layer, part, kind = inside.groups()
        prefix = f"model.layers.{int(layer)}."
        is_fused = f"{prefix}{_FUSED_QKV}.weight" in self._shapes
        if part == "attn_qkv" and not is_fused:
            yield from self._split(tensor, prefix, kind)
            return
        module = self._architecture.layer_parts.get(part)
        if module is None:
            raise self._goes_nowhere(tensor)
        if module in _QKV:
            place = _QKV.index(module)
            if is_fused:
                yield place, f"{prefix}{_FUSED_QKV}.{kind}", _Piece(tensor)
            else:
                yield 0, f"{prefix}{module}.{kind}", _Piece(tensor, heads=self._heads(place))
            return
        shift = self._architecture.norm_shift if part.endswith("norm") else 0.0
        yield 0, f"{prefix}{module}.{kind}", _Piece(tensor, shift=shift)

    def _split(
        self, tensor: GGUFTensor, prefix: str, kind: str
    ) -> Iterator[tuple[int, str, _Piece]]:
        """Queries, keys and values that stand in one tensor."""
        config = self._config
        kv_heads = config.num_key_value_heads
        start = 0
        for place, heads in enumerate((config.num_attention_heads, kv_heads, kv_heads)):
            end = start + heads * config.head_dim
            if tensor.shape[0] < end:
                raise self._has_another_shape(tensor.name, tensor.shape, (end,))
            piece = _Piece(tensor, slice(start, end), self._heads(place))
            yield 0, f"{prefix}{_QKV[place]}.{kind}", piece
            start = end
        if tensor.shape[0] != start:
            raise self._has_another_shape(tensor.name, tensor.shape, (start,))

    def _heads(self, place: int) -> int:
        """Of queries, keys or values, where their rows have to be put in another order."""
        if not self._architecture.is_permuted or place == 2:
            return 0
        config = self._config
        heads: int = (config.num_attention_heads, config.num_key_value_heads)[place]
        return heads

    def _has_another_shape(self, name: str, shape: Any, expected: Any) -> Exception:
        return self._metadata.refusal(
            f"has weights of another shape than its settings say: {name} is {list(shape)} where "
            f"{list(expected)} belongs; it is damaged"
        )

    def _check_shapes(self) -> None:
        missing = []
        for name, shape in self._shapes.items():
            pieces = self._of(name)
            if not pieces:
                if not name.endswith(".bias"):
                    missing.append(name)
                continue
            shapes = [piece.shape for piece in pieces]
            rows = sum(one[0] for one in shapes if one)
            whole = (rows, *shapes[0][1:]) if shapes[0] else ()
            if whole != shape or any(one[1:] != shape[1:] for one in shapes):
                raise self._has_another_shape(name, whole, shape)
        if missing:
            raise self._metadata.refusal(
                f"lacks {len(missing)} of the model's tensors, {missing[0]} among them; get the "
                "whole file, or all parts of it"
            )

"""Keys and values in 8 bits, and the layers of the torch engine's KV cache."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from river_llm.errors import ConfigError

_LARGEST_CODE = 127
_SMALLEST = 1e-30  # a key or value whose largest entry is smaller becomes zero
_SCALE_BYTES = 4
_LEAST_ROOM = 256  # positions of all sequences of a batch together
_FEWEST, _ROOM_SHARE = 16, 32  # positions of each, and a part of those that are there


def check_kv_bits(kv_bits: int) -> None:
    """Validate the bits of a KV cache.

    Raises:
        ConfigError: there is none of so many.
    """
    if kv_bits not in (8, 16):
        raise ConfigError(f"the KV cache has {kv_bits} bits; choose 16 (the model's dtype) or 8")


def position_bytes(kv_heads: int, head_dim: int, element_bytes: int, kv_bits: int = 16) -> int:
    """Bytes of the keys and values of one position in one layer; `element_bytes` count for 16 bits,
    whatever the model's dtype is."""
    head = head_dim * element_bytes if kv_bits == 16 else head_dim + _SCALE_BYTES
    return 2 * kv_heads * head


def quantize_states(states: Tensor) -> tuple[Tensor, Tensor]:
    """Codes int8 `[..., D]` and scales float32 `[..., 1]` of keys or values `[..., D]`.

    One scale for each position and head: the largest entry becomes 127 or -127. Where an entry is
    infinite or no number, all of the D are no numbers.
    """
    exact = states.float()
    largest = exact.abs().amax(-1, keepdim=True)
    largest = largest.where(~(largest <= _SMALLEST), 0.0)  # NaN stays
    inverse = (_LARGEST_CODE / largest).nan_to_num(0.0, posinf=0.0)
    codes = (exact * inverse).nan_to_num(0.0).round_()
    scales = (largest / _LARGEST_CODE).where(largest.isfinite(), torch.nan)
    return codes.to(torch.int8), scales


def dequantize_states(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """Keys or values `[..., D]` from their codes and scales."""
    return (codes * scales).to(dtype)


class StatesLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values `[B, G, T, D]` of one layer; all of them, even if attention has a window.

    Each part is the first part of memory that has room for more, so that a new position is written
    where it stays and nothing else is copied; `DynamicLayer` copies the whole layer for each.
    """

    parts: ClassVar[tuple[str, ...]] = ("keys", "values")  # tensors [B, G, T, ...]

    def __init__(self) -> None:
        super().__init__()
        self._rooms: dict[str, Tensor] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, G, T, D]`; all of them there are now."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[:, :, :0], value_states[:, :, :0]
        return self._append("keys", key_states), self._append("values", value_states)

    def truncate(self, length: int) -> None:
        """Forget all but the first `length` positions."""
        if self.is_initialized:
            for name in self.parts:
                setattr(self, name, getattr(self, name)[:, :, :length])

    def restore(self, parts: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        """Become what these `parts` of a layer were; attention gets keys and values of `dtype`."""
        self.dtype, self.device = dtype, parts["keys"].device
        for name in self.parts:
            setattr(self, name, parts[name])
        self.is_initialized = True

    @classmethod
    def joined(cls, pieces: Sequence[Piece]) -> StatesLayer:
        """A layer of one sequence for each piece, all ending at its last position. What stands in
        front of shorter ones is zero: attention hides it, and 0 * NaN would be NaN."""
        layer = cls()
        sources = [piece.layer for piece in pieces if piece.layer is not None]
        layer.dtype, layer.device = sources[0].dtype, sources[0].device
        lengths = [piece.end - piece.start for piece in pieces]
        for name in cls.parts:
            room = _room(getattr(sources[0], name), len(pieces), max(lengths))
            part = room[:, :, : max(lengths)]
            for row, (piece, length) in enumerate(zip(pieces, lengths, strict=True)):
                first = max(lengths) - length
                part[row, :, :first] = 0
                if length:
                    source = getattr(piece.layer, name)
                    part[row, :, first:] = source[piece.row, :, piece.start : piece.end]
            layer._rooms[name] = room
            setattr(layer, name, part)
        layer.is_initialized = True
        return layer

    def _append(self, name: str, new: Tensor) -> Tensor:
        """Put `new`, `[B, G, N, ...]`, behind what a part holds; the whole part."""
        part: Tensor = getattr(self, name)
        length = part.shape[2]
        end = length + new.shape[2]
        room = self._rooms.get(name)
        if room is None or part.data_ptr() != room.data_ptr() or room.shape[2] < end:
            room = _room(new, len(new), end)
            room[:, :, :length] = part
            self._rooms[name] = room
        room[:, :, length:end] = new
        part = room[:, :, :end]
        setattr(self, name, part)
        return part


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions [start, end) of one sequence of a layer; none of them: an empty sequence."""

    layer: StatesLayer | None
    row: int
    start: int
    end: int


def _room(like: Tensor, sequences: int, length: int) -> Tensor:
    """Memory for so many positions of `[B, G, T, ...]`, and for some that may come."""
    length += max(_LEAST_ROOM // sequences, _FEWEST, length // _ROOM_SHARE)
    return like.new_empty(sequences, like.shape[1], length, *like.shape[3:])


class EightBitLayer(StatesLayer):
    """The same in codes of 8 bits, with a scale for each position and head; see `quantize_states`.

    `keys` and `values` are codes; attention gets the dequantised ones, new ones among them, so that
    a token sees the same of an earlier one whether both came in one pass or not.
    """

    parts: ClassVar[tuple[str, ...]] = ("keys", "values", "key_scales", "value_scales")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Be empty, for states like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys, self.key_scales = quantize_states(key_states[:, :, :0])
        self.values, self.value_scales = quantize_states(value_states[:, :, :0])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append keys and values `[B, G, T, D]`; all of them there are now, dequantised."""
        del args, kwargs
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        key_codes, key_scales = quantize_states(key_states)
        value_codes, value_scales = quantize_states(value_states)
        keys, values = self._append("keys", key_codes), self._append("values", value_codes)
        return (
            dequantize_states(keys, self._append("key_scales", key_scales), self.dtype),
            dequantize_states(values, self._append("value_scales", value_scales), self.dtype),
        )


def layer_class(kv_bits: int) -> type[StatesLayer]:
    """The class of a cache's layers."""
    return StatesLayer if kv_bits == 16 else EightBitLayer

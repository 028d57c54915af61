"""GGUF files: their metadata and where their tensors lie, with every length checked before it is
believed. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType
from gguf.quants import dequantize
from torch import Tensor

from river_llm.errors import ModelLoadError

_VERSIONS = (2, 3)
_MOST_DIMS = 4
_LONGEST_NAME = 65535  # bytes
_NUMBERS = {  # of metadata
    **{
        GGUFValueType[f"{kind}{bits}"]: np.dtype(f"{kind}{bits}".lower()).newbyteorder("<")
        for kind in ("UINT", "INT")
        for bits in (8, 16, 32, 64)
    },
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
    GGUFValueType.BOOL: np.dtype("<?"),
}
_PLAIN = {  # of tensors that aren't quantised
    GGMLQuantizationType[kind]: np.dtype(f"<{kind[0].lower()}{int(kind[1:]) // 8}")
    for kind in ("F16", "F32", "F64", "I8", "I16", "I32", "I64")
}


@dataclass(frozen=True, slots=True)
class GGUFTensor:
    """One tensor of a GGUF file.

    Attributes:
        shape: as PyTorch has it, `[out_features, in_features]`; a file stores it reversed.
        kind: how its values are stored.
        data: its bytes, mapped from the file.
    """

    name: str
    shape: tuple[int, ...]
    kind: GGMLQuantizationType
    data: Any

    def read(self, dtype: torch.dtype) -> Tensor:
        """Its values, dequantised.

        Raises:
            ModelLoadError: they are stored in a way that the gguf package can't decode.
        """
        try:
            values = dequantize(self.data, self.kind)
        except NotImplementedError as error:
            raise ModelLoadError(
                f"{self.name} is stored as {self.kind.name}, which can't be dequantised; "
                "take a file of another quantisation"
            ) from error
        values = np.ascontiguousarray(values, np.float32).reshape(self.shape)
        if not values.flags.writeable:  # mapped from the file
            values = values.copy()
        return torch.from_numpy(values).to(dtype)


@dataclass(frozen=True, slots=True)
class GGUFContent:
    """What a GGUF file, or all parts of one, holds.

    Attributes:
        path: of the file, the first part of several.
        metadata: its keys and values; arrays are lists.
    """

    path: Path
    metadata: dict[str, Any]
    tensors: dict[str, GGUFTensor] = field(repr=False)


def read_gguf(parts: Sequence[Path]) -> GGUFContent:
    """Read metadata and places of tensors of a file, or of all its parts in order.

    Raises:
        ModelLoadError: a file is damaged, cut short, or no part of the others; or a tensor stands
            in two of them.
    """
    first, *others = contents = [_Parser(part).parse() for part in parts]
    count = first.metadata.get("split.count", 0) or 1
    places = [content.metadata.get("split.no", 0) for content in contents]
    if count != len(parts) or (others and places != list(range(count))):
        raise ModelLoadError(
            f"{first.path} is one of {count} parts, and parts {places} were found; get all of them"
        )
    for content in others:
        twice = first.tensors.keys() & content.tensors.keys()
        if twice:
            raise ModelLoadError(f"{min(twice)} stands in two parts of {first.path}")
        first.tensors.update(content.tensors)
    expected = first.metadata.get("split.tensors.count")
    if others and expected not in (None, len(first.tensors)):
        raise ModelLoadError(
            f"the parts of {first.path} hold {len(first.tensors)} tensors in place of {expected}; "
            "get all of them again"
        )
    return first


class _Parser:
    """Reads one file from its beginning to its tensors."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._bytes = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, "u1")
        self._view = memoryview(self._bytes)  # type: ignore[arg-type]
        self._place = 0

    def parse(self) -> GGUFContent:
        if bytes(self._take(4)) != b"GGUF":
            raise self._damaged("it does not begin with GGUF")
        version = self._number(4)
        if version and version & 0xFFFF == 0:
            raise ModelLoadError(
                f"{self._path} is big-endian GGUF; convert it with: gguf-convert-endian "
                f"{self._path} little"
            )
        if version not in _VERSIONS:
            raise self._damaged(f"its version is {version}")
        num_tensors, num_keys = self._number(8), self._number(8)
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string(_LONGEST_NAME)
            if key in metadata:
                raise self._damaged(f"{key} stands twice in it")
            metadata[key] = self._value(self._number(4))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            raise self._damaged(f"general.alignment is {alignment!r}")
        infos = [self._tensor_info() for _ in range(num_tensors)]
        start = -(-self._place // alignment) * alignment
        tensors = {info[0]: self._tensor(start, *info) for info in infos}
        if len(tensors) != len(infos):
            raise self._damaged("a tensor stands twice in it")
        return GGUFContent(self._path, metadata, tensors)

    def _damaged(self, reason: str) -> ModelLoadError:
        return ModelLoadError(
            f"{self._path} can't be read as GGUF, it may be cut short ({reason}); get it again"
        )

    def _check_end(self, end: int) -> None:
        if end > len(self._view):
            raise self._damaged(f"byte {end} is wanted of {len(self._view)}")

    def _take(self, count: int) -> memoryview:
        self._check_end(self._place + count)
        self._place += count
        return self._view[self._place - count : self._place]

    def _number(self, num_bytes: int) -> int:
        return int.from_bytes(self._take(num_bytes), "little")

    def _string(self, longest: int | None = None) -> str:
        length = self._number(8)
        if longest is not None and length > longest:
            raise self._damaged(f"a name of {length} bytes")
        try:
            return str(self._take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged("a string in it is no UTF-8") from error

    def _value(self, kind: int, count: int | None = None) -> Any:
        """A value, or a list of so many."""
        if kind == GGUFValueType.ARRAY and count is None:
            return self._value(self._number(4), self._number(8))
        if kind == GGUFValueType.STRING:
            if count is not None and count > len(self._view) // 8:  # each has its length before it
                raise self._damaged(f"an array of {count} strings")
            return self._string() if count is None else [self._string() for _ in range(count)]
        if kind not in _NUMBERS:
            raise self._damaged(f"a value of unknown type {kind}")
        dtype = _NUMBERS[GGUFValueType(kind)]
        data = self._take((1 if count is None else count) * dtype.itemsize)
        values = np.frombuffer(data, dtype).tolist()
        return values[0] if count is None else values

    def _tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name, dims = self._string(_LONGEST_NAME), self._number(4)
        if dims > _MOST_DIMS:
            raise self._damaged(f"{name} has {dims} dimensions")
        shape = tuple(self._number(8) for _ in range(dims))[::-1]
        number = self._number(4)
        try:
            return name, shape, GGMLQuantizationType(number), self._number(8)
        except ValueError as error:
            raise ModelLoadError(
                f"{self._path} stores {name} in the unknown type {number}; the file is damaged, or "
                "the package gguf too old"
            ) from error

    def _tensor(
        self, start: int, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, offset: int
    ) -> GGUFTensor:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        width = shape[-1] if shape else 1
        if width % block:
            raise self._damaged(f"{name} has rows of {width} values, no multiple of {block}")
        row_bytes = width // block * block_bytes
        start += offset
        end = start + math.prod(shape[:-1]) * row_bytes
        self._check_end(end)
        data = self._bytes[start:end]
        if kind in _PLAIN:
            return GGUFTensor(name, shape, kind, data.view(_PLAIN[kind]).reshape(shape))
        return GGUFTensor(name, shape, kind, data.reshape(*shape[:-1], row_bytes))

"""GGUF files: their metadata and where their tensors lie, with every length checked before it is
believed. The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
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
_ALIGNMENT = "general.alignment"
_MOST_DIMS = 4
_LONGEST_NAME = 65535  # of a metadata key
_LENGTH, _COUNT = struct.Struct("<Q"), struct.Struct("<I")
_NUMBERS = {
    GGUFValueType.UINT8: "<u1",
    GGUFValueType.INT8: "<i1",
    GGUFValueType.UINT16: "<u2",
    GGUFValueType.INT16: "<i2",
    GGUFValueType.UINT32: "<u4",
    GGUFValueType.INT32: "<i4",
    GGUFValueType.FLOAT32: "<f4",
    GGUFValueType.UINT64: "<u8",
    GGUFValueType.INT64: "<i8",
    GGUFValueType.FLOAT64: "<f8",
    GGUFValueType.BOOL: "<?",
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
    contents = [_Parser(part).parse() for part in parts]
    first = contents[0]
    count = first.metadata.get("split.count", 0) or 1
    if count != len(parts):
        raise ModelLoadError(
            f"{first.path} is one of {count} parts, and {len(parts)} were found; get all of them"
        )
    for place, content in enumerate(contents):
        if count > 1 and content.metadata.get("split.no") != place:
            raise ModelLoadError(f"{content.path} is not part {place + 1} of {first.path}")
        if place > 0:
            twice = first.tensors.keys() & content.tensors.keys()
            if twice:
                raise ModelLoadError(f"{min(twice)} stands in two parts of {first.path}")
            first.tensors.update(content.tensors)
    expected = first.metadata.get("split.tensors.count")
    if count > 1 and expected is not None and expected != len(first.tensors):
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
        version = self._count()
        if version not in _VERSIONS:
            raise self._damaged(f"its version is {version}")
        num_tensors, num_keys = self._length(), self._length()
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string(_LONGEST_NAME)
            if key in metadata:
                raise self._damaged(f"{key} stands twice in it")
            metadata[key] = self._value(self._kind())
        alignment = metadata.get(_ALIGNMENT, 32)
        if not isinstance(alignment, int) or not 0 < alignment <= 2**20:
            raise self._damaged(f"{_ALIGNMENT} is {alignment!r}")
        infos = [self._tensor_info() for _ in range(num_tensors)]
        start = -(-self._place // alignment) * alignment
        tensors: dict[str, GGUFTensor] = {}
        for name, shape, kind, offset in infos:
            if name in tensors:
                raise self._damaged(f"{name} stands twice in it")
            tensors[name] = self._tensor(name, shape, kind, start + offset)
        return GGUFContent(self._path, metadata, tensors)

    def _damaged(self, reason: str) -> ModelLoadError:
        return ModelLoadError(
            f"{self._path} can't be read as GGUF, it may be cut short ({reason}); get it again"
        )

    def _take(self, count: int) -> memoryview:
        end = self._place + count
        if end > len(self._view):
            raise self._damaged(f"byte {end} is wanted of {len(self._view)}")
        taken = self._view[self._place : end]
        self._place = end
        return taken

    def _count(self) -> int:
        number: int = _COUNT.unpack(self._take(4))[0]
        return number

    def _length(self) -> int:
        number: int = _LENGTH.unpack(self._take(8))[0]
        return number

    def _string(self, longest: int | None = None) -> str:
        length = self._length()
        if longest is not None and length > longest:
            raise self._damaged(f"a name of {length} bytes")
        try:
            return str(self._take(length), "utf-8")
        except UnicodeDecodeError as error:
            raise self._damaged("a string in it is no UTF-8") from error

    def _kind(self) -> GGUFValueType:
        number = self._count()
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise self._damaged(f"a value of unknown type {number}") from error

    def _value(self, kind: GGUFValueType) -> Any:
        if kind == GGUFValueType.STRING:
            return self._string()
        if kind != GGUFValueType.ARRAY:
            return self._numbers(kind, 1)[0]
        kind = self._kind()
        length = self._length()
        if kind == GGUFValueType.ARRAY:
            raise self._damaged("an array of arrays")
        if kind != GGUFValueType.STRING:
            return self._numbers(kind, length)
        if length > len(self._view) // 8:  # each has its length before it
            raise self._damaged(f"an array of {length} strings")
        return [self._string() for _ in range(length)]

    def _numbers(self, kind: GGUFValueType, count: int) -> list[Any]:
        dtype = np.dtype(_NUMBERS[kind])
        numbers: list[Any] = np.frombuffer(self._take(count * dtype.itemsize), dtype).tolist()
        return numbers

    def _tensor_info(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        name = self._string(_LONGEST_NAME)
        dims = self._count()
        if dims > _MOST_DIMS:
            raise self._damaged(f"{name} has {dims} dimensions")
        shape = tuple(self._length() for _ in range(dims))[::-1]
        number = self._count()
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise ModelLoadError(
                f"{self._path} stores {name} in the unknown type {number}; the file is damaged, or "
                "the package gguf too old"
            ) from error
        return name, shape, kind, self._length()

    def _tensor(
        self, name: str, shape: tuple[int, ...], kind: GGMLQuantizationType, start: int
    ) -> GGUFTensor:
        block, block_bytes = GGML_QUANT_SIZES[kind]
        width = shape[-1] if shape else 1
        if width % block:
            raise self._damaged(f"{name} has rows of {width} values, no multiple of {block}")
        row_bytes = width // block * block_bytes
        size = math.prod(shape[:-1]) * row_bytes
        if start + size > len(self._view):
            raise self._damaged(f"byte {start + size} is wanted of {len(self._view)}")
        data = self._bytes[start : start + size]
        stored = {
            GGMLQuantizationType.F32: np.float32,
            GGMLQuantizationType.F16: np.float16,
            GGMLQuantizationType.F64: np.float64,
            GGMLQuantizationType.I8: np.int8,
            GGMLQuantizationType.I16: np.int16,
            GGMLQuantizationType.I32: np.int32,
            GGMLQuantizationType.I64: np.int64,
        }.get(kind)
        if stored is None:
            data = data.reshape(*shape[:-1], row_bytes)
        else:
            data = data.view(stored).reshape(shape)
        return GGUFTensor(name, shape, kind, data)

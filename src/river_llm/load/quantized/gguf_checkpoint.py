"""GGUF files: blocks of a scale, sometimes an offset, and codes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from gguf.quants import dequantize
from torch import Tensor

from river_llm.errors import ModelLoadError
from river_llm.load.gguf.architectures import ARCHITECTURES
from river_llm.load.gguf.file import GGUFContent, GGUFTensor, read_gguf
from river_llm.load.gguf.metadata import Metadata
from river_llm.load.gguf.weights import Piece, find_pieces
from river_llm.load.quantized.grouped import GroupedWeight

_BLOCK = 32  # values that share a scale
_ROWS_BYTES = 1 << 22  # of a tensor that are decoded at a time
_PLAIN = (Kind.F16, Kind.F32, Kind.F64, Kind.BF16)


@dataclass(frozen=True, slots=True)
class _Layout:
    """A kind whose values are ``code * a + b``, with a and b for each 32 of them.

    Attributes:
        bits: width of a code.
        block_bytes: of a block; its codes are its last bytes, from `codes_at` on.
        low_at: where their low bits begin, those below 16.
        one: the byte in place of these whose codes are 1.
        lowest: code of all; others count from 0, signed ones don't.
    """

    bits: int
    block_bytes: int
    codes_at: int
    low_at: int
    one: int = 0x11
    lowest: int = 0


_LAYOUTS = {  # llama.cpp, ggml-common.h
    Kind.Q4_0: _Layout(4, 18, 2, 2),
    Kind.Q4_1: _Layout(4, 20, 4, 4),
    Kind.Q5_0: _Layout(5, 22, 2, 6),
    Kind.Q5_1: _Layout(5, 24, 4, 8),
    Kind.Q8_0: _Layout(8, 34, 2, 2, one=0x01, lowest=-128),
    Kind.Q4_K: _Layout(4, 144, 16, 16),
    Kind.Q5_K: _Layout(5, 176, 16, 48),
}


class GGUFCheckpoint:
    """The tensors of a file as weights of a backbone.

    Attributes:
        method: ``"gguf"``.
    """

    method = "gguf"

    def __init__(
        self, parts: Sequence[Path], name: str, weights: Iterable[str], config: Any
    ) -> None:
        """
        Args:
            parts: of the file, in order.
            name: of the file, as the user gave it.
            weights: the names of the backbone's.
            config: the backbone's.

        Raises:
            ModelLoadError: the file is damaged, or of an architecture that isn't known.
        """
        content, metadata = read_known(parts, name)
        self._pieces, _ = find_pieces(metadata, content.tensors, weights, config)

    def is_quantized(self, name: str) -> bool:
        """Whether a linear layer's weight is stored in few bits."""
        pieces = self._pieces.get(f"{name}.weight", ())
        return any(piece.tensor.kind not in _PLAIN for piece in pieces)

    def group_size(self, name: str, columns: int) -> int:
        """Inputs of such a layer that share a scale, of `columns`."""
        kinds = {piece.tensor.kind for piece in self._pieces[f"{name}.weight"]}
        return _BLOCK if kinds <= _LAYOUTS.keys() else _BLOCK // 2

    def vector(self, name: str) -> Tensor | None:
        """A norm's weight."""
        pieces = self._pieces.get(name, ())
        return torch.cat([piece.read(torch.float32) for piece in pieces]) if pieces else None

    def weight(self, name: str, shape: tuple[int, int]) -> GroupedWeight | Tensor:
        """A linear layer's weight `[out_features, in_features]`, by the layer's name.

        Raises:
            ModelLoadError: it isn't there, is none of the backbone's, or can't be decoded.
        """
        pieces = self._pieces.get(f"{name}.weight")
        if not pieces:
            raise ModelLoadError("is missing; take a file of this very model, with all its parts")
        rows = sum(piece.shape[0] for piece in pieces)
        if any((rows, *piece.shape[1:]) != shape for piece in pieces):
            raise ModelLoadError(
                f"is {[rows, *pieces[0].shape[1:]]}, and the backbone's {list(shape)}; take a file "
                "of this very model"
            )
        widths = {_LAYOUTS[p.tensor.kind].bits if p.tensor.kind in _LAYOUTS else 0 for p in pieces}
        if len(widths) == 1 and 0 not in widths:
            return GroupedWeight.joined([_grouped(piece) for piece in pieces])
        return torch.cat([piece.read(torch.float32) for piece in pieces])


def read_known(parts: Sequence[Path], name: str) -> tuple[GGUFContent, Metadata]:
    """A file whose tensors have a place in models of its architecture; arguments as of
    `GGUFCheckpoint`.

    Raises:
        ModelLoadError: it is damaged, or of an architecture that isn't known.
    """
    content = read_gguf(parts)
    metadata = Metadata(content.path, content.metadata)
    if metadata.architecture not in ARCHITECTURES:
        raise ModelLoadError(
            f"{name} has the architecture {metadata.architecture}, whose GGUF files can't become a "
            f"river; take one of {', '.join(ARCHITECTURES)}, or safetensors"
        )
    return content, metadata


def _grouped(piece: Piece) -> GroupedWeight:
    weight = decode(piece.tensor)
    codes, scales, zeros = map(piece.arrange, (weight.codes, weight.scales, weight.zeros))
    return GroupedWeight(codes, scales, zeros, weight.bits)


def decode(tensor: GGUFTensor) -> GroupedWeight:
    """Codes and their maps, by the gguf package's dequantisation: of a block whose codes are 0 and
    of one whose codes are 1 for a map, and of the block itself for the codes."""
    layout = _LAYOUTS[tensor.kind]
    count = max(1, _ROWS_BYTES // tensor.data.shape[1])
    pieces = [
        _decode_rows(np.array(tensor.data[start : start + count]), tensor.kind, layout)
        for start in range(0, len(tensor.data), count)
    ]
    return GroupedWeight.joined(pieces)


def _decode_rows(rows: Any, kind: Kind, layout: _Layout) -> GroupedWeight:
    with np.errstate(all="ignore"):  # of scales that are not finite, which are refused later
        values = dequantize(rows, kind)
        blocks = rows.reshape(-1, layout.block_bytes)
        blocks[:, layout.codes_at :] = 0
        at_zero = dequantize(rows, kind)[:, ::_BLOCK]
        blocks[:, layout.low_at :] = layout.one
        scales = dequantize(rows, kind)[:, ::_BLOCK] - at_zero
        offsets = np.repeat(at_zero, _BLOCK, 1)
        steps = np.repeat(np.where(scales == 0, 1, scales), _BLOCK, 1)
        codes = np.nan_to_num((values - offsets) / steps).round() - layout.lowest
        zeros = at_zero + (2 ** (layout.bits - 1) + layout.lowest) * scales
    codes = codes.clip(0, 2**layout.bits - 1).astype(np.uint8)
    return GroupedWeight(
        torch.from_numpy(codes), torch.from_numpy(scales), torch.from_numpy(zeros), layout.bits
    )

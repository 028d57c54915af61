"""Weights of a model and its river into the native core, in the forms that it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from river_llm.config import RiverConfig
from river_llm.engines.llama import Pieces, layer_projections
from river_llm.engines.native_model import NativeModel, WeightFormats
from river_llm.errors import RiverError
from river_llm.river.backbone import linear_weight
from river_llm.river.bit_packing import pack_codes, unpack_codes
from river_llm.river.quantize import QuantizedMatrix, quantize
from river_llm.river.river import River

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_HEAD_ROWS = 8192  # of the LM head that are quantised at a time


class WeightPacker:
    """Packs a model part by part; what is packed may then be given up."""

    def __init__(
        self,
        core: Any,
        model: PreTrainedModel,
        described: NativeModel,
        formats: WeightFormats,
    ) -> None:
        """`core` is a `_core.Engine` for this model and these formats."""
        self._core = core
        self._model = model
        self._tied_head = described.shape["tied_head"]
        self._formats = formats
        self._backbone = RiverConfig(8, described.code_group_size, "rtn")  # if it is in codes
        self._head = RiverConfig(8, described.head_group_size, "rtn")

    def pack_layer(self, index: int, exit_layer: dict[str, QuantizedMatrix]) -> None:
        """Both sides of a decoder layer."""
        layer = self._model.model.layers[index]
        projections = layer_projections(self._model, index)

        def weight(name: str, rows: slice | None) -> Any:
            whole = linear_weight(layer.get_submodule(name)).detach()
            part = whole if rows is None else whole[rows]
            if self._formats.backbone_bits == 16:
                return _bfloat16_bits(part)
            return _codes(quantize(part, self._backbone))

        self._core.load_layer(
            index,
            {
                "backbone": [[weight(*piece) for piece in pieces] for pieces in projections],
                "river": [
                    [_codes(exit_layer[name], rows, bits) for name, rows in pieces]
                    for pieces, bits in zip(
                        projections, self._formats.river_bits[index], strict=True
                    )
                ],
            },
        )

    def pack_head(self) -> Any:
        """LM head; returns the embedding as bfloat16 in uint16 `[V, C]` where its rows can't be
        read from the head, else None."""
        weight = self._model.get_output_embeddings().weight.detach()
        in_codes = self._formats.lm_head_bits != 16
        packed = _codes(quantize(weight, self._head)) if in_codes else _bfloat16_bits(weight)
        self._core.load_head({"weights": packed})
        if self._tied_head and not in_codes:
            return None
        return _bfloat16_bits(self._model.get_input_embeddings().weight.detach())


def held_bits(model: PreTrainedModel, river: River) -> list[list[int]]:
    """In how many bits the core holds the river's codes: of each layer, 8 or 3 to 6 for each of
    `PROJECTIONS`, whose matrices are packed together."""

    def held(exit_layer: dict[str, QuantizedMatrix], pieces: Pieces) -> int:
        return max(3, *(exit_layer[name].bits for name, _ in pieces))  # 2 bits as 3

    return [
        [held(exit_layer, pieces) for pieces in layer_projections(model, index)]
        for index, exit_layer in enumerate(river.exit_layers)
    ]


def quantized_head(core: Any, vocab_size: int, bits: int, group_size: int) -> Any:
    """A bfloat16 LM head that was packed, in few bits, as the core takes it."""
    config = RiverConfig(bits, group_size, quantizer="rtn")
    parts = []
    for first in range(0, vocab_size, _HEAD_ROWS):
        rows = core.head_rows(first, min(_HEAD_ROWS, vocab_size - first))
        parts.append(_codes(quantize(torch.from_numpy(rows).view(torch.bfloat16), config)))
    return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))


def check_weights(model: PreTrainedModel) -> None:
    """Validate that the model still has its weights.

    Raises:
        RiverError: an engine has taken them over (`CpuEngine`, ``free_model``), or they are
            evicted.
    """
    if any(parameter.is_meta for parameter in model.parameters()):
        raise RiverError(
            "the model's weights were given up to an engine, or are evicted; "
            "load it again, or detach its river"
        )


def _bfloat16_bits(weight: Tensor) -> Any:
    return weight.to(torch.bfloat16).contiguous().view(torch.uint16).numpy()


def _codes(matrix: QuantizedMatrix, rows: slice | None = None, wider: int | None = None) -> Any:
    """(codes, scales, zeros) as the core takes them; in `wider` bits with the same values."""
    packed, bits = matrix.packed, matrix.bits
    if wider is not None and wider != bits:
        columns = matrix.scales.shape[1] * matrix.group_size
        # a code counts from 2**(bits - 1): move it to where the wider one counts from
        codes = unpack_codes(packed, bits, columns) + (2 ** (wider - 1) - 2 ** (bits - 1))
        packed = pack_codes(codes.to(torch.uint8), wider)
    parts = (packed, matrix.scales.view(torch.uint16), matrix.zeros.view(torch.uint16))
    return tuple(
        (part if rows is None else part[rows]).cpu().contiguous().numpy() for part in parts
    )


def give_up(module: nn.Module) -> None:
    """Replace the module's weight by one that has its shape but no memory."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    module.weight = nn.Parameter(torch.empty_like(weight, device="meta"), requires_grad=False)

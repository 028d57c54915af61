"""Weights of a model and its river into the native core, in the forms that it takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from river_llm.backbone import linear_weight
from river_llm.bit_packing import pack_codes, unpack_codes
from river_llm.config import RiverConfig
from river_llm.engines.llama_family import PROJECTIONS, layer_projections
from river_llm.engines.native_model import NativeModel, WeightFormats, held_bits
from river_llm.errors import RiverError
from river_llm.quantization import QuantizedMatrix, quantize

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_BACKBONE, _RIVER = 0, 1
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
        for projection in range(len(PROJECTIONS)):
            pieces = projections[projection]
            weights = [
                weight if rows is None else weight[rows]
                for weight, rows in (
                    (linear_weight(layer.get_submodule(name)).detach(), rows)
                    for name, rows in pieces
                )
            ]
            if self._formats.backbone_bits == 16:
                self._core.set_weights(index, projection, [_bfloat16_bits(w) for w in weights])
            else:
                codes = [_codes(quantize(w, self._backbone)) for w in weights]
                self._core.set_codes(index, projection, _BACKBONE, codes)
            exits = [_codes(exit_layer[name], rows) for name, rows in pieces]
            self._core.set_codes(index, projection, _RIVER, exits)

    def pack_head(self) -> Any:
        """LM head; returns the embedding as bfloat16 in uint16 `[V, C]` where its rows can't be
        read from the head, else None."""
        model = self._model
        weight = model.get_output_embeddings().weight.detach()
        if self._formats.lm_head_bits == 16:
            self._core.set_head_weights(_bfloat16_bits(weight))
        else:
            self._core.set_head_codes(_codes(quantize(weight, self._head)))
        if self._tied_head and self._formats.lm_head_bits == 16:
            return None
        return _bfloat16_bits(model.get_input_embeddings().weight.detach())


def quantized_head(core: Any, vocab_size: int, bits: int, group_size: int) -> Any:
    """A bfloat16 LM head that was packed, in few bits, as the core takes it."""
    config = RiverConfig(bits, group_size, quantizer="rtn")
    parts = []
    for first in range(0, vocab_size, _HEAD_ROWS):
        rows = core.head_rows(first, min(_HEAD_ROWS, vocab_size - first))
        parts.append(_codes(quantize(torch.from_numpy(rows).view(torch.bfloat16), config)))
    return tuple(np.concatenate(columns) for columns in zip(*parts, strict=True))


def check_weights(model: PreTrainedModel) -> None:
    """See that the model still has its weights.

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


def _codes(matrix: QuantizedMatrix, rows: slice | None = None) -> Any:
    """(codes, scales, zeros) as the core takes them: of 4, 6 or 8 bits, with the same values."""
    packed, bits = matrix.packed, matrix.bits
    wider = held_bits(bits)
    if bits != wider:
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

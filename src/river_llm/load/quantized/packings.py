"""How safetensors checkpoints of 2 to 8 bits pack a linear layer's weight.

Sources: AutoGPTQ's qlinear_cuda_old.py and GPTQModel's utils/model.py (`gptq`, whose zero points
are less by one, and `gptq_v2`); AutoAWQ's modules/linear/gemm.py and utils/packing_utils.py;
compressed-tensors' compressors/quantized_compressors/pack_quantized.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from river_llm.config import BITS
from river_llm.errors import ModelLoadError
from river_llm.load.quantized.grouped import GroupedWeight

Parts = Mapping[str, Tensor]
Unpack = Callable[[Parts, tuple[int, int]], GroupedWeight]

_GPTQ_BITS = (2, 3, 4, 8)
_AWQ_PLACES = (0, 4, 1, 5, 2, 6, 3, 7)  # of the eight outputs in a word: its nibbles


def unpack_gptq(parts: Parts, shape: tuple[int, int], zero_shift: int) -> GroupedWeight:
    """qweight int32 `[in_features * bits / 32, out_features]`, qzeros `[groups, out_features * bits
    / 32]`, both as streams of bits; scales `[groups, out_features]`; g_idx `[in_features]`.

    Args:
        shape: `(out_features, in_features)`.
        zero_shift: what zero points have more than is stored, 1 in the format's first version.

    Raises:
        ModelLoadError: it has other shapes, unknown bits, or columns in another order.
    """
    rows, columns = shape
    words, zero_words, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    bits = words.shape[0] * 32 // columns
    if bits not in _GPTQ_BITS:
        raise _unknown_bits(bits, _GPTQ_BITS)
    groups = scales.shape[0]
    _check_shape("qweight", words, (columns * bits // 32, rows))
    _check_shape("scales", scales, (groups, rows))
    _check_shape("qzeros", zero_words, (groups, rows * bits // 32))
    _check_groups(groups, columns)
    _check_order(parts.get("g_idx"), columns, groups)
    codes = _unpack_stream(words.T.contiguous(), bits)
    zero_points = (_unpack_stream(zero_words, bits) + zero_shift) & (2**bits - 1)
    return GroupedWeight.of_zero_points(codes, scales.T, zero_points.T, bits)


def unpack_awq(parts: Parts, shape: tuple[int, int]) -> GroupedWeight:
    """qweight int32 `[in_features, out_features / 8]`, qzeros `[groups, out_features / 8]`, eight
    nibbles of outputs in each, in the order 0, 2, 4, 6, 1, 3, 5, 7; scales `[groups,
    out_features]`.

    Raises:
        ModelLoadError: it has other shapes.
    """
    rows, columns = shape
    words, zero_words, scales = parts["qweight"], parts["qzeros"], parts["scales"]
    groups = scales.shape[0]
    _check_shape("qweight", words, (columns, rows // 8))
    _check_shape("scales", scales, (groups, rows))
    _check_shape("qzeros", zero_words, (groups, rows // 8))
    _check_groups(groups, columns)
    codes, zero_points = (
        _lanes(one, 4)[..., _AWQ_PLACES].flatten(-2).T.contiguous() for one in (words, zero_words)
    )
    return GroupedWeight.of_zero_points(codes, scales.T, zero_points, 4)


def unpack_compressed_tensors(
    parts: Parts, shape: tuple[int, int], widths: frozenset[int]
) -> GroupedWeight:
    """weight_packed int32 `[out_features, words]`, as many whole codes in each word as it has room
    for; weight_scale `[out_features, groups]`; weight_zero_point, packed along the outputs, or int8
    `[out_features, groups]`; weight_g_idx.

    Args:
        shape: `(out_features, in_features)`.
        widths: the bits that its config.json names.

    Raises:
        ModelLoadError: it has other shapes, unknown bits, or columns in another order.
    """
    rows, columns = shape
    words, scales = parts["weight_packed"], parts["weight_scale"]
    named = parts.get("weight_shape")
    if named is not None and tuple(named.tolist()) != shape:
        raise _another_shape("weight_shape", named.tolist(), shape)
    fitting = [b for b in BITS if math.ceil(columns / (32 // b)) == words.shape[-1]]
    if not fitting or fitting[0] not in widths:
        raise _unknown_bits(" or ".join(map(str, sorted(widths))), BITS)
    bits, groups = fitting[0], scales.shape[-1]
    _check_shape("weight_packed", words, (rows, words.shape[-1]))
    _check_shape("weight_scale", scales, (rows, groups))
    _check_groups(groups, columns)
    _check_order(parts.get("weight_g_idx"), columns, groups)
    codes = _lanes(words, bits).flatten(-2)[:, :columns].contiguous()
    zeros = parts.get("weight_zero_point")
    if zeros is None:
        zero_points = torch.full((rows, groups), 2 ** (bits - 1))
    elif zeros.dtype == torch.int32:
        _check_shape("weight_zero_point", zeros, (math.ceil(rows / (32 // bits)), groups))
        zero_points = _lanes(zeros.T.contiguous(), bits).flatten(-2)[:, :rows].T
    else:
        _check_shape("weight_zero_point", zeros, (rows, groups))
        zero_points = zeros.int() + 2 ** (bits - 1)
    return GroupedWeight.of_zero_points(codes, scales, zero_points, bits)


def _unpack_stream(words: Tensor, bits: int) -> Tensor:
    """Codes, uint8 `[rows, codes]`, from a stream of bits in int32 `[rows, words]`, lowest first;
    codes of 3 bits reach from one word into the next."""
    aligned = math.lcm(bits, 32) // 32  # words after which a code begins with a word again
    lines = words.reshape(len(words), -1, aligned)
    codes = torch.empty(*lines.shape[:2], aligned * 32 // bits, dtype=torch.uint8)
    for lane in range(codes.shape[-1]):
        word, shift = divmod(lane * bits, 32)
        values = lines[..., word] >> shift
        if shift + bits > 32:
            values = (values & (2 ** (32 - shift) - 1)) | (lines[..., word + 1] << (32 - shift))
        codes[..., lane] = values & (2**bits - 1)
    return codes.flatten(-2)


def _lanes(words: Tensor, bits: int) -> Tensor:
    """The whole codes of each word: uint8 `[rows, words, 32 // bits]`."""
    lanes = torch.empty(*words.shape, 32 // bits, dtype=torch.uint8)
    for lane in range(lanes.shape[-1]):
        lanes[..., lane] = (words >> (lane * bits)) & (2**bits - 1)
    return lanes


def _check_shape(part: str, tensor: Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise _another_shape(part, list(tensor.shape), expected)


def _check_groups(groups: int, columns: int) -> None:
    if groups == 0 or columns % groups:
        raise ModelLoadError(
            f"has {groups} groups of {columns} inputs, which they don't fill; take a checkpoint "
            "whose group size divides its widths"
        )


def _check_order(group_of: Tensor | None, columns: int, groups: int) -> None:
    """Validate that a column's group follows from its place."""
    if group_of is None:
        return
    expected = torch.arange(columns) // (columns // groups)
    if group_of.shape != expected.shape or not torch.equal(group_of.long(), expected):
        raise ModelLoadError(
            "has its columns in the order of their activations (act-order), which a river can't "
            "hold; take a checkpoint that was made with desc_act=false, or static groups"
        )


def _another_shape(part: str, shape: Any, expected: Any) -> ModelLoadError:
    return ModelLoadError(
        f"has a {part} of shape {list(shape)} where the backbone's weight needs {list(expected)}; "
        "take a checkpoint of this very model"
    )


def _unknown_bits(bits: object, known: tuple[int, ...]) -> ModelLoadError:
    return ModelLoadError(
        f"has {bits} bits, which isn't known in its format; take one of "
        f"{', '.join(map(str, known))} bits"
    )

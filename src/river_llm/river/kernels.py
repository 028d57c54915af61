"""The product of activations with a quantised matrix.

`PackedInt4Kernel` is the fast one: PyTorch's packed 4-bit product for CPUs and CUDA devices.
`DequantizeKernel` is the plain one, dequantise and multiply: it runs everywhere, and it is the
oracle that tests compare the other with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from river_llm.river.quantize import QuantizedMatrix

KernelChoice = Literal["auto", "packed", "dequantize"]

# The packed product's time grows with the number of rows; from here on it is faster to dequantise
# the matrix once and use the dense product (SmolLM2's shapes on a CPU: the two meet near 180 rows).
_DENSE_FROM_ROWS = 128


def make_kernel(
    matrix: QuantizedMatrix,
    device: torch.device,
    dtype: torch.dtype,
    choice: KernelChoice = "auto",
) -> Kernel:
    """The product for activations of `dtype` on `device`.

    ``"auto"`` takes the packed product where it is fast (bfloat16 on CPU and CUDA), else the plain
    one.
    """
    if choice == "dequantize" or (choice == "auto" and not has_packed_kernel(device, dtype)):
        return DequantizeKernel(matrix, device)
    return PackedInt4Kernel(matrix, device, dtype)


def has_packed_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the packed product is fast for activations of `dtype` on `device`.

    In float16 and float32 the CPU's product exists but is scalar code, slower than dequantising.
    """
    if device.type == "cuda":
        major, _ = torch.cuda.get_device_capability(device)
        return dtype == torch.bfloat16 and major >= 8
    return device.type == "cpu" and dtype == torch.bfloat16


class Kernel(ABC):
    """A quantised matrix and the product with it: activations `[rows, in_features]` to
    `[rows, out_features]`.

    Attributes:
        matrix: on the device that computes.
    """

    def __init__(self, matrix: QuantizedMatrix, device: torch.device) -> None:
        self.matrix = matrix.to(device)

    @abstractmethod
    def __call__(self, inputs: Tensor) -> Tensor: ...

    def take_into_memory(self) -> None:
        """Hold nothing in pages of a mapped file."""
        if self.matrix.packed.device.type == "cpu":
            self.matrix = self.matrix.copy()


class DequantizeKernel(Kernel):
    """Dequantise the whole matrix, then multiply."""

    def __call__(self, inputs: Tensor) -> Tensor:
        return F.linear(inputs, self.matrix.dequantize(inputs.dtype))


class PackedInt4Kernel(Kernel):
    """PyTorch's packed 4-bit product, for codes of any width.

    Codes of up to 4 bits are one product. Wider codes are two: a code is 16 h + l, and both halves
    are 4-bit matrices over the same groups. PyTorch's own map from code to weight is
    ``(code - 8) * scale + zero``; the halves are shifted so that all their scales and zeros stay
    exact in bfloat16. Each product is rounded to the activations' dtype, so with 8 bits a group
    whose codes use little of their range (one outlier sets it) loses some of bfloat16's precision.
    """

    def __init__(self, matrix: QuantizedMatrix, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(matrix, device)
        self.dtype = dtype
        codes = self.matrix.codes().to(torch.int16)
        scales, zeros = self.matrix.scales.float(), self.matrix.zeros.float()
        if matrix.bits <= 4:
            shift = 8 - 2 ** (matrix.bits - 1)
            self.products = [self._pack(codes + shift, scales, zeros)]
        else:
            # Rounded halves cancel least, but with 8 bits the higher one would need 17 values.
            rounding = 8 if matrix.bits < 8 else 0
            codes = codes - 2 ** (matrix.bits - 1)
            high = (codes + rounding) >> 4
            low = codes - 16 * high
            self.products = [
                self._pack(high + 8, 16 * scales, (8 - rounding) * scales),
                self._pack(low + rounding, scales, zeros),
            ]

    def __call__(self, inputs: Tensor) -> Tensor:
        if inputs.shape[0] >= _DENSE_FROM_ROWS:
            return F.linear(inputs, self.matrix.dequantize(inputs.dtype))
        group_size = self.matrix.group_size
        output: Tensor | None = None
        for packed, scales_and_zeros in self.products:
            if inputs.device.type == "cpu":
                product = torch.ops.aten._weight_int4pack_mm_for_cpu(
                    inputs, packed, group_size, scales_and_zeros
                )
            else:
                product = torch.ops.aten._weight_int4pack_mm(
                    inputs, packed, group_size, scales_and_zeros
                )
            output = product if output is None else output + product
        assert output is not None
        return output[:, : self.matrix.shape[0]]

    def _pack(self, codes: Tensor, scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """Codes `[out, in]` in the device's own order; scales and zeros `[in / group, out, 2]`."""
        rows, columns = codes.shape
        padding = -rows % 16  # the kernels take 16 output rows at a time
        codes = F.pad(codes, (0, 0, 0, padding), value=8)
        scales = F.pad(scales, (0, 0, 0, padding))
        zeros = F.pad(zeros, (0, 0, 0, padding))
        scales_and_zeros = torch.stack((scales.T, zeros.T), dim=-1).to(self.dtype).contiguous()
        if codes.device.type == "cpu":
            packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
        else:
            inner_tiles = next(t for t in (8, 4, 2) if columns % (16 * t) == 0)
            pairs = ((codes[:, ::2] << 4) | codes[:, 1::2]).to(torch.uint8)
            packed = torch.ops.aten._convert_weight_to_int4pack(pairs, inner_tiles)
        return packed, scales_and_zeros

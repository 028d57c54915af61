"""A quantised weight as checkpoints of many kinds mean it, before it is the river's."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from river_llm.river.bit_packing import pack_codes
from river_llm.river.quantize import QuantizedMatrix


@dataclass(frozen=True, slots=True)
class GroupedWeight:
    """``weight = (code - 2**(bits - 1)) * scale + zero``, as in `QuantizedMatrix`, with the scales
    and zeros that a checkpoint has.

    Attributes:
        codes: uint8 `[out_features, in_features]`.
        scales: float32 `[out_features, groups]`.
        zeros: float32, the same shape, in the weight's units.
        bits: width of a code.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int

    @classmethod
    def of_zero_points(
        cls, codes: Tensor, scales: Tensor, zero_points: Tensor, bits: int
    ) -> GroupedWeight:
        """``weight = (code - zero_point) * scale``; zero points are in units of codes."""
        scales = scales.float()
        return cls(codes, scales, (2 ** (bits - 1) - zero_points.float()) * scales, bits)

    @classmethod
    def joined(cls, parts: list[GroupedWeight]) -> GroupedWeight:
        """Parts of equal bits and groups as one weight, one below the other."""
        codes, scales, zeros = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("codes", "scales", "zeros")
        )
        return cls(codes, scales, zeros, parts[0].bits)

    @property
    def group_size(self) -> int:
        """Inputs that share a scale."""
        return self.codes.shape[1] // self.scales.shape[1]

    def dequantize(self) -> Tensor:
        """The weight, float32 `[out_features, in_features]`."""
        rows, groups = self.scales.shape
        weight = self.codes.float().view(rows, groups, -1).sub_(2 ** (self.bits - 1))
        weight.mul_(self.scales.unsqueeze(-1)).add_(self.zeros.unsqueeze(-1))
        return weight.view(rows, -1)

    def rounded(self, group_size: int) -> QuantizedMatrix:
        """The river's form of it, in groups of `group_size`, which divides its own.

        Codes stay. Scales a become s in bfloat16, and zeros b become z = b + (a - s) mean(c), with
        c = code - 2**(bits - 1): least squares over a group's codes, then rounded too.
        """
        repeats = self.group_size // group_size
        exact = self.scales.repeat_interleave(repeats, 1)
        zeros = self.zeros.repeat_interleave(repeats, 1)
        scales = exact.to(torch.bfloat16)
        means = self.codes.view(*exact.shape, -1).float().mean(-1) - 2 ** (self.bits - 1)
        zeros = (zeros + (exact - scales.float()) * means).to(torch.bfloat16)
        packed = pack_codes(self.codes, self.bits)
        return QuantizedMatrix(packed, scales, zeros, self.bits, group_size)

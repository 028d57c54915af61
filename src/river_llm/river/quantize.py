"""A weight matrix to a `QuantizedMatrix` without data: HQQ, and round-to-nearest as the plain
reference. (`gptq` is for weights whose inputs are known.)

Every group of `group_size` consecutive inputs of an output row has a scale and a zero:

    w  =  (code - 2**(bits - 1)) * scale + zero

with the zero in the weight's own units and both numbers in bfloat16. (HQQ writes the same map as
``(code - z) * scale`` with z in units of codes; then ``zero = (2**(bits - 1) - z) * scale``.) The
codes are chosen for the rounded numbers, so every engine that computes with them, in whatever
precision, means exactly the same weights.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from river_llm.config import GROUP_SIZES, RiverConfig
from river_llm.errors import ConfigError
from river_llm.river.bit_packing import pack_codes, unpack_codes

SMALLEST_SCALE = 1e-30  # below it a group is as good as zero, and its inverse would overflow
BLOCK_ELEMENTS = 1 << 18  # weights solved at a time: the working set stays in the CPU's cache

# The solver's settings, as HQQ's authors ship them.
_NORM = 0.7  # p of the l_p norm that the error is measured in
_BETA = 10.0
_KAPPA = 1.01  # beta grows by this factor every iteration
_ITERATIONS = 20


@dataclass(frozen=True, slots=True)
class QuantizedMatrix:
    """One linear weight `[out_features, in_features]` in groups of few bits.

    Attributes:
        packed: the codes, uint8 `[out_features, in_features * bits / 8]` (see `bit_packing`).
        scales: bfloat16 `[out_features, in_features / group_size]`.
        zeros: bfloat16, the same shape, in the weight's units.
        bits: width of a code.
        group_size: inputs per group.
    """

    packed: Tensor
    scales: Tensor
    zeros: Tensor
    bits: int
    group_size: int

    @property
    def shape(self) -> tuple[int, int]:
        """`(out_features, in_features)`."""
        return self.scales.shape[0], self.scales.shape[1] * self.group_size

    @property
    def num_bytes(self) -> int:
        """Bytes of codes, scales and zeros together."""
        return self.packed.nbytes + self.scales.nbytes + self.zeros.nbytes

    def is_consistent(self) -> bool:
        """Whether the three tensors have the shapes and types that go with bits and group size."""
        rows, columns = self.shape
        return (
            self.packed.dtype == torch.uint8
            and self.scales.dtype == self.zeros.dtype == torch.bfloat16
            and self.packed.shape == (rows, columns * self.bits // 8)
            and self.zeros.shape == self.scales.shape
        )

    def to(self, device: torch.device | str) -> QuantizedMatrix:
        """The same matrix with its tensors on `device`."""
        return replace(
            self,
            packed=self.packed.to(device),
            scales=self.scales.to(device),
            zeros=self.zeros.to(device),
        )

    def copy(self) -> QuantizedMatrix:
        """The same matrix in memory of its own."""
        return replace(
            self,
            packed=self.packed.clone(),
            scales=self.scales.clone(),
            zeros=self.zeros.clone(),
        )

    def codes(self) -> Tensor:
        """The codes, uint8 `[out_features, in_features]`."""
        return unpack_codes(self.packed, self.bits, self.shape[1])

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """The weight that the codes stand for, `[out_features, in_features]`."""
        rows, columns = self.shape
        weight = self.codes().to(torch.float32).view(rows, -1, self.group_size)
        scales = self.scales.float().unsqueeze(-1)
        zeros = self.zeros.float().unsqueeze(-1)
        weight.sub_(2 ** (self.bits - 1)).mul_(scales).add_(zeros)
        return weight.view(rows, columns).to(dtype)


def average_bits(matrices: Iterable[QuantizedMatrix]) -> float:
    """Bits of a weight's code, on average over the weights; scales and zeros don't count."""
    code_bits = weights = 0
    for matrix in matrices:
        code_bits += 8 * matrix.packed.nbytes
        weights += matrix.shape[0] * matrix.shape[1]
    return code_bits / weights


def quantize(weight: Tensor, config: RiverConfig) -> QuantizedMatrix:
    """Quantise a weight `[out_features, in_features]`; it is neither changed nor kept.

    Raises:
        ConfigError: the group size doesn't divide `in_features`, a weight is not finite, bits are
            auto, or the quantizer needs inputs.
    """
    bits = config.bits
    if bits == "auto":
        raise ConfigError(
            "bits auto are those of a model's matrices; a weight alone has whole bits"
        )
    if config.quantizer == "gptq":
        raise ConfigError("gptq needs a layer's inputs; choose hqq or rtn for a weight alone")
    if config.quantizer == "imported":
        raise ConfigError("imported is what comes from a checkpoint; choose hqq or rtn")
    check_group_size(weight, config.group_size)
    rows, columns = weight.shape
    num_groups = columns // config.group_size
    block_rows = max(1, BLOCK_ELEMENTS // columns)
    packed = torch.empty(rows, columns * bits // 8, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(rows, num_groups, dtype=torch.bfloat16, device=weight.device)
    zeros = torch.empty_like(scales)
    for start in range(0, rows, block_rows):
        block = slice(start, min(start + block_rows, rows))
        groups = weight[block].detach().float().reshape(-1, config.group_size)
        scale, zero_point = _min_max_grid(groups, bits)
        if config.quantizer == "hqq":
            zero_point = _solve_zero_point(groups, scale, zero_point, bits)
        block_codes, block_scales, block_zeros = _encode(groups, scale, zero_point, bits)
        if not bool(torch.isfinite(block_zeros).all()):
            raise ConfigError("the weight holds values that are not finite; check the model's file")
        packed[block] = pack_codes(block_codes.view(-1, columns), bits)
        scales[block] = block_scales.view(-1, num_groups)
        zeros[block] = block_zeros.view(-1, num_groups)
    return QuantizedMatrix(packed, scales, zeros, bits, config.group_size)


def check_group_size(weight: Tensor, group_size: int) -> None:
    """Validate that groups fill the rows of a weight `[out_features, in_features]`.

    Raises:
        ConfigError: they don't.
    """
    columns = weight.shape[1]
    if columns % group_size:
        fitting = [str(size) for size in GROUP_SIZES if columns % size == 0]
        fix = f"choose {' or '.join(fitting)}" if fitting else "no group size does"
        raise ConfigError(
            f"group size {group_size} does not divide the input width {columns}; {fix}"
        )


def _min_max_grid(groups: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point `[groups, 1]` of the grid from each group's minimum to its maximum.

    The grid always holds 0, so that the zero point stays within the codes; a group of equal
    weights gets a grid from 0 to that weight.
    """
    low = groups.amin(1, keepdim=True).clamp_(max=0)
    high = groups.amax(1, keepdim=True).clamp_(min=0)
    scale = (high - low) / (2**bits - 1)
    scale = torch.where(scale > SMALLEST_SCALE, scale, torch.ones_like(scale))
    return scale, -low / scale


def _solve_zero_point(weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int) -> Tensor:
    """HQQ's half-quadratic solver, a descent on ``||W - dequantised||_p^p`` over the zero point.

    Alternates two closed-form steps (Badri and Shaji 2023, "Half-Quadratic Quantization of Large
    Machine Learning Models", equations for W_e and z) from a whole zero point on, every group on
    its own:

        W_e  <-  shrink_p(W - W_r, beta)
        z    <-  mean(W_q - (W - W_e) / s)

    W_e, the outliers' share of the error, is zero where all errors are small, as they are in most
    language models; then z makes the mean error of each group vanish.

    The authors stop when the error of the whole matrix grows; here every group takes all its
    iterations, so that its result doesn't depend on the others.

    Shapes: weight `[groups, group_size]`; scale, zero_point and the result `[groups, 1]`.
    """
    scaled = weight / scale  # in units of codes
    zero_point = zero_point.round()
    beta = _BETA
    for _ in range(_ITERATIONS):
        quantized = (scaled + zero_point).round_().clamp_(0, 2**bits - 1)
        error = (quantized - zero_point).mul_(scale).sub_(weight).neg_()  # W - W_r
        residual = quantized.sub_(scaled)
        low, high = torch.aminmax(error)
        if max(-float(low), float(high)) > beta ** (-1 / (2 - _NORM)):  # else W_e is zero
            residual.add_(_shrink(error, beta).div_(scale))
        zero_point = residual.mean(1, keepdim=True)
        beta *= _KAPPA
    return zero_point


def _shrink(error: Tensor, beta: float) -> Tensor:
    """Generalised soft-thresholding, the proximal operator of ``|.|_p^p`` as HQQ takes it."""
    magnitude = error.abs()
    shrunk = (magnitude - magnitude.pow(_NORM - 1) / beta).clamp_(min=0)
    return shrunk.mul_(error.sign())


def _encode(
    groups: Tensor, scale: Tensor, zero_point: Tensor, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Round scale and zero to bfloat16 first, then choose the codes nearest on that grid."""
    middle = 2 ** (bits - 1)
    scales = scale.to(torch.bfloat16)
    rounded_scale = scales.float()
    zeros = ((middle - zero_point) * rounded_scale).to(torch.bfloat16)
    codes = ((groups - zeros.float()) / rounded_scale + middle).round_().clamp_(0, 2**bits - 1)
    return codes.to(torch.uint8), scales, zeros

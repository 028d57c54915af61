"""The products with quantised weights, against float64 and against each other."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from river_llm.config import BITS, GROUP_SIZES
from river_llm.river.bit_packing import pack_codes
from river_llm.river.kernels import (
    DequantizeKernel,
    PackedInt4Kernel,
    has_packed_kernel,
    make_kernel,
)
from river_llm.river.quantize import QuantizedMatrix

CPU = torch.device("cpu")
BFLOAT16_TOLERANCE = 0.005  # relative L2; rounding the result alone costs about 0.0017
TWO_HALVES_TOLERANCE = 0.06  # two bfloat16 products that cancel, see PackedInt4Kernel

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def _random_matrix(
    bits: int, group_size: int, rows: int, groups: int, seed: int = 0
) -> QuantizedMatrix:
    """Codes of the whole range, each group with a scale and a zero of its own."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(2**bits, (rows, groups * group_size), generator=generator)
    scales = 0.01 + 0.02 * torch.rand(rows, groups, generator=generator)
    zeros = 0.1 * torch.randn(rows, groups, generator=generator)
    return QuantizedMatrix(
        pack_codes(codes.to(torch.uint8), bits),
        scales.bfloat16(),
        zeros.bfloat16(),
        bits,
        group_size,
    )


def _narrow_matrix(bits: int, rows: int = 100, groups: int = 8) -> QuantizedMatrix:
    """Codes near the middle, as in a group whose range one outlier sets."""
    matrix = _random_matrix(bits, 64, rows, groups)
    generator = torch.Generator().manual_seed(1)
    middle = 2 ** (bits - 1)
    codes = torch.randint(middle - 2, middle + 3, (rows, groups * 64), generator=generator)
    return QuantizedMatrix(
        pack_codes(codes.to(torch.uint8), bits),
        matrix.scales,
        torch.zeros_like(matrix.zeros),
        bits,
        64,
    )


def _inputs(rows: int, columns: int, mean: float = 0.0) -> Tensor:
    return mean + torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows))


def _exact(inputs: Tensor, matrix: QuantizedMatrix) -> Tensor:
    """The product in float64, from the definition of codes, scales and zeros."""
    scales = matrix.scales.double().repeat_interleave(matrix.group_size, dim=1)
    zeros = matrix.zeros.double().repeat_interleave(matrix.group_size, dim=1)
    weight = (matrix.codes().double() - 2 ** (matrix.bits - 1)) * scales + zeros
    return inputs.double().cpu() @ weight.T


def _relative_error(output: Tensor, exact: Tensor) -> float:
    return float((output.double().cpu() - exact).norm() / exact.norm())


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
@given(
    out_features=st.integers(1, 70),
    groups=st.integers(1, 4),
    rows=st.integers(1, 200),
    seed=st.integers(0, 2**32 - 1),
)
def test_both_kernels_are_exact_in_float32(
    bits: int, group_size: int, out_features: int, groups: int, rows: int, seed: int
) -> None:
    matrix = _random_matrix(bits, group_size, out_features, groups, seed)
    inputs = _inputs(rows, groups * group_size)
    exact = _exact(inputs, matrix)
    for kernel in (DequantizeKernel(matrix, CPU), PackedInt4Kernel(matrix, CPU, torch.float32)):
        output = kernel(inputs)
        assert output.dtype == torch.float32
        torch.testing.assert_close(
            output.double(), exact, rtol=1e-5, atol=1e-5 * float(exact.square().mean().sqrt())
        )


@pytest.mark.parametrize("rows", [1, 2, 3, 16, 31, 127, 128, 129, 200])
@pytest.mark.parametrize("out_features", [16, 17, 40])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_packed_kernel_agrees_in_bfloat16(
    bits: int, group_size: int, out_features: int, rows: int
) -> None:
    matrix = _random_matrix(bits, group_size, out_features, 384 // group_size)
    inputs = _inputs(rows, 384).bfloat16()
    packed = PackedInt4Kernel(matrix, CPU, torch.bfloat16)(inputs)
    plain = DequantizeKernel(matrix, CPU)(inputs)
    assert packed.dtype == plain.dtype == torch.bfloat16
    assert packed.shape == plain.shape == (rows, out_features)
    exact = _exact(inputs, matrix)
    assert _relative_error(plain, exact) < BFLOAT16_TOLERANCE
    assert _relative_error(packed, exact) < BFLOAT16_TOLERANCE


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("mean", [0.0, 1.0], ids=["centred", "shifted"])
def test_kernels_agree_in_bfloat16_on_narrow_codes(bits: int, mean: float) -> None:
    matrix = _narrow_matrix(bits)
    inputs = _inputs(17, 512, mean).bfloat16()
    exact = _exact(inputs, matrix)
    tolerance = TWO_HALVES_TOLERANCE if bits == 8 else BFLOAT16_TOLERANCE
    packed = PackedInt4Kernel(matrix, CPU, torch.bfloat16)(inputs)
    assert _relative_error(packed, exact) < tolerance
    assert _relative_error(DequantizeKernel(matrix, CPU)(inputs), exact) < BFLOAT16_TOLERANCE


@pytest.mark.parametrize(
    ("dtype", "packed"),
    [(torch.bfloat16, True), (torch.float16, False), (torch.float32, False)],
)
def test_auto_takes_the_packed_kernel_in_bfloat16_alone(dtype: torch.dtype, packed: bool) -> None:
    assert has_packed_kernel(CPU, dtype) is packed
    kernel = make_kernel(_random_matrix(4, 64, 16, 2), CPU, dtype)
    assert isinstance(kernel, PackedInt4Kernel if packed else DequantizeKernel)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_named_kernel_is_taken(dtype: torch.dtype) -> None:
    matrix = _random_matrix(4, 64, 16, 2)
    assert isinstance(make_kernel(matrix, CPU, dtype, "packed"), PackedInt4Kernel)
    assert isinstance(make_kernel(matrix, CPU, dtype, "dequantize"), DequantizeKernel)


@needs_cuda
@pytest.mark.parametrize("rows", [1, 17, 127, 128, 200])
@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("bits", BITS)
def test_kernels_agree_on_cuda(bits: int, group_size: int, rows: int) -> None:
    device = torch.device("cuda")
    matrix = _random_matrix(bits, group_size, 40, 384 // group_size)
    inputs = _inputs(rows, 384).bfloat16()
    exact = _exact(inputs, matrix)
    for choice in ("auto", "dequantize"):
        output = make_kernel(matrix, device, torch.bfloat16, choice)(inputs.to(device))
        assert output.device.type == "cuda"
        assert _relative_error(output, exact) < BFLOAT16_TOLERANCE

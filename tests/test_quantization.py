"""Quantised weights: what the codes mean, how they are packed, and HQQ against its formulas."""

from __future__ import annotations

import itertools
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from river_llm.config import BITS, GROUP_SIZES, Quantizer, RiverConfig
from river_llm.errors import ConfigError
from river_llm.river import quantize as quantization
from river_llm.river.bit_packing import pack_codes, unpack_codes
from river_llm.river.quantize import QuantizedMatrix, quantize

QUANTIZERS: tuple[Quantizer, ...] = ("hqq", "rtn")
BFLOAT16_STEP = 2.0**-8  # relative distance of two neighbours, at most

all_configs = pytest.mark.parametrize(
    "config",
    [RiverConfig(*fields) for fields in itertools.product(BITS, GROUP_SIZES, QUANTIZERS)],
    ids=lambda config: f"{config.bits}-{config.group_size}-{config.quantizer}",
)
seeds = st.integers(0, 2**32 - 1)


def _normal(rows: int, columns: int, seed: int = 0, std: float = 0.05) -> Tensor:
    return std * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def _heavy_tailed(rows: int, columns: int, freedom: float = 2.0) -> Tensor:
    """Student's t by NumPy, whose generator takes a seed of its own."""
    draws = np.random.default_rng(0).standard_t(freedom, (rows, columns))
    return torch.from_numpy(0.05 * draws).float()


def _grid(matrix: QuantizedMatrix) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Scale and zero of every single weight, `[out_features, in_features]`."""
    scales = matrix.scales.double().repeat_interleave(matrix.group_size, dim=1)
    zeros = matrix.zeros.double().repeat_interleave(matrix.group_size, dim=1)
    return scales.numpy(), zeros.numpy()


def _mean_error(weight: Tensor, config: RiverConfig) -> float:
    return float((quantize(weight, config).dequantize() - weight).abs().mean())


def _assert_same(a: QuantizedMatrix, b: QuantizedMatrix) -> None:
    assert torch.equal(a.packed, b.packed)
    assert torch.equal(a.scales, b.scales)
    assert torch.equal(a.zeros, b.zeros)


@all_configs
@settings(max_examples=10)
@given(rows=st.integers(1, 5), groups=st.integers(1, 3), seed=seeds)
def test_weights_are_what_the_definition_says(
    config: RiverConfig, rows: int, groups: int, seed: int
) -> None:
    weight = _normal(rows, groups * config.group_size, seed)
    before = weight.clone()
    matrix = quantize(weight, config)
    assert torch.equal(weight, before)
    assert matrix.shape == weight.shape
    assert matrix.scales.shape == matrix.zeros.shape == (rows, groups)
    assert matrix.scales.dtype == matrix.zeros.dtype == torch.bfloat16
    assert matrix.num_bytes == weight.numel() * config.bits // 8 + 2 * 2 * rows * groups
    codes = matrix.codes().numpy()
    assert codes.max() < 2**config.bits
    scales, zeros = _grid(matrix)
    expected = (codes - 2.0 ** (config.bits - 1)) * scales + zeros
    np.testing.assert_allclose(matrix.dequantize().numpy(), expected, rtol=1e-6, atol=1e-9)
    assert matrix.dequantize(torch.bfloat16).equal(matrix.dequantize().bfloat16())


@all_configs
@settings(max_examples=10)
@given(seed=seeds)
def test_every_code_is_the_nearest_on_its_grid(config: RiverConfig, seed: int) -> None:
    weight = _normal(3, 2 * config.group_size, seed)
    matrix = quantize(weight, config)
    scales, zeros = _grid(matrix)
    levels = np.arange(2**config.bits) - 2.0 ** (config.bits - 1)
    candidates = levels * scales[..., None] + zeros[..., None]
    nearest = np.abs(candidates - weight.double().numpy()[..., None]).min(-1)
    error = np.abs(matrix.dequantize().double().numpy() - weight.double().numpy())
    assert (error <= nearest + 1e-4 * scales).all()


@pytest.mark.parametrize("bits", BITS)
def test_rtn_spans_each_group_from_minimum_to_maximum(bits: int) -> None:
    weight = _normal(8, 192) + torch.linspace(-0.2, 0.2, 8)[:, None]
    matrix = quantize(weight, RiverConfig(bits, 64, "rtn"))
    scales, zeros = _grid(matrix)
    bottom = zeros - 2 ** (bits - 1) * scales
    top = bottom + (2**bits - 1) * scales
    groups = weight.double().view(8, 3, 64)
    low = groups.amin(-1).clamp(max=0).repeat_interleave(64, 1).numpy()
    high = groups.amax(-1).clamp(min=0).repeat_interleave(64, 1).numpy()
    reach = np.maximum(np.abs(low), np.abs(high))
    np.testing.assert_array_less(np.abs(bottom - low), 2 * BFLOAT16_STEP * reach)
    np.testing.assert_array_less(np.abs(top - high), 2 * BFLOAT16_STEP * reach)


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("bits", BITS)
def test_weights_on_a_grid_are_kept_exactly(bits: int, quantizer: Quantizer) -> None:
    """Group by group another power of two as scale and another whole zero point."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (6, 4, 32), generator=generator)
    codes[..., 0], codes[..., 1] = 0, 2**bits - 1
    zero_points = torch.randint(2**bits, (6, 4, 1), generator=generator)
    scales = 2.0 ** torch.randint(-9, 3, (6, 4, 1), generator=generator)
    weight = ((codes - zero_points) * scales).view(6, 128)
    matrix = quantize(weight, RiverConfig(bits, 32, quantizer))
    assert torch.equal(matrix.dequantize(), weight)
    assert torch.equal(matrix.codes().view(6, 4, 32).long(), codes)


@pytest.mark.parametrize(("bits", "quantizer"), itertools.product(BITS, QUANTIZERS))
def test_equal_weights_are_kept_within_bfloat16(bits: int, quantizer: Quantizer) -> None:
    values = torch.tensor([0.0, 0.1, -0.3, 7.25, -1e-20, 1e-20]).repeat_interleave(32)
    dequantized = quantize(values[None], RiverConfig(bits, 32, quantizer)).dequantize()[0]
    assert torch.equal(dequantized[:32], torch.zeros(32))
    torch.testing.assert_close(dequantized, values, rtol=BFLOAT16_STEP, atol=0)


@all_configs
@settings(max_examples=5)
@given(seed=seeds)
def test_every_group_is_quantised_on_its_own(config: RiverConfig, seed: int) -> None:
    weight = _normal(3, 3 * config.group_size, seed) * torch.tensor([[0.01], [1.0], [300.0]])
    matrix = quantize(weight, config)
    for row, group in itertools.product(range(3), range(3)):
        columns = slice(group * config.group_size, (group + 1) * config.group_size)
        alone = quantize(weight[row : row + 1, columns], config)
        assert torch.equal(alone.codes()[0], matrix.codes()[row, columns])
        assert alone.scales.item() == matrix.scales[row, group].item()
        assert alone.zeros.item() == matrix.zeros[row, group].item()


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("block_elements", [1, 128, 5 * 128 + 1, 1 << 30])
def test_the_block_size_changes_nothing(
    block_elements: int, quantizer: Quantizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = _normal(37, 128) * torch.logspace(-3, 3, 37)[:, None]
    config = RiverConfig(4, 64, quantizer)
    expected = quantize(weight, config)
    monkeypatch.setattr(quantization, "BLOCK_ELEMENTS", block_elements)
    _assert_same(quantize(weight, config), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_quantised_as_their_float32_values(dtype: torch.dtype) -> None:
    weight = _normal(8, 128).to(dtype)
    _assert_same(quantize(weight, RiverConfig()), quantize(weight.float(), RiverConfig()))
    parameter = torch.nn.Parameter(_normal(128, 64).to(dtype))
    _assert_same(quantize(parameter.T, RiverConfig()), quantize(parameter.T.clone(), RiverConfig()))


@pytest.mark.parametrize("std", [0.05, 20.0], ids=["usual", "shrinking"])
@pytest.mark.parametrize("bits", BITS)
def test_hqq_follows_its_formulas(bits: int, std: float) -> None:
    weight = _normal(24, 128, seed=bits, std=std) + std / 3
    matrix = quantize(weight, RiverConfig(bits, 64, "hqq"))
    expected = _hqq_slowly(weight.numpy(), bits, 64)
    zeros_agree = np.isclose(matrix.zeros.float().numpy(), expected[1], rtol=BFLOAT16_STEP)
    codes_agree = matrix.codes().numpy() == expected[0]
    # a weight halfway between two codes may be rounded either way
    assert zeros_agree.mean() >= 0.97
    assert codes_agree.mean() >= 0.99


@pytest.mark.parametrize("weight", [_normal(64, 256), _heavy_tailed(64, 256)], ids=["normal", "t"])
@pytest.mark.parametrize(("bits", "group_size"), itertools.product(BITS, GROUP_SIZES))
def test_hqq_is_nearer_than_rtn(bits: int, group_size: int, weight: Tensor) -> None:
    hqq = _mean_error(weight, RiverConfig(bits, group_size, "hqq"))
    assert hqq < _mean_error(weight, RiverConfig(bits, group_size, "rtn"))


@pytest.mark.parametrize(
    ("columns", "group_size", "fix"),
    [(96, 64, "choose 32"), (192, 128, "choose 32 or 64"), (48, 32, "no group size does")],
)
def test_a_group_size_that_does_not_divide_is_refused(
    columns: int, group_size: int, fix: str
) -> None:
    message = f"group size {group_size} does not divide the input width {columns}; {fix}$"
    with pytest.raises(ConfigError, match=message):
        quantize(torch.ones(4, columns), RiverConfig(4, group_size))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(value: float, quantizer: Quantizer) -> None:
    weight = _normal(40, 128)
    weight[-1, -1] = value
    with pytest.raises(ConfigError, match="not finite; check the model's file"):
        quantize(weight, RiverConfig(4, 64, quantizer))


def _hqq_slowly(
    weight: NDArray[np.float32], bits: int, group_size: int
) -> tuple[NDArray[np.float64], NDArray[np.float32]]:
    """Codes `[out, in]` and zeros `[out, groups]` by HQQ's formulas, one group at a time.

    With W the group, s its scale, z its zero point: W_q = clip(round(W / s + z)),
    W_r = s (W_q - z), W_e = sign(x) max(0, |x| - |x|^(p-1) / beta) of x = W - W_r, and
    z = mean(W_q - (W - W_e) / s), for 20 times, beta growing by 1.01 from 10, p = 0.7.
    """
    maximum, middle = 2**bits - 1, 2 ** (bits - 1)
    rows, columns = weight.shape
    codes = np.empty((rows, columns))
    zeros = np.empty((rows, columns // group_size), dtype=np.float32)
    for row, group in itertools.product(range(rows), range(columns // group_size)):
        at = slice(group * group_size, (group + 1) * group_size)
        w = weight[row, at].astype(np.float64)
        scale = (max(w.max(), 0) - min(w.min(), 0)) / maximum
        zero_point, beta = np.round(-min(w.min(), 0) / scale), 10.0
        for _ in range(20):
            w_q = np.clip(np.round(w / scale + zero_point), 0, maximum)
            x = w - scale * (w_q - zero_point)
            magnitude = np.maximum(np.abs(x), 1e-30)
            w_e = np.sign(x) * np.maximum(0, magnitude - magnitude**-0.3 / beta)
            zero_point = np.mean(w_q - (w - w_e) / scale)
            beta *= 1.01
        rounded_scale = float(torch.tensor(scale).bfloat16())
        zero = float(torch.tensor((middle - zero_point) * rounded_scale).bfloat16())
        codes[row, at] = np.clip(np.round((w - zero) / rounded_scale + middle), 0, maximum)
        zeros[row, group] = zero
    return codes, zeros


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits": 7}, "bits is 7; it must be one of 2, 3, 4, 5, 6, 8"),
        ({"bits": "4"}, "bits is '4'; it must be one of"),
        ({"bits": 4.0}, "bits is 4.0; it must be one of"),
        ({"group_size": 48}, "group_size is 48; it must be one of 32, 64, 128"),
        ({"group_size": 64.0}, "group_size is 64.0; it must be one of"),
        ({"quantizer": "awq"}, "quantizer is 'awq'; it must be one of hqq, gptq, rtn"),
    ],
)
def test_settings_that_no_quantiser_has_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        RiverConfig(**fields)


@pytest.mark.parametrize("bits", BITS)
@given(rows=st.integers(1, 9), eighths=st.integers(1, 24), seed=seeds)
def test_packed_codes_are_those_of_a_slow_packer_and_come_back(
    bits: int, rows: int, eighths: int, seed: int
) -> None:
    generator, shape = torch.Generator().manual_seed(seed), (rows, 8 * eighths)
    codes = torch.randint(2**bits, shape, generator=generator, dtype=torch.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == [_pack_slowly(row, bits) for row in codes.tolist()]
    assert torch.equal(unpack_codes(packed, bits, 8 * eighths), codes)


@pytest.mark.parametrize(
    ("bits", "codes", "packed"),
    [
        (2, [1, 2, 3, 0, 0, 0, 0, 2], [0b00_11_10_01, 0b10_00_00_00]),
        (3, [0, 1, 2, 3, 4, 5, 6, 7], [0b11_10_01_00, 0b11_10_01_00, 0b1111_0000]),
        (4, [1, 2, 15, 0, 9, 8, 0, 7], [0x21, 0x0F, 0x89, 0x70]),
        (5, [0, 1, 17, 31, 16, 2, 3, 30], [0x10, 0xF1, 0x20, 0xE3, 0b1001_1100]),
        (6, [0, 1, 17, 63, 32, 48, 2, 61], [0x10, 0xF1, 0x00, 0xD2, 0b11_01_00_00, 0b11_00_11_10]),
        (8, [0, 1, 2, 127, 128, 200, 254, 255], [0, 1, 2, 127, 128, 200, 254, 255]),
    ],
)
def test_planes_lie_as_documented(bits: int, codes: list[int], packed: list[int]) -> None:
    assert pack_codes(torch.tensor([codes], dtype=torch.uint8), bits).tolist() == [packed]


def _pack_slowly(codes: list[int], bits: int) -> list[int]:
    """Bit by bit: planes of the widths that sum to `bits`, lowest bits and first codes first."""
    widths = {2: [2], 3: [2, 1], 4: [4], 5: [4, 1], 6: [4, 2], 8: [8]}[bits]
    stream, lowest = [], 0
    for width in widths:
        stream += [code >> bit & 1 for code in codes for bit in range(lowest, lowest + width)]
        lowest += width
    return [
        sum(bit << place for place, bit in enumerate(stream[start : start + 8]))
        for start in range(0, len(stream), 8)
    ]

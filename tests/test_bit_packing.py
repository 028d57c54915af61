"""Packed codes: nothing is lost, nothing is wasted, and the bytes are the documented planes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from river_llm.config import BITS
from river_llm.river.bit_packing import pack_codes, unpack_codes

all_widths = pytest.mark.parametrize("bits", BITS)
row_counts = st.integers(1, 9)
column_counts = st.integers(1, 24).map(lambda eighths: 8 * eighths)
seeds = st.integers(0, 2**32 - 1)


def _random_bytes(shape: tuple[int, int], below: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(below, shape, generator=generator, dtype=torch.uint8)


@all_widths
@given(rows=row_counts, columns=column_counts, seed=seeds)
def test_unpacking_gives_the_codes_back(bits: int, rows: int, columns: int, seed: int) -> None:
    codes = _random_bytes((rows, columns), 2**bits, seed)
    before = codes.clone()
    packed = pack_codes(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.shape == (rows, columns * bits // 8)
    unpacked = unpack_codes(packed, bits, columns)
    assert unpacked.dtype == torch.uint8
    assert torch.equal(unpacked, codes)
    assert torch.equal(codes, before)


@all_widths
@given(rows=row_counts, columns=column_counts, seed=seeds)
def test_every_bit_of_the_packed_bytes_counts(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    packed = _random_bytes((rows, columns * bits // 8), 256, seed)
    codes = unpack_codes(packed, bits, columns)
    assert int(codes.max()) < 2**bits
    assert torch.equal(pack_codes(codes, bits), packed)


@all_widths
@given(rows=row_counts, columns=column_counts, seed=seeds)
def test_packed_bytes_are_those_of_a_slow_packer(
    bits: int, rows: int, columns: int, seed: int
) -> None:
    codes = _random_bytes((rows, columns), 2**bits, seed)
    expected = [_pack_slowly(row, bits) for row in codes.tolist()]
    assert pack_codes(codes, bits).tolist() == expected


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

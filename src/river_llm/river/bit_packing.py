"""Codes of 2 to 8 bits packed into bytes, without waste.

A row of codes is cut into bit planes whose widths divide 8, lowest bits first, and the planes lie
one after the other in the packed row: 6 bits are a plane of 4 and a plane of 2, 3 bits a plane of
2 and one of 1. Within a plane, the first code sits in the lowest bits of the first byte.
"""

from __future__ import annotations

import torch
from torch import Tensor

PLANES: dict[int, tuple[int, ...]] = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 8: (8,)}


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Pack codes `[rows, columns]` (uint8, below 2**bits) into `[rows, columns * bits / 8]` bytes.

    `columns` must be a multiple of 8.
    """
    planes, shift = [], 0
    for width in PLANES[bits]:
        plane = (codes >> shift) & (2**width - 1)
        shift += width
        lanes = 8 // width
        plane = plane.view(codes.shape[0], -1, lanes)
        packed = plane[..., 0].clone()
        for lane in range(1, lanes):
            packed |= plane[..., lane] << (lane * width)
        planes.append(packed)
    return torch.cat(planes, dim=1)


def unpack_codes(packed: Tensor, bits: int, columns: int) -> Tensor:
    """The inverse of `pack_codes`: uint8 codes `[rows, columns]`."""
    codes: Tensor | None = None
    shift = start = 0
    for width in PLANES[bits]:
        lanes = 8 // width
        plane = packed[:, start : start + columns // lanes]
        start += columns // lanes
        parts = [(plane >> (lane * width)) & (2**width - 1) for lane in range(lanes)]
        values = torch.stack(parts, dim=-1).view(packed.shape[0], columns)
        codes = values if codes is None else codes | (values << shift)
        shift += width
    assert codes is not None
    return codes

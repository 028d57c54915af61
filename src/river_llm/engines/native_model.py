"""What the native engine knows of a model beside its packed weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class RotaryTable:
    """The rotary angles of one kind of layer.

    Attributes:
        frequencies: float32 `[rotary_dim / 2]`, angle of each position over the position.
        scaling: of cosines and sines.
        long_frequencies: in place of the others for every position, once there are more than
            `RopeBoundary.positions`; None: the same.
    """

    frequencies: Tensor
    scaling: float = 1.0
    long_frequencies: Tensor | None = None

    def angles(self, first: int, end: int, is_long: bool = False) -> tuple[Tensor, Tensor]:
        """Cosines and sines, float32 `[positions, rotary_dim / 2]`, of the positions [first, end),
        as the rotary embeddings of `transformers` compute them."""
        frequencies = self.frequencies
        if is_long and self.long_frequencies is not None:
            frequencies = self.long_frequencies
        angles = torch.arange(first, end).float()[:, None] * frequencies
        return angles.cos() * self.scaling, angles.sin() * self.scaling


@dataclass(frozen=True, slots=True)
class RopeBoundary:
    """A number of positions above which rotary angles are others (RoPE rescaling).

    Attributes:
        positions: up to so many they are the usual ones.
        keep_changing: above it they change with every position more (dynamic NTK scaling), and not
            just once (longrope).
    """

    positions: int
    keep_changing: bool

    def rows_like_single_steps(self, length: int) -> int | None:
        """How many tokens after `length` can run in one pass with the angles that single steps
        would give them, 1 at least; None: any number. The angles of a pass are those of its last
        token."""
        if length >= self.positions and not self.keep_changing:
            return None
        return max(1, self.positions - length)

    def is_shared_by(self, first: int, second: int) -> bool:
        """Whether texts of so many positions have the same angles."""
        if first <= self.positions or second <= self.positions:
            return max(first, second) <= self.positions
        return first == second or not self.keep_changing


@dataclass(frozen=True, slots=True)
class NativeModel:
    """A model of the Llama family without its matrices.

    Attributes:
        shape: sizes and constants, as `_core.Engine` takes them.
        layers: norms and biases (float32 arrays), window and rotary table of each decoder layer, as
            `_core.Engine.load_layer` takes them.
        final_norm: float32 `[hidden_size]`.
        rotary: the tables that the layers name.
        rope_boundary: None: the angles never change.
        query_scaling: (beta, original context): queries are multiplied by position, see
            `query_scales`; None: they aren't.
        context_length: the most positions; None if there is no limit.
    """

    shape: dict[str, Any]
    layers: list[dict[str, Any]]
    final_norm: Any
    rotary: list[RotaryTable]
    rope_boundary: RopeBoundary | None
    query_scaling: tuple[float, int] | None
    context_length: int | None

    def query_scales(self, first: int, end: int) -> Tensor:
        """What queries of the positions [first, end) are multiplied with, float32; none of them
        where that is nothing.

        Ministral 3 (after Llama 4) scales by 1 + beta * log(1 + floor(position / original
        context)).
        """
        if self.query_scaling is None:
            return torch.empty(0)
        beta, original = self.query_scaling
        places = torch.arange(first, end, dtype=torch.float32)
        scales: Tensor = 1 + beta * torch.log(1 + torch.floor(places / original))
        return scales

    @property
    def code_group_size(self) -> int:
        """Of weights in 8-bit codes: 64, or 32 where a width is no multiple of 64."""
        shape = self.shape
        widths = (
            shape["hidden_size"],
            shape["intermediate_size"],
            shape["num_heads"] * shape["head_dim"],
        )
        return 64 if all(width % 64 == 0 for width in widths) else 32

    @property
    def head_group_size(self) -> int:
        """The same of an LM head in codes."""
        return 64 if self.shape["hidden_size"] % 64 == 0 else 32


@dataclass(frozen=True, slots=True)
class WeightFormats:
    """How weights are packed.

    Attributes:
        backbone_bits, lm_head_bits: 16 (bfloat16) or 8.
        river_bits: of each layer, 8 or 3 to 6 for each of `llama.PROJECTIONS`.
        river_group_size: weights of the river that share a scale and a zero.
    """

    backbone_bits: int
    lm_head_bits: int
    river_bits: list[list[int]]
    river_group_size: int
